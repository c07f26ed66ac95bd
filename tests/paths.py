"""Where things are in the checkout, for tests in any folder."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "bench"
DOCS = ROOT / "docs"
EXAMPLES = ROOT / "examples"
