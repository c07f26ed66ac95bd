"""The wheel holds the package only; importing is cheap and needs torch and numpy only."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def python(code, **env):
    """stdout of `code` in a fresh interpreter, warnings as errors."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, cwd=ROOT.parent, env={**os.environ, **env},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of the files as they are, built apart so that no stale build/ gets in."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("vaekl", "kernels"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    subprocess.run(
        [*command, "--no-build-isolation", "--wheel-dir", out, source],
        check=True, capture_output=True,
    )  # fmt: skip
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_content(wheel):
    names = set(wheel.namelist())
    top = {name.split("/")[0] for name in names}
    assert {n for n in top if not n.endswith(".dist-info")} == {"vaekl"}
    for folder, inside in ((ROOT / "kernels", "vaekl/kernels"), (ROOT / "vaekl", "vaekl")):
        for path in folder.glob("*.py"):
            assert f"{inside}/{path.name}" in names
    assert "vaekl/py.typed" in names
    (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
    assert "vaekl = vaekl.__main__:main" in wheel.read(entry_points).decode()


def test_wheel_requirements(wheel):
    (name,) = [n for n in wheel.namelist() if n.endswith("METADATA")]
    lines = wheel.read(name).decode().splitlines()
    needs = [line for line in lines if line.startswith("Requires-Dist") and "extra" not in line]
    assert sorted(needs) == [
        "Requires-Dist: numpy",
        "Requires-Dist: torch>=2.10",
        'Requires-Dist: triton>=3.6; platform_system == "Linux"',
    ]


def test_kernels_is_no_top_level_package():
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\ntry: import kernels\n"
    assert "vaekl.kernels" in python(code + "except ImportError as error: print(error)")


BLOCK = "import sys; sys.modules['triton'] = None; sys.modules['numba'] = None\n"


def test_works_without_triton_and_numba():
    code = (
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name in ('triton', 'numba') else find(name, *a)\n"
        "import torch, vaekl\n"
        "x = torch.zeros(2, 3, requires_grad=True)\n"
        "z, kl, of_mean = vaekl.reparameterize_kl(x, x); (z.sum() + kl + of_mean).backward()\n"
        "try: vaekl.kl_loss(x, x, backend='triton')\n"
        "except ModuleNotFoundError as error: print(error)\n"
        "try: vaekl.kl_loss(x, x, backend='cpu')\n"
        "except ModuleNotFoundError as error: print(error)\n"
    )
    printed = python(BLOCK + code)
    assert "pip install 'triton" in printed
    assert "pip install 'vaekl[cpu]'" in printed


def test_import_is_lazy_and_quick():
    code = (
        "import sys, time, torch\n"
        "had = set(sys.modules)\n"
        "start = time.process_time(); import vaekl; print(time.process_time() - start)\n"
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - had}))"
    )
    runs = [python(code).splitlines() for _ in range(3)]
    assert not {"triton", "numba", "scipy", "matplotlib", "rich"} & set(runs[0][1].split())
    assert min(float(run[0]) for run in runs) < 0.05


def test_public_names_are_the_designs():
    names = ["ReparamKL", "kl_loss", "kl_of_mean", "nn", "reference"]
    names += ["reparameterize", "reparameterize_kl", "reparameterize_kl_moments"]
    names += ["distributions", "patch_diffusers"]
    names += ["DiagnosticsAccumulator", "DiagnosticsReport", "diagnose"]
    assert python("import vaekl; print(*sorted(vaekl.__all__))").split() == sorted(names)
