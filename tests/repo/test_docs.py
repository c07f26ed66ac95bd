"""What README and the pages of docs/ say runs, and figures are those of the committed files."""

import re
import subprocess
import sys

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

import vaekl
from paths import BENCH, DOCS, ROOT

BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
PAIR = re.compile(rf"nstead of\n\n{BLOCK.pattern}\n\nwrite\n\n{BLOCK.pattern}", re.DOTALL)
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted(DOCS.glob("*.md")))]


def of_blocks():
    """(page, its code blocks but for those of pairs)."""
    found = {page: BLOCK.findall(PAIR.sub("", (ROOT / page).read_text())) for page in PAGES}
    return [pytest.param(page, blocks, id=page) for page, blocks in found.items() if blocks]


@pytest.mark.parametrize(("page", "blocks"), of_blocks())
def test_code_blocks_run_in_order(page, blocks):
    namespace = {}
    for block in blocks:
        exec(compile(block, page, "exec"), namespace)


def replacements():
    """(heading, code of today, code with vaekl) of docs/migrate.md and of README's start."""
    sections = (DOCS / "migrate.md").read_text().split("\n## Coming from ")[1:]
    sections.append("README" + (ROOT / "README.md").read_text())
    return [pytest.param(*pair, id=text.splitlines()[0].replace(",", ""))
            for text in sections for pair in PAIR.findall(text)]  # fmt: skip


def names_of_the_pairs():
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
    names |= {"Independent": Independent, "logstd": torch.randn(64, 10)}
    names |= {name: torch.randn(64, 10) for name in ("prior_mu", "prior_logvar")}
    posterior = vaekl.distributions.DiagonalGaussianDistribution
    return names | {"DiagonalGaussianDistribution": posterior}


@pytest.mark.parametrize(("old", "new"), replacements())
def test_replacements_are_equal(old, new):
    """Each result that both blocks name is the same number, with the same gradients."""
    found = []
    for code in (old, new):
        names = names_of_the_pairs()
        given = [tensor.requires_grad_() for tensor in names.values() if torch.is_tensor(tensor)]
        exec(code, names)
        found.append((names, given))
    (before, given_before), (after, given_after) = found
    results = ("kl", "loss", "per_dim", "per_sample")
    told = [name for name in results if name in before and name in after]
    assert told
    assert "loss" in told or "kl" in told
    for name in told:
        torch.testing.assert_close(after[name], before[name], rtol=2e-5, atol=1e-5)
        gradients = [
            torch.autograd.grad(
                names[name].sum(), given, retain_graph=True, allow_unused=True,
                materialize_grads=True,
            )
            for names, given in ((after, given_after), (before, given_before))
        ]  # fmt: skip
        torch.testing.assert_close(*gradients, rtol=2e-5, atol=1e-5)
    if "z" in after:
        assert after["z"].isfinite().all()


def test_every_system_has_its_pair():
    systems = "Keras pytorch/examples AntixK pythae disentangling-vae LeRobot diffusers Oobleck LTX"
    systems += " scvi-tools torch.distributions passes Dreamer VDVAE multivae VGAE"
    ids = [parameter.id for parameter in replacements()]
    for system in systems.split():
        assert sum(system in name for name in ids) == 1, system
    assert len(ids) == len(set(ids)) == 17


def test_figures_come_from_the_committed_files():
    check = [sys.executable, BENCH / "report.py", "--check"]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_readme_is_short():
    """Its first screen: a sentence, the code that changes, a figure."""
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    start = "\n".join(lines[:30])
    assert PAIR.search(start)
    assert "](docs/which-kl/latent.png)" in start


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(page):
    page = ROOT / page
    for target, heading in re.findall(r"\]\(([^)#]+)#?([^)]*)\)", page.read_text()):
        assert (page.parent / target).exists(), target
        if heading:
            headings = re.findall(r"^#+ (.+)$", (page.parent / target).read_text(), re.MULTILINE)
            assert heading in [text.lower().replace(" ", "-") for text in headings], heading


def test_the_house_lists_every_module():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for path in (ROOT / "vaekl").glob("*.py"):
        assert path.name in text or path.name == "__init__.py", path.name


def test_every_row_of_pytorch_md_names_tests_that_exist():
    """Its index has the same rows, and names what is there."""
    page = (DOCS / "pytorch.md").read_text()
    of_behaviour, of_tests = (
        re.findall(r"^\| (.+?) \| (.+) \|$", page.split(f"| what | {column} |")[1], re.MULTILINE)
        for column in ("how it behaves", "tests")
    )
    rows = len(of_tests)
    assert rows > 30
    assert [what for what, _ in of_behaviour[:rows]] == [what for what, _ in of_tests]
    for _, named in of_tests:
        for part in named.split("; "):
            path, names = re.fullmatch(r"`(tests/[\w/]+\.py)`: ((?:`\w+`(?:, )?)+)", part).groups()
            source = (ROOT / path).read_text()
            for name in re.findall(r"\w+", names):
                assert f"\ndef {name}(" in source, f"{path}: {name}"
