"""Print, as one shell script, what README.md promises: its blocks marked `bash` and `python`, in order, without `… no-ci`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

text = Path(sys.argv[1]).read_text(encoding="utf-8")
for language, body in re.findall(r"^```(bash|python)[ \t]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
    sys.stdout.write(body if language == "bash" else f"python - <<'PYTHON'\n{body}PYTHON\n")
