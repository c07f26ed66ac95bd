"""The cpu backend's compiled code on disk.

What is about the files is tested with a kernel that compiles in no time, in a package that has the
same `cache` and the same layout.
"""

import compileall
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

import numba
import pytest
from vaekl.kernels.cpu.cache import _Files

from paths import ROOT

CALL = (
    "import torch, vaekl\n"
    "x = torch.zeros(4, 3, requires_grad=True)\n"
    "z, kl, of_mean = vaekl.reparameterize_kl(x, x, seed=1, backend='cpu')\n"
    "(z.sum() + kl + of_mean).backward()\n"
    "print(z.sum().item(), kl.item())\n"
    "from vaekl.kernels import cpu\n"
    "print(*(sum(k.run.stats.cache_misses.values()) for k in (cpu.FORWARD, cpu.BACKWARD)))\n"
)
KL = (
    "import torch, vaekl; x = torch.ones(4, 2)\n"
    "print(vaekl.kl_loss(x, torch.zeros_like(x), backend='cpu').item())\n"
    "from vaekl.kernels import cpu; print(sum(cpu.FORWARD.run.stats.cache_misses.values()))\n"
)
SMALL = {
    "__init__.py": "",
    "coefficients.py": "ZERO = 0\n",
    "cpu/__init__.py": "",
    "cpu/cache.py": (ROOT / "kernels" / "cpu" / "cache.py").read_text(),
    "cpu/factor.py": "FACTOR = 2\n",
    "cpu/small.py": (
        "from numba import njit\n"
        "from ..coefficients import ZERO\n"
        "from .cache import keep_on_disk\n"
        "from .factor import FACTOR\n\n\n"
        "@njit\n"
        "def kernel(x):\n"
        "    return FACTOR * x + ZERO\n\n\n"
        "keep_on_disk(kernel)\n"
    ),
}
NOTICES = (
    "vaekl: compiling the CPU kernels, once a machine\n",
    "vaekl: compiling the CPU kernels, which there is no folder to keep in: once a process\n",
)
CALL_SMALL = (
    "{setup}from small.cpu.small import kernel\n"
    "print(kernel(3), sum(kernel.stats.cache_misses.values()))\n"
)


def python(code, folder=None, **env):
    """stdout of `code` in a fresh interpreter, warnings as errors."""
    with tempfile.TemporaryDirectory() as empty:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code],
            capture_output=True, text=True, cwd=folder or empty, env={**os.environ, **env},
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr in ("", *NOTICES)
    return done.stdout.split()


@pytest.fixture
def small(tmp_path):
    """The folder of a package `small` with a kernel."""
    (tmp_path / "small" / "cpu").mkdir(parents=True)
    for name, text in SMALL.items():
        (tmp_path / "small" / name).write_text(text)
    return tmp_path


@pytest.fixture
def process(small, monkeypatch):
    """(what the kernel gives, whether it was compiled), as in a new process."""
    monkeypatch.syspath_prepend(small)
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(small / "cache"))
    # Python's own compiled code goes by dates, which may be the same here.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def forget():
        for name in [name for name in sys.modules if name.split(".")[0] == "small"]:
            del sys.modules[name]

    def run(x=3):
        forget()
        importlib.invalidate_caches()
        kernel = importlib.import_module("small.cpu.small").kernel
        return kernel(x), sum(kernel.stats.cache_misses.values())

    yield run
    forget()


def files(folder, suffix=""):
    return sorted(path for path in folder.rglob(f"*{suffix}") if path.is_file())


def test_compiled_code_is_kept_on_disk(tmp_path):
    """A second process compiles nothing; only the dtype in use was compiled."""
    env = {"NUMBA_CACHE_DIR": str(tmp_path)}
    *values, forward, backward = python(CALL, **env)
    assert (forward, backward) == ("1", "1")
    kept = files(tmp_path)
    assert len(kept) == 2, kept
    assert python(CALL, **env) == [*values, "0", "0"]
    assert files(tmp_path) == kept


def test_each_type_has_code_of_its_own(process, small):
    assert process(3) == (6, 1)
    assert process(1.5) == (3.0, 1)
    assert len(files(small / "cache", ".nbc")) == len(files(small / "cache")) == 2
    assert process(3) == (6, 0)
    assert process(1.5) == (3.0, 0)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [("cpu/factor.py", "FACTOR = 5\n", 15), ("coefficients.py", "ZERO = 9\n", 15)],
)
def test_other_sources_compile_again(name, text, value, process, small):
    """Whatever their dates, and in whichever file."""
    assert [process(), process()] == [(6, 1), (6, 0)]
    source = small / "small" / name
    stamp = source.stat()
    source.write_text(text)
    os.utime(source, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert [process(), process()] == [(value, 1), (value, 0)]


def _hole(content):
    middle = len(content) // 2
    return content[:middle] + bytes(4096) + content[middle + 4096 :]


DAMAGE = {
    "empty": lambda content: b"",
    "cut in the checksum": lambda content: content[:16],
    "cut after it": lambda content: content[:32],
    "cut in the code": lambda content: content[: len(content) // 2],
    "its last byte lost": lambda content: content[:-1],
    "a page of zeros": _hole,
    "zeros alone": lambda content: bytes(len(content)),
    "one bit": lambda content: content[:999] + bytes([content[999] ^ 4]) + content[1000:],
    "more than there was": lambda content: content + b"\0",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_code_is_compiled_again(damage, process, small):
    assert process() == (6, 1)
    (path,) = files(small / "cache")
    path.write_bytes(damage(path.read_bytes()))
    assert [process(), process()] == [(6, 1), (6, 0)]
    assert files(small / "cache") == [path]


def test_code_in_the_place_of_other_code(process, small):
    """Whole, and of another type: it would read an integer as a float."""
    assert process(3) == (6, 1)
    (of_int,) = files(small / "cache")
    content = of_int.read_bytes()
    assert process(1.5) == (3.0, 1)
    (of_float,) = set(files(small / "cache")) - {of_int}
    of_float.write_bytes(content)
    assert [process(1.5), process(1.5)] == [(3.0, 1), (3.0, 0)]


def test_whole_code_that_cannot_be_used(process, small):
    """As numba may change what it keeps without changing its version."""
    assert process() == (6, 1)
    (path,) = files(small / "cache")
    kept = sys.modules["small.cpu.small"].kernel._cache
    (sig,) = sys.modules["small.cpu.small"].kernel.signatures
    from numba.core.registry import cpu_target

    kept._cache_file.save(
        kept._index_key(sig, cpu_target.target_context.codegen()), ("not", "what", "numba", "keeps")
    )
    assert files(small / "cache") == [path]
    assert [process(), process()] == [(6, 1), (6, 0)]


def test_damage_that_cannot_be_mended(process, small):
    """What cannot be replaced (here: a folder in its place) is compiled in memory, each time."""
    assert process() == (6, 1)
    (path,) = files(small / "cache")
    path.unlink()
    (path / "in it").mkdir(parents=True)
    assert [process(), process()] == [(6, 1), (6, 1)]
    assert files(small / "cache") == []


def test_several_at_once(tmp_path):
    """Who reads while others write, remove and damage gets what was saved, or nothing."""
    keys = [("a", 1), ("b", 2)]
    kept = {key: [key, bytes(200_000)] for key in keys}

    def work(i):
        own = _Files(tmp_path, "name")
        seen = 0
        for turn in range(60):
            key = keys[(turn + i) % 2]
            if i == 0 and turn % 5 == 0:
                own.path(key).write_bytes(b"damaged")
            elif turn % 3 == 0:
                own.save(key, kept[key])
            found = own.load(key)
            assert found in (None, kept[key])
            seen += found is not None
        return seen

    with ThreadPoolExecutor(4) as pool:
        assert min(pool.map(work, range(4))) > 0
    assert {path.suffix for path in files(tmp_path)} <= {".nbc"}


def test_a_full_disk(small):
    """Compiled again and again, and nothing is left behind."""
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, 1_000))\n"
    env = {"NUMBA_CACHE_DIR": str(small / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}
    assert python(CALL_SMALL.format(setup=full), folder=small, **env) == ["6", "1"]
    assert files(small / "cache") == []


@pytest.mark.parametrize("where", ["folder of its own", "read-only install"])
def test_without_a_folder_to_write_to(where, small):
    """Nowhere to keep compiled code: it is compiled again, without an error."""
    blocked = small / "file"
    blocked.touch()  # a folder cannot be made below a file, not even by root
    (small / "small" / "cpu" / "__pycache__").touch()
    env = {"HOME": str(blocked), "XDG_CACHE_HOME": str(blocked / "cache")}
    if where == "folder of its own":
        env["NUMBA_CACHE_DIR"] = str(blocked / "numba")
    assert python(CALL_SMALL.format(setup=""), folder=small, **env) == ["6", "1"]
    assert not files(small, ".nbc")


def test_a_long_wait_is_told_once(small):
    """For all kernels and types; and what compiles in time says nothing."""
    code = (
        "from small.cpu import cache; cache.WAIT = {wait}\n"
        "save = cache._Told.save_overload\n"
        "if not cache.WAIT:  # it compiles for as long\n"
        "    cache._Told.save_overload = lambda c, *a: (c._timer.join(), save(c, *a))\n"
        "from small.cpu.small import kernel\n"
        "for x in (3, 3.0, 3j): kernel(x)\n"
        "assert kernel._cache._timer.finished.is_set()\n"
    )
    for wait, notice in ((0, NOTICES[0]), (1e3, "")):
        done = subprocess.run(
            [sys.executable, "-c", code.format(wait=wait)],
            capture_output=True, text=True, cwd=small,
            env={**os.environ, "NUMBA_CACHE_DIR": str(small / f"cache {wait}")},
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, notice)


def test_an_install_without_sources(tmp_path):
    """The whole package: what is compiled must not need the sources either."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "vaekl", tmp_path / "vaekl", ignore=ignore)
    shutil.copytree(ROOT / "kernels", tmp_path / "vaekl" / "kernels", ignore=ignore)
    here = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        f"import vaekl.kernels; assert vaekl.kernels.__path__[0].startswith({str(tmp_path)!r})\n"
    )
    compileall.compile_dir(tmp_path / "vaekl", quiet=1, legacy=True)
    for source in (tmp_path / "vaekl").rglob("*.py"):
        source.unlink()
    assert python(here + KL, folder=tmp_path) == ["1.0", "1"]


def test_code_without_sources_is_not_kept(tmp_path, monkeypatch):
    """In a frozen application nothing would tell the compiled code of its next build apart."""
    from numba import njit
    from vaekl.kernels.cpu import cache

    monkeypatch.setattr(cache, "__file__", str(tmp_path / "absent" / "cpu" / "cache.pyc"))
    assert cache._digest() is None
    monkeypatch.setattr(cache._Cache, "digest", None)
    kernel = njit(lambda x: x + 1)
    cache.keep_on_disk(kernel)
    assert isinstance(kernel._cache, cache._Nowhere)
    assert kernel._cache.cache_path is None
