"""CPU code: compiled kernels kept on disk, one set for each state of the sources."""

import hashlib
from contextlib import suppress
from pathlib import Path

import llvmlite
import numba
from numba.core.caching import FunctionCache, IndexDataCacheFile


def _digest():
    """Of all that compiled code depends on; numba looks at a kernel's own file alone."""
    digest = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__}".encode())
    folder = Path(__file__).parent
    sources = (*sorted(folder.glob("cpu*.py")), *folder.glob("coefficients.py"))
    for path in sources:
        digest.update(path.read_bytes())
    if not sources:  # a frozen application: nothing tells its next build from this one
        return None
    return digest.hexdigest()[:16]


class _Cache(FunctionCache):
    """Files with the digest in their names, so that one of other sources is never read."""

    digest = _digest()

    def __init__(self, function):
        super().__init__(function)
        name = f"{self._impl.filename_base}-{self.digest}"
        self._cache_file = IndexDataCacheFile(self._cache_path, name, self.digest)

    def _guard_against_spurious_io_errors(self):
        return suppress(OSError)  # a full disk costs the next process a compilation, no more


def keep_on_disk(kernel):
    """Compile a kernel once per machine, where there is a folder to write to."""
    if _Cache.digest is None:
        return
    with suppress(RuntimeError):  # numba finds none
        kernel._cache = _Cache(kernel.py_func)
