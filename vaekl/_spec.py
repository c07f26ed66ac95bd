"""The data of a call, which every layer below the public functions speaks in."""

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypedDict

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: Where exp(logvar) is of use in float32; implementations of VAEs clamp logvar to it.
LOGVAR_RANGE = (-30.0, 20.0)


class Operands(NamedTuple):
    """The tensors of a call, of one shape, but a prior that all samples share has the event's."""

    mu: Tensor  # [*batch, *event]
    scale: Tensor  # logvar, in the form that the Spec says
    eps: Tensor | None = None
    prior_mean: Tensor | None = None
    prior_scale: Tensor | None = None  # in the same form


class Gradients(NamedTuple):
    """Of the operands; None where not needed."""

    mu: Tensor | None = None
    scale: Tensor | None = None
    eps: Tensor | None = None
    prior_mean: Tensor | None = None
    prior_scale: Tensor | None = None


class Needs(NamedTuple):
    """Which gradients are needed: of the operands, or of the tensors of a storage."""

    mu: bool
    scale: bool
    eps: bool
    prior_mean: bool = False
    prior_scale: bool = False


class Into(NamedTuple):
    """Where the caller wants both gradients written, [*batch, *event] in the dtype of mu."""

    mu: Tensor
    scale: Tensor


class Outputs(NamedTuple):
    """What a call gives, or its upstream gradients; None for what is not wanted.

    A call of log densities has log_q and log_p, [*batch] each, in the places of the KLs.
    """

    z: Tensor | None = None  # [*batch, *event]
    kl: Tensor | None = None  # [], or [*batch] for reduction "none", [*event] for "per_dim"
    kl_of_mean: Tensor | None = None  # []


class Saved(NamedTuple):
    """What backward needs beside the operands: 16 bytes, and 2 D numbers if there are means."""

    key: Tensor | None = None  # of the noise that was drawn, int64[2]: (seed, offset)
    means: Tensor | None = None  # of mu and logvar, [2, D] or, over all elements, [2]
    noise: Tensor | None = None  # [B, D], of a backend that keeps it in place of a key
    samples: Tensor | None = None  # of the Source, by reference


class Source(NamedTuple):
    """Where noise that is not given comes from; torch's own generator if neither says."""

    generator: torch.Generator | None = None
    seed: int | None = None
    samples: Tensor | None = None  # which each row draws, int64: "ids" [*batch], or "keys" [B, 2]
    kind: str | None = None  # of samples


class Key(NamedTuple):
    """Of the noise stream: on the host, or int64[2] on the device."""

    seed: int
    offset: int
    on_device: Tensor | None = None


class Terms(NamedTuple):
    """Which outputs a call wants."""

    sample: bool = False  # z
    reduction: str | None = None  # "none", "sum", "batchmean", "mean", "per_dim"; None: no kl
    mean_over: str | None = None  # of kl_of_mean: "batch", "all"; None: no kl_of_mean
    log_prob: str | None = None  # log densities in place of KLs: their gradients "total", "path"


class Spec(NamedTuple):
    """All of a call that is no tensor: a key of the plans, and as text the operators' argument."""

    sample: bool
    reduction: str | None
    mean_over: str | None
    batch_dims: int
    form: str  # of the scale: a name in the tables of forms that every backend has
    clamp: tuple[float, float] | None  # bounds on logvar
    backend: str
    has_eps: bool = False
    packed: int | None = None  # the axis along which mu and logvar are halves of one tensor
    prior: str | None = None  # N(0, I), or one for each "sample", or one "event" for all of them
    samples: str | None = None  # what the Source has of them: "ids", "keys"
    log_prob: str | None = None  # as of Terms


def to_text(spec: Spec) -> str:
    """What ``from_text`` makes the same Spec of. (Plain formatting: torch.compile traces it.)"""
    sample, reduction, mean_over, batch_dims, form, clamp, backend, has_eps, packed, *rest = spec
    lo, hi = (None, None) if clamp is None else clamp
    terms, others = f"{sample};{reduction};{mean_over}", ";".join(str(word) for word in rest)
    return f"{terms};{batch_dims};{form};{lo};{hi};{backend};{has_eps};{packed};{others}"


@lru_cache(maxsize=1024)
def from_text(text: str) -> Spec:
    """The Spec that an operator was given."""
    sample, reduction, mean_over, batch_dims, form, lo, hi, backend, has_eps, packed, *rest = (
        None if word == "None" else word for word in text.split(";")
    )
    clamp = None if lo is None or hi is None else (float(lo), float(hi))
    return Spec(
        sample == "True",
        reduction,
        mean_over,
        int(batch_dims or 0),
        str(form),
        clamp,
        str(backend),
        has_eps == "True",
        None if packed is None else int(packed),
        *rest,
    )


def halves(moments: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """mu and logvar, as views."""
    half = moments.shape[dim] // 2
    return moments.narrow(dim, 0, half), moments.narrow(dim, half, half)


def sizes(shape: torch.Size, batch_dims: int) -> tuple[int, int]:
    """(B, D): number of samples and elements per event."""
    return math.prod(shape[:batch_dims]), math.prod(shape[batch_dims:])


def kl_shape(spec: Spec, shape: torch.Size) -> torch.Size:
    """Of kl, for a mu of this shape; or of either log density."""
    if spec.reduction == "none" or spec.log_prob is not None:
        return shape[: spec.batch_dims]
    return shape[spec.batch_dims :] if spec.reduction == "per_dim" else torch.Size()


def kl_denominator(reduction: str | None, batch: int, event: int) -> int:
    """What sums of KLs are divided by."""
    denominators = {"batchmean": batch, "per_dim": batch, "mean": batch * event}
    return denominators.get(reduction or "", 1)


def has_float64(device: torch.device) -> bool:
    """Whether it is known to: Metal has none, and not every GPU of Intel's."""
    return device.type in ("cpu", "cuda", "meta")


def sample_dtype(mu: Tensor, *others: Any) -> torch.dtype:
    """The dtype of mu + exp(logvar / 2) * eps, of whichever of these are tensors.

    As torch.result_type, which torch.compile does not know: scalars count only beside others.
    """
    dtype = mu.dtype
    for value in others:
        if isinstance(value, Tensor) and value.dtype is not dtype:
            if value.dim() or not mu.dim():
                dtype = torch.promote_types(dtype, value.dtype)
    return dtype


def compute_dtype(*inputs: Tensor | None) -> torch.dtype:
    """float64 if any input is, else float32; also the dtype of kl and kl_of_mean."""
    wide = torch.float64
    for tensor in inputs:  # at each call of eager: any() takes twice as long
        if tensor is not None and tensor.dtype is wide:
            return wide
    return torch.float32


def of_mean_shape(spec: Spec, shape: torch.Size) -> torch.Size:
    """Of kl_of_mean, or log_p."""
    return torch.Size() if spec.log_prob is None else kl_shape(spec, shape)


def needed(spec: Spec, needs: Needs, upstream: Outputs) -> Needs:
    """But of what no upstream gradient reaches: z has no part in the prior, the KLs none in eps;
    nor log_q in the prior.
    """
    dz, dkl, dkl_of_mean = upstream
    if spec.log_prob is not None:
        has_log_p = dkl_of_mean is not None
        mu, scale, eps, mean, prior_scale = needs
        return Needs(mu, scale, eps, mean and has_log_p, prior_scale and has_log_p)
    has_kl = dkl is not None or dkl_of_mean is not None
    mu, scale, eps, mean, prior_scale = needs
    return Needs(mu, scale, eps and dz is not None, mean and has_kl, prior_scale and has_kl)


# What the public functions take and return, for type checkers.

Clamp = tuple[float | None, float | None] | None
Values = Tensor | float  # as many as mu has, or fewer that broadcast to it
Prior = tuple[Values, Values] | None  # mean, scale


class ModuleOptions(TypedDict, total=False):
    """Keyword arguments of ``nn.ReparameterizeKL`` on which no type of a result depends."""

    reduction: str
    mean_over: str
    batch_dims: int | None
    scale: str
    clamp: Clamp
    backend: str


class CallOptions(ModuleOptions, total=False):
    """Those of ``reparameterize_kl`` and ``reparameterize_kl_moments``."""

    prior: Prior
    eps: Values | None
    generator: torch.Generator | None
    seed: int | None
    sample_ids: Tensor | None


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
        """KL to the prior in nats, N(0, I) unless given: the mean of the KLs, or what ``reduction``
        says."""
        kl_of_mean: Tensor | None
        """KL of the mean parameters in nats; None if not asked for."""


class ReparamLogProb(NamedTuple):
    """What :func:`reparameterize_log_prob` returns."""

    z: Tensor
    """The sample, of mu's shape."""
    log_q: Tensor
    """log q(z | x) of each sample, in nats."""
    log_p: Tensor
    """log p(z) of each sample under the prior, in nats."""
