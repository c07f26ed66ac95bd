"""What README says runs, and its figures are those of the committed files."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_code_blocks_run_in_order():
    assert BLOCKS
    namespace = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), namespace)


def test_figures_come_from_the_committed_files():
    check = [sys.executable, ROOT / "bench" / "report.py", "--check"]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text()):
        assert (ROOT / target).exists(), target


def test_the_house_lists_every_module():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for path in (ROOT / "vaekl").glob("*.py"):
        assert path.name in text or path.name == "__init__.py", path.name
