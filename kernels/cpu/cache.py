"""CPU code: compiled kernels kept on disk, one set for each state of the sources.

A file holds its checksum and what numba would keep. Machine code that a full disk, a power cut or a
killed process has damaged may still unpickle, and then crash: it is not loaded but compiled anew.
numba's own index of files is not used, which two processes that write at once can leave naming code
of other types than it holds.
"""

import hashlib
import os
import pickle
import sys
import threading
import uuid
from contextlib import suppress
from pathlib import Path

import llvmlite
import numba
from numba.core.caching import FunctionCache, NullCache
from numba.core.serialize import dumps

WAIT = 2.0  # seconds of compiling before a word about it
_CHECKSUM = hashlib.sha256().digest_size


def _digest():
    """Of all that compiled code depends on; numba looks at a kernel's own file alone."""
    digest = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__}".encode())
    folder = Path(__file__).parent
    sources = (*sorted(folder.glob("*.py")), *folder.parent.glob("coefficients.py"))
    for path in sources:
        digest.update(path.read_bytes())
    if not sources:  # a frozen application: nothing tells its next build from this one
        return None
    return digest.hexdigest()[:16]


class _Files:
    """Compiled code of one function: a file for each key (types of arguments, processor)."""

    def __init__(self, folder, name):
        self.folder, self.name = Path(folder), name

    def path(self, key):
        """The file of a key."""
        digest = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
        return self.folder / f"{self.name}-{digest}.nbc"

    def _checksum(self, path, data):
        # With the name: a file in the place of another is damage, too.
        return hashlib.sha256(path.name.encode() + data).digest()

    def load(self, key):
        """What was saved, to the byte; None if it was not, or is damaged."""
        path = self.path(key)
        try:
            content = path.read_bytes()
        except OSError:
            return None
        data = content[_CHECKSUM:]
        if content[:_CHECKSUM] != self._checksum(path, data):
            self.remove(key)
            return None
        return pickle.loads(data)

    def save(self, key, code):
        """Keep code, in one step for who reads at the same time."""
        path, data = self.path(key), dumps(code)
        unfinished = path.with_name(f"{path.name}.tmp.{uuid.uuid4().hex[:16]}")
        try:
            unfinished.write_bytes(self._checksum(path, data) + data)
            os.replace(unfinished, path)
        except BaseException:
            with suppress(OSError):
                unfinished.unlink()
            raise

    def remove(self, key):
        """Forget a key, where that may be done."""
        with suppress(OSError):
            self.path(key).unlink()

    def flush(self):
        """Forget all keys."""
        for path in self.folder.glob(f"{self.name}-*.nbc"):
            with suppress(OSError):
                path.unlink()


class _OnDisk(FunctionCache):
    """numba's, with files of our own; the digest in their names: of other sources none is read."""

    digest = _digest()

    def __init__(self, function):
        super().__init__(function)
        self._cache_file = _Files(self._cache_path, f"{self._impl.filename_base}-{self.digest}")

    def load_overload(self, sig, target_context):
        """What was kept, if it can be used."""
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # whatever code that is whole and yet no use to this process ends in
            self._cache_file.remove(self._index_key(sig, target_context.codegen()))
            return None

    def _guard_against_spurious_io_errors(self):
        return suppress(OSError)  # a full disk costs the next process a compilation, no more


class _Told:
    """A cache that says on stderr, once, why a call takes long: it is being compiled."""

    how_often = "once a machine"
    _told = threading.Lock()  # held from the first time on
    _timer = None

    def load_overload(self, *arguments):
        """None: numba compiles it now."""
        found = super().load_overload(*arguments)
        if found is None:
            self._timer = threading.Timer(WAIT, self._tell)
            self._timer.daemon = True
            self._timer.start()
        return found

    def save_overload(self, *arguments):
        """It is compiled."""
        if self._timer is not None:
            self._timer.cancel()
        super().save_overload(*arguments)

    def _tell(self):
        if self._told.acquire(blocking=False):
            print(f"vaekl: compiling the CPU kernels, {self.how_often}", file=sys.stderr)


class _Nowhere(_Told, NullCache):
    """Where nothing can be kept."""

    how_often = "which there is no folder to keep in: once a process"


class _Cache(_Told, _OnDisk):
    """Where there is a folder."""


def keep_on_disk(kernel):
    """Compile a kernel once per machine, where there is a folder to write to."""
    kernel._cache = _Nowhere()
    if _Cache.digest is None:
        return
    with suppress(RuntimeError):  # numba finds none
        kernel._cache = _Cache(kernel.py_func)
