"""Peak memory of one step on the CPU: prints the growth of this process's resident set in bytes.

    python benchmarks/speed/sparse_attention/sparse_attention_peak.py dense|sparse TOKENS FORM SETTING.json-text

Growth is counted from the moment when the inputs exist. It includes the gradients, but not the inputs, for both kinds.
"""

from __future__ import annotations

import json
import re
import resource
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sparse_attention_setting import Inputs, Setting, dense_step, make_inputs, sparse_step
from sparse_attention_timing import Clock


def main(kind: str, tokens: int, form: Any, setting: Setting) -> int:
    def step(inputs: Inputs) -> None:
        if kind == "dense":
            dense_step(inputs, form, Clock())
        else:
            sparse_step(inputs, setting, Clock())

    # A first small step, so that what the libraries allocate on first use does not count.
    step(make_inputs(setting, 2 * setting.block_size))
    inputs = make_inputs(setting, tokens)
    before = _peak()
    step(inputs)
    return _peak() - before


def _peak() -> int:
    """Peak of this process's own memory in bytes. `getrusage` would start from the peak of its parent."""
    status = Path("/proc/self/status")
    if status.exists():
        # The high-water mark of the resident set.
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"))
        if found:
            return int(found[1]) * 1024
    # macOS reports bytes, Linux kibibytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    print(main(sys.argv[1], int(sys.argv[2]), sys.argv[3], Setting(**json.loads(sys.argv[4]))))
