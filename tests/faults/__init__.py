"""Commands under faults of the file system and of the network. Uses drawings, golden cases and the Hub's stand-in."""

import sys
from pathlib import Path

_TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_TESTS / name) for name in ("golden", "finetuning", "converters", "release")]
