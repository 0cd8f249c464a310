"""Print the commands that README.md promises: its blocks marked `bash`, in order, without those marked `bash no-ci`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

text = Path(sys.argv[1]).read_text(encoding="utf-8")
blocks = re.findall(r"^```bash[ \t]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
sys.stdout.write("\n".join(blocks))
