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


PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/pytorch.md"]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text()):
        assert (ROOT / page).parent.joinpath(target).exists(), target


def test_the_house_lists_every_module():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for path in (ROOT / "vaekl").glob("*.py"):
        assert path.name in text or path.name == "__init__.py", path.name


def test_every_row_of_pytorch_md_names_tests_that_exist():
    page = (ROOT / "docs" / "pytorch.md").read_text()
    rows = page[page.index("| feature |") :].splitlines()[2:]
    assert len(rows) > 30
    for row in rows:
        named = re.findall(r"`(tests/test_\w+\.py)::(test_\w+)`", row.split("|")[-2])
        assert named, row
        for path, name in named:
            assert f"\ndef {name}(" in (ROOT / path).read_text(), f"{path}::{name}"
