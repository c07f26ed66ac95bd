"""The kernels of a checkout lie beside this package, not inside: tell Python's import.

Whoever starts Python in a checkout imports its folder vaekl/, whatever is installed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

KERNELS = "vaekl.kernels"


class KernelsBeside:
    """A finder of ``vaekl.kernels``, and of nothing else."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Where the package is that has this name."""
        if name != KERNELS:
            return None
        return spec_from_file_location(name, self.folder / "__init__.py")


def find_kernels(package: Iterable[str]) -> None:
    """Have the kernels found, if the folders `package` of vaekl hold none but one lies beside.

    This goes before all other finders: a vaekl elsewhere that is installed to be edited would give
    its own.
    """
    for old in [f for f in sys.meta_path if type(f).__module__ == __name__]:
        sys.meta_path.remove(old)  # of an import before this one
    for folder in map(Path, package):
        beside = folder.parent / "kernels"
        if not (folder / "kernels").exists() and (beside / "coefficients.py").is_file():
            sys.meta_path.insert(0, KernelsBeside(beside))
            return


find_kernels(sys.modules[__package__].__path__)
