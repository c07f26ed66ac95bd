"""The cpu backend's compiled code on disk."""

import compileall
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CALL = (
    "import torch, vaekl\n"
    "x = torch.zeros(4, 3, requires_grad=True)\n"
    "z, kl, of_mean = vaekl.reparameterize_kl(x, x, seed=1, backend='cpu')\n"
    "(z.sum() + kl + of_mean).backward()\n"
    "print(z.sum().item(), kl.item())\n"
)
COMPILED = "from vaekl.kernels import cpu; print(sum({}.stats.cache_misses.values()))\n"
KL = (
    "import torch, vaekl; x = torch.ones(4, 2)\n"
    "print(vaekl.kl_loss(x, torch.zeros_like(x), backend='cpu').item())\n"
    + COMPILED.format("cpu.forward")
)


def install(folder):
    """A copy of the package that has compiled nothing; code that imports it."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "vaekl", folder / "vaekl", ignore=ignore)
    shutil.copytree(ROOT / "kernels", folder / "vaekl" / "kernels", ignore=ignore)
    return (
        f"import sys; sys.path.insert(0, {str(folder)!r})\n"
        f"import vaekl.kernels; assert vaekl.kernels.__path__[0].startswith({str(folder)!r})\n"
    )


def python(code, folder=None, **env):
    """stdout of `code` in a fresh interpreter, warnings as errors."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True, text=True, cwd=folder or ROOT.parent, env={**os.environ, **env},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.split()


def test_compiled_code_is_kept_on_disk(tmp_path):
    """A second process compiles nothing; only the dtype in use was compiled."""
    env = {"NUMBA_CACHE_DIR": str(tmp_path)}
    first = python(CALL, **env)
    files = sorted(p.name for p in tmp_path.rglob("*.nbc"))
    assert len(files) == 2, files
    count = COMPILED.format("cpu.forward") + COMPILED.format("cpu.backward")
    assert python(CALL + count, **env) == [*first, "0", "0"]
    assert sorted(p.name for p in tmp_path.rglob("*.nbc")) == files


def test_other_sources_compile_again(tmp_path):
    """Whatever their dates; on a full disk again and again, but never is old code taken for new."""
    # Python's own compiled code goes by the date, which is the same here.
    env = {"NUMBA_CACHE_DIR": str(tmp_path / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}
    here = install(tmp_path)
    for compiled in ("1", "0"):
        assert python(here + KL, folder=tmp_path, **env) == ["1.0", compiled]
    source = tmp_path / "vaekl" / "kernels" / "cpu_forward.py"
    stamp, text = source.stat(), source.read_text()
    assert text.count("0.5 * total(") == 2
    source.write_text(text.replace("0.5 * total(", "1.5 * total("))
    os.utime(source, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    # Enough for an index of compiled code, not for the code.
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
    for limit in (full, ""):
        assert python(here + limit + KL, folder=tmp_path, **env) == ["3.0", "1"]


def test_an_install_without_sources(tmp_path):
    here = install(tmp_path)
    compileall.compile_dir(tmp_path / "vaekl", quiet=1, legacy=True)
    for source in (tmp_path / "vaekl").rglob("*.py"):
        source.unlink()
    assert python(here + KL, folder=tmp_path) == ["1.0", "1"]


@pytest.mark.parametrize("where", ["folder of its own", "read-only install"])
def test_without_a_folder_to_write_to(where, tmp_path):
    """Nowhere to keep compiled code: it is compiled again, and nothing is said."""
    here = install(tmp_path)
    blocked = tmp_path / "file"
    blocked.touch()  # a folder cannot be made below a file, not even by root
    (tmp_path / "vaekl" / "kernels" / "__pycache__").touch()
    env = {"HOME": str(blocked), "XDG_CACHE_HOME": str(blocked / "cache")}
    if where == "folder of its own":
        env["NUMBA_CACHE_DIR"] = str(blocked / "numba")
    assert python(here + KL, folder=tmp_path, **env) == ["1.0", "1"]
    assert not list(tmp_path.rglob("*.nbc"))


def test_code_without_sources_is_not_kept(tmp_path, monkeypatch):
    """In a frozen application nothing would tell the compiled code of its next build apart."""
    from numba import njit
    from vaekl.kernels import cpu_cache

    monkeypatch.setattr(cpu_cache, "__file__", str(tmp_path / "absent" / "cpu_cache.pyc"))
    assert cpu_cache._digest() is None
    monkeypatch.setattr(cpu_cache._Cache, "digest", None)
    kernel = njit(lambda x: x + 1)
    before = kernel._cache
    cpu_cache.keep_on_disk(kernel)
    assert kernel._cache is before
