"""What README says runs, and its figures are those of the committed files."""

import re
import subprocess
import sys

import pytest
import torch
from torch.distributions import Normal, kl_divergence

import vaekl
from paths import BENCH, DOCS, ROOT


@pytest.mark.parametrize("page", ["README.md", "docs/which-kl.md"])
def test_code_blocks_run_in_order(page):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert blocks
    namespace = {}
    for block in blocks:
        exec(compile(block, page, "exec"), namespace)


def replacements():
    """(system, code of today, code with vaekl) of README's table."""
    readme = (ROOT / "README.md").read_text()
    section = readme.split("## Replace this with that")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \| `(.+?)` \| `(.+?)` \|$", section, re.MULTILINE)
    return [pytest.param(old, new, id=system) for system, old, new in rows]


def names_of_the_table():
    """What its code is about, float32; logvars up to 1, as the plain formulas need."""
    torch.manual_seed(0)
    names = {"mu": torch.randn(64, 10), "logvar": torch.randn(64, 10)}
    names |= {"weight": 0.00025, "beta": 4.0, "gamma": 30.0, "C": 3.0, "free": 8.0}
    names |= {"head": torch.randn(8, 64), "moments": torch.randn(4, 8, 16, 16)}
    names |= {"audio": torch.randn(4, 16, 32), "std": torch.rand(4, 16, 32) + 0.5}
    names |= {"video": torch.randn(2, 8, 3, 4, 4), "one": torch.randn(2, 1, 3, 4, 4)}
    names |= {"var": torch.rand(64, 10) + 0.1, "m": torch.randn(5, 6, 7)}
    names |= {"s": torch.rand(5, 6, 7) + 0.5, "prior_m": torch.randn(5, 6, 7)}
    names |= {"prior_s": torch.rand(5, 6, 7) + 0.5}
    of_images = ("x", "log_s", "prior_x", "prior_log_s")
    names |= {name: torch.randn(2, 3, 8, 8) / 2 for name in of_images}
    names |= {"torch": torch, "vaekl": vaekl, "Normal": Normal, "kl_divergence": kl_divergence}
    posterior = vaekl.distributions.DiagonalGaussianDistribution
    return names | {"DiagonalGaussianDistribution": posterior}


@pytest.mark.parametrize(("old", "new"), replacements())
def test_replacements_are_equal(old, new):
    """Every row of the table: each result that both columns name is the same number."""
    before, after = names_of_the_table(), names_of_the_table()
    exec(old, before)
    exec(new, after)
    told = [name for name in ("kl", "loss", "per_dim") if name in before and name in after]
    assert told
    assert "loss" in told or "kl" in told
    for name in told:
        torch.testing.assert_close(after[name], before[name], rtol=2e-5, atol=1e-5)
    if "z" in after:
        assert after["z"].isfinite().all()


def test_every_system_has_its_row():
    systems = "Keras pytorch/examples AntixK pythae disentangling-vae LeRobot diffusers Oobleck LTX"
    ids = " ".join(parameter.id for parameter in replacements())
    for system in [*systems.split(), "scvi-tools", "torch.distributions", "Dreamer", "VDVAE"]:
        assert system in ids


def test_figures_come_from_the_committed_files():
    check = [sys.executable, BENCH / "report.py", "--check"]
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


def test_every_row_of_pytorch_md_names_tests_that_exist():
    page = (DOCS / "pytorch.md").read_text()
    rows = page[page.index("| feature |") :].splitlines()[2:]
    assert len(rows) > 30
    for row in rows:
        named = re.findall(r"`(tests/\w+/test_\w+\.py)::(test_\w+)`", row.split("|")[-2])
        assert named, row
        for path, name in named:
            assert f"\ndef {name}(" in (ROOT / path).read_text(), f"{path}::{name}"
