"""What the public functions return, and keyword arguments that they share, for type checkers."""

from typing import TYPE_CHECKING, Generic, NamedTuple, TypedDict

import torch
from torch import Tensor

Clamp = tuple[float | None, float | None] | None
Values = Tensor | float  # as many as mu has, or fewer that broadcast to it


class ModuleOptions(TypedDict, total=False):
    """Keyword arguments of ``nn.ReparameterizeKL`` on which no type of a result depends."""

    reduction: str
    mean_over: str
    batch_dims: int | None
    clamp: Clamp
    backend: str


class CallOptions(ModuleOptions, total=False):
    """Those of ``reparameterize_kl`` and ``reparameterize_kl_moments``."""

    eps: Values | None
    generator: torch.Generator | None
    seed: int | None


if TYPE_CHECKING:
    from typing_extensions import TypeVar

    OfMean = TypeVar("OfMean", bound=Tensor | None, default=Tensor | None, covariant=True)

    # Generic for type checkers alone: torch takes only a plain named tuple apart.
    class ReparamKL(NamedTuple, Generic[OfMean]):
        """``ReparamKL[Tensor]``, or ``ReparamKL[None]`` of ``kl_of_mean=False``."""

        z: Tensor
        kl: Tensor
        kl_of_mean: OfMean
else:

    class ReparamKL(NamedTuple):
        """What :func:`reparameterize_kl` returns."""

        z: Tensor
        """The sample, of mu's shape."""
        kl: Tensor
        """KL to the standard normal in nats: the mean (or what ``reduction`` says) of the KLs."""
        kl_of_mean: Tensor | None
        """KL of the mean parameters in nats; None if not asked for."""
