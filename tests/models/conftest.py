"""Make the top-level folder models/ importable however pytest was started: it is no part of the installed package."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))
