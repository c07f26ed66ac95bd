"""What README says runs, and its figures are those of the committed files."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import vaekl

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("page", ["README.md", "docs/which-kl.md"])
def test_code_blocks_run_in_order(page):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert blocks
    namespace = {}
    for block in blocks:
        exec(compile(block, page, "exec"), namespace)


@pytest.mark.parametrize("script", ["report.py", "pages.py"])
def test_figures_come_from_the_committed_files(script):
    check = [sys.executable, ROOT / "bench" / script, "--check"]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/which-kl.md"]
)
def test_links_lead_somewhere(page):
    page = ROOT / page
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_house_lists_every_module():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for path in (ROOT / "vaekl").glob("*.py"):
        assert path.name in text or path.name == "__init__.py", path.name


def test_a_wrong_figure_is_found(tmp_path):
    page = tmp_path / "page.md"
    text = (ROOT / "docs" / "which-kl.md").read_text()
    page.write_text(text.replace("nats worse", "nats better"))
    check = [sys.executable, ROOT / "bench" / "pages.py", "--page", page]
    done = subprocess.run([*check, "--check"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "'trainings'" in done.stdout
    assert "'reports'" not in done.stdout
    subprocess.run(check, check=True, capture_output=True)
    assert page.read_text() == text


def test_every_public_name_is_documented():
    for name in vaekl.__all__:
        thing = getattr(vaekl, name)
        assert thing.__doc__, name
        for member, value in vars(thing).items() if isinstance(thing, type) else ():
            if not member.startswith("_") and (callable(value) or isinstance(value, property)):
                assert value.__doc__, f"{name}.{member}"
