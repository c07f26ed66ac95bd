"""The wheel holds the package only; importing is cheap and needs torch and numpy only."""

import modulefinder
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

import vaekl
from paths import ROOT


def python(code, cwd=None, **env):
    """stdout of `code` in a fresh interpreter."""
    # Elsewhere a clone, of the folder name vaekl, could be found for the package.
    with tempfile.TemporaryDirectory() as empty:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True, text=True, cwd=cwd or empty, env={**os.environ, **env},
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The files as they are, and none beside them."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("vaekl", "kernels"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    return source


@pytest.fixture(scope="module")
def wheel(tmp_path_factory, checkout):
    """Built apart, so that no stale build/ gets in, and where torch cannot be imported."""
    folder, absent = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("absent")
    shutil.copytree(checkout, folder / "source")
    (absent / "torch.py").write_text("raise ImportError\n")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    subprocess.run(
        [*command, "--no-build-isolation", "--wheel-dir", folder, folder / "source"],
        check=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(absent)},
    )  # fmt: skip
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def installed(tmp_path_factory, wheel):
    """The package and its metadata, as pip puts them into a folder."""
    folder = tmp_path_factory.mktemp("site")
    wheel.extractall(folder)
    return folder


def test_wheel_content(wheel):
    names = set(wheel.namelist())
    top = {name.split("/")[0] for name in names}
    assert {n for n in top if not n.endswith(".dist-info")} == {"vaekl"}
    for folder, inside in ((ROOT / "kernels", "vaekl/kernels"), (ROOT / "vaekl", "vaekl")):
        for path in folder.rglob("*.py"):
            assert f"{inside}/{path.relative_to(folder).as_posix()}" in names
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


def test_the_version_is_that_of_the_source(wheel):
    (name,) = [n for n in wheel.namelist() if n.endswith("METADATA")]
    assert f"Version: {vaekl.__version__}" in wheel.read(name).decode().splitlines()


def test_import_statements_lead_to_every_module(installed):
    """What freezes an application (PyInstaller, cx_Freeze) packs what it finds by these."""
    finder = modulefinder.ModuleFinder(path=[str(installed)])
    finder.import_hook("vaekl")
    used = {name for name in finder.modules if name.startswith("vaekl")}
    finder.import_hook("vaekl.__main__")
    every = {
        ".".join(path.relative_to(installed).with_suffix("").parts).removesuffix(".__init__")
        for path in installed.glob("vaekl/**/*.py")
    }
    assert every == {name for name in finder.modules if name.startswith("vaekl")}
    only_of_the_command = {"__main__", "_check", "_environment", "testing"}
    assert every - used == {f"vaekl.{name}" for name in only_of_the_command}


def test_without_metadata(installed):
    """A frozen application has none, of no package."""
    code = (
        "import importlib.metadata as metadata\n"
        "def absent(cls, name): raise metadata.PackageNotFoundError(name)\n"
        "metadata.Distribution.from_name = classmethod(absent)\n"
        "import torch, vaekl\n"
        "from vaekl import _environment\n"
        "print(vaekl.__file__, vaekl.__version__)\n"
        "found = _environment.versions()\n"
        "print(found['vaekl'], found['numpy'], found['numba'])\n"
        "import numpy; print(numpy.__version__)\n"
    )
    where, versions, numpy = python(code, PYTHONPATH=str(installed)).splitlines()
    assert where == f"{installed / 'vaekl' / '__init__.py'} {vaekl.__version__}"
    assert versions == f"{vaekl.__version__} {numpy} None"


@pytest.mark.parametrize("is_installed", [True, False])
def test_in_a_checkout(is_installed, checkout, installed):
    """Its folder vaekl/ goes before any installed package, and so do its kernels."""
    code = (
        "import importlib, importlib.util, sys\n"
        "import vaekl, vaekl.kernels.coefficients as first\n"
        "below = importlib.util.find_spec('vaekl.kernels.cpu').origin\n"
        "for name in [name for name in sys.modules if name.startswith('vaekl')]:\n"
        "    del sys.modules[name]\n"
        "again = importlib.reload(importlib.import_module('vaekl.kernels'))\n"
        "print(again.__file__, first.__file__, below, vaekl.__file__, sep='\\n')\n"
        "print(sum(type(f).__name__ == 'KernelsBeside' for f in sys.meta_path))\n"
        "print(*(importlib.util.find_spec(f'vaekl.{n}') for n in ('vaekl', 'docs', 'none')))\n"
    )
    environment = {"PYTHONPATH": str(installed)} if is_installed else {}
    kernels, first, below, package, *rest = python(code, cwd=checkout, **environment).splitlines()
    assert Path(kernels) == checkout / "kernels" / "__init__.py"
    assert Path(first) == checkout / "kernels" / "coefficients.py"
    assert Path(below) == checkout / "kernels" / "cpu" / "__init__.py"
    assert Path(package) == checkout / "vaekl" / "__init__.py"
    assert rest == ["1", "None None None"]


def test_an_installed_package_has_its_own_kernels(installed):
    """Whatever is called kernels beside it."""
    (installed / "kernels").mkdir()
    (installed / "kernels" / "coefficients.py").write_text("raise ImportError\n")
    code = "import vaekl, vaekl.kernels as kernels; print(kernels.__file__)"
    found = python(code, PYTHONPATH=str(installed))
    assert Path(found) == installed / "vaekl" / "kernels" / "__init__.py"


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


def test_import_is_lazy():
    """What it loads beside torch is its own modules, without a backend's, and small ones.

    Not torch's compiler either, whose import takes longer than an epoch of a small VAE.
    """
    code = "import sys, torch\nhad = set(sys.modules)\nimport vaekl\nprint(*set(sys.modules) - had)"
    loaded = python(code).split()
    packages = {name.split(".")[0] for name in loaded} - sys.stdlib_module_names
    assert packages <= {"vaekl", "numpy"}
    own = {name for name in loaded if name.startswith("vaekl.")}
    late = {
        "backends.triton",
        "backends.triton_launch",
        "backends.cpu",
        "_check",
        "__main__",
        "testing",
    }
    assert not own & {f"vaekl.{name}" for name in late}
    kernels = {name for name in own if name.startswith("vaekl.kernels.")}
    assert kernels <= {"vaekl.kernels.coefficients"}  # numbers


def test_public_names():
    names = ["ReparamKL", "kl_loss", "kl_of_mean", "nn", "reference"]
    names += ["reparameterize", "reparameterize_kl", "reparameterize_kl_moments"]
    names += ["ReparamLogProb", "reparameterize_log_prob"]
    names += ["distributions", "patch_diffusers"]
    names += ["DiagnosticsAccumulator", "DiagnosticsReport", "diagnose"]
    assert python("import vaekl; print(*sorted(vaekl.__all__))").split() == sorted(names)
