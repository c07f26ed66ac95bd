"""Checks of user input: every error names the argument and what was seen, before any work."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import backends
from ._spec import DTYPES, Operands, compute_dtype, sample_dtype
from .backends.protocol import interpreting

REDUCTIONS = ("none", "sum", "batchmean", "mean", "per_dim")
MEANS_OVER = ("batch", "all")
#: The scale of N(0, 1), in forms other than a logarithm.
_UNITS = {"std": 1, "var": 1}
SCALES = ("logvar", "log_std", "std", "var")


def tensor(name: str, value: Any) -> None:
    """A dense tensor of floating point numbers."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in DTYPES:
        names = ", ".join(str(dtype) for dtype in DTYPES)
        raise TypeError(f"{name} must have one of the dtypes {names}; got {value.dtype}")
    _dense(name, value)
    # It lacks some of the operations, and torch.where of one ends in a RecursionError.
    if type(value) is not Tensor and isinstance(value, torch.masked.MaskedTensor):
        raise TypeError(
            f"{name} must be a tensor without a mask, got MaskedTensor (give its get_data(), and "
            "mask the KLs of reduction='none')"
        )


def _dense(name: str, value: Tensor) -> None:
    if value.layout is not torch.strided or value.is_nested:
        found = "a nested one" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{name} must be a dense (strided) tensor, got {found}")


def broadcasts(name: str, value: Tensor, mu: Tensor) -> bool:
    """Has value to be expanded to mu's shape? False if it has it."""
    shape, rank = value.shape, value.dim()
    fits = rank <= mu.dim()
    expands = rank < mu.dim()
    for n, m in zip(reversed(shape), reversed(mu.shape)):
        if holds(n == m):
            continue
        if holds(n == 1):
            expands = True
        elif fails(n == m):
            fits = False
    if not fits:
        raise ValueError(
            f"{name} must have the shape of mu, {tuple(mu.shape)}; got {tuple(shape)}, which does "
            "not broadcast to it"
        )
    if value.device != mu.device:
        raise ValueError(f"{name} must be on the device of mu, {mu.device}; got {value.device}")
    return expands


def broadcast(mu: Any, logvar: Any, eps: Any) -> tuple[Tensor, Tensor | None, torch.dtype | None]:
    """(logvar, eps, dtype): of mu's shape, as plain code takes numbers and smaller tensors; the
    dtype that z is to be cast to, None if it is right.

    Nothing is copied: an expanded tensor has strides of 0, and autograd sums its gradient.

    Raises:
        TypeError, ValueError: As ``reparameterize_kl``, for its tensors.
    """
    tensor("mu", mu)
    spread = [_expanded(name, value, mu) for name, value in (("logvar", logvar), ("eps", eps))]
    scalars = [value for value in (logvar, eps) if value is not None and _is_scalar(value)]
    return spread[0], spread[1], sample_dtype(mu, logvar, eps) if scalars else None


def _is_scalar(value: Any) -> bool:
    return not isinstance(value, Tensor) or value.dim() == 0


def _expanded(name: str, value: Any, mu: Tensor) -> Any:
    if value is None and name == "eps":
        return None
    value = _of_mu(name, value, mu)
    return value.expand(mu.shape) if broadcasts(name, value, mu) else value


def _of_mu(name: str, value: Any, mu: Tensor, wide: torch.dtype | None = None) -> Any:
    """A number or tensor as a tensor where mu is; a scalar as `wide`, float32 or mu's."""
    # A half scalar would lose digits.
    wide = wide or torch.promote_types(mu.dtype, torch.float32)
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            raise ValueError(f"{name} must be a number that a float can hold") from None
        return mu.new_full((), number, dtype=wide)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor or a number, got {type(value).__name__}")
    tensor(name, value)
    if value.dim() == 0 and mu.dim():
        device = mu.device if value.device.type == "cpu" else value.device
        return value.to(device, wide)
    return value


def is_standard(prior: Any, scale: str) -> bool:
    """Is it N(0, I), as two numbers?"""
    return (
        isinstance(prior, tuple | list)
        and len(prior) == 2
        and not isinstance(prior[0], Tensor)  # as most are; to ask for a number takes longer
        and all(isinstance(v, numbers.Real) and not isinstance(v, bool) for v in prior)
        and prior[0] == 0
        and prior[1] == _UNITS.get(scale, 0)
    )


def prior_pair(value: Any) -> None:
    """TypeError if a prior is no pair."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        found = f"{len(value)} of them" if isinstance(value, tuple | list) else type(value).__name__
        raise TypeError(f"prior must be a pair (mean, scale) or None, got {found}")


def prior(
    value: Any, mu: Tensor, others: Sequence[Any], batch_dims: int, mean_over: str | None
) -> tuple[str, Tensor, Tensor]:
    """("sample", mean, scale) of mu's shape, or where neither has a batch axis ("event", mean,
    scale) of the event's. `others`: logvar and eps, which have a part in the dtype of numbers.

    Raises:
        TypeError, ValueError: As ``reparameterize_kl``, for prior.
    """
    prior_pair(value)
    names = ("the prior's mean", "the prior's scale")
    wide = compute_dtype(mu, *(v for v in (*others, *value) if isinstance(v, Tensor) and v.dim()))
    mean, scale = (_of_mu(name, v, mu, wide) for name, v in zip(names, value))
    spread = [broadcasts(name, v, mu) for name, v in zip(names, (mean, scale))]
    rank = mu.dim() - batch_dims
    shapes = tuple(mean.shape), tuple(scale.shape)
    if not all(holds(n == 1) for shape in shapes for n in shape[: max(len(shape) - rank, 0)]):
        if mean_over is not None:
            raise ValueError(
                "kl_of_mean is defined for a prior without batch axes, one for all samples; got "
                f"a mean and scale of shapes {shapes[0]} and {shapes[1]} for mu of shape "
                f"{tuple(mu.shape)} with batch_dims={batch_dims}: pass kl_of_mean=False"
            )
        mean, scale = (v.expand(mu.shape) if s else v for v, s in zip((mean, scale), spread))
        return "sample", mean, scale
    if mean_over == "all" and not all(holds(n == 1) for shape in shapes for n in shape):
        raise ValueError(
            "mean_over='all' needs a prior of one mean and one scale, got shapes "
            f"{shapes[0]} and {shapes[1]}: pass kl_of_mean=False or mean_over='batch'"
        )
    event = mu.shape[batch_dims:]
    mean, scale = (v.reshape(v.shape[max(v.dim() - rank, 0) :]) for v in (mean, scale))
    mean, scale = (v if alike(v.shape, event) else v.expand(event) for v in (mean, scale))
    return "event", mean, scale


def alike(shape: Sequence[int], other: Sequence[int]) -> bool:
    """Are the shapes the same? Where a program cannot know, it checks when it runs."""
    return len(shape) == len(other) and not any(fails(n == m) for n, m in zip(shape, other))


def holds(condition: Any) -> bool:
    """Is it true of sizes? No where a program being captured cannot know: the data decide."""
    if _is_known(condition):
        return bool(condition)
    # Not before it is needed: it imports sympy.
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return guard_or_false(condition)


def fails(condition: Any) -> bool:
    """Is it false of sizes? Where a program cannot know, it checks when it runs."""
    if _is_known(condition):
        return not condition
    from torch.fx.experimental.symbolic_shapes import guard_or_true

    if guard_or_true(condition):
        torch._check(condition)
        return False
    return True


#: What runs compiled kernels on tensors of the CPU (simulators, tests) puts another in its place.
_interpreting = interpreting


def _is_known(condition: Any) -> bool:
    """A bool, or of torch.jit.trace's sizes a tensor."""
    return not isinstance(condition, torch.SymBool) and not torch.compiler.is_compiling()


def choice(name: str, value: Any, allowed: Sequence[str]) -> str:
    """A string out of a few; as itself, whatever subclass of str was given."""
    if type(value) is str and value in allowed:
        return value
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")
    return allowed[allowed.index(value)]


def flag(name: str, value: Any) -> bool:
    """A bool, NumPy's too."""
    if value is True or value is False:
        return value is True
    if not isinstance(value, np.bool_):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
    return bool(value)


def parameters(x: Operands, batch_dims: Any, prior: str | None = None) -> None:
    """The tensors fit each other, and batch_dims and the kind of prior fit them."""
    mu, logvar, eps, *of_prior = x
    tensor("mu", mu)
    tensor("logvar", logvar)
    _same_shape("logvar", logvar, mu)
    if eps is not None:
        tensor("eps", eps)
        _same_shape("eps", eps, mu)
    integer("batch_dims", batch_dims, 0, mu.dim(), ("mu", mu))
    for name, value in zip(("the prior's mean", "the prior's scale"), of_prior):
        if (value is None) != (prior is None):
            raise ValueError(f"{name} does not fit prior={prior!r} of the spec")
        if value is not None:
            tensor(name, value)
            shape = mu.shape if prior == "sample" else mu.shape[batch_dims:]
            if not alike(value.shape, shape) or value.device != mu.device:
                raise ValueError(
                    f"{name} must have shape {tuple(shape)} on {mu.device}, got "
                    f"{tuple(value.shape)} on {value.device}"
                )


def _same_shape(name: str, value: Tensor, mu: Tensor) -> None:
    if broadcasts(name, value, mu):
        raise ValueError(
            f"{name} must have the shape of mu, {tuple(mu.shape)}; got {tuple(value.shape)}"
        )


def batch_dims(value: Any, mu: Tensor, name: str = "mu") -> int:
    """The number of axes that index samples: 1 unless said, where that leaves an event."""
    if value is None:
        if mu.dim() > 1:
            return 1
        size = "one element" if mu.dim() == 0 else f"{mu.shape[0]} elements"
        raise ValueError(
            f"batch_dims must be given where {name} has fewer than two axes, here shape "
            f"{tuple(mu.shape)}: batch_dims=0 for one observation of {size}"
            + (", batch_dims=1 for as many samples of one element each" if mu.dim() else "")
        )
    return operator.index(integer("batch_dims", value, 0, mu.dim(), (name, mu)))  # no symbol


def moments(value: Any, dim: Any, name: str = "moments") -> int:
    """It has two halves along dim; dim counted from the front."""
    tensor(name, value)
    shape, rank = value.shape, value.dim()
    if rank == 0:
        raise ValueError(f"{name} must have an axis that holds mu and logvar; got shape ()")
    dim = integer("dim", dim, -rank, rank - 1, (name, value))
    if fails(shape[dim] % 2 == 0):
        raise ValueError(
            f"{name} must have an even size along dim={dim}, mu and logvar half each; got "
            f"{shape[dim]} (shape {tuple(shape)})"
        )
    axis: int = operator.index(dim) % rank  # a symbol of torch.compile becomes a constant
    return axis


def integer(
    name: str, value: Any, low: int, high: int, of: tuple[str, Tensor] | None = None
) -> int:
    """An int, NumPy's too, no bool, within [low, high]; `of`: whose shape sets the bounds."""
    number = value
    if not isinstance(value, int) or isinstance(value, bool):
        if isinstance(value, bool | np.bool_ | Tensor) or not hasattr(value, "__index__"):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        try:
            number = operator.index(value)
        except TypeError:  # an array of several, say
            raise TypeError(f"{name} must be an int, got {type(value).__name__}") from None
    if not low <= number <= high:
        why = "" if of is None else f" ({of[0]} has shape {tuple(of[1].shape)})"
        raise ValueError(f"{name} must be in [{low}, {high}]{why}; got {value}")
    checked: int = number
    return checked


def noise(mu: Tensor, eps: Any, generator: Any, seed: Any) -> int | None:
    """At most one source of noise, and one that fits mu; the seed as an int."""
    if (eps is not None) + (generator is not None) + (seed is not None) > 1:
        given = {"eps": eps, "generator": generator, "seed": seed}
        names = [name for name, value in given.items() if value is not None]
        raise ValueError(f"give at most one of eps, generator and seed; got {' and '.join(names)}")
    if eps is not None:
        tensor("eps", eps)
        _same_shape("eps", eps, mu)
    if seed is not None:
        seed = integer("seed", seed, -(2**63), 2**64 - 1)
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
        places = (generator.device, mu.device)
        if places[0].type != places[1].type or (
            None not in (places[0].index, places[1].index) and places[0] != places[1]
        ):
            raise ValueError(
                f"generator must be on the device of mu, {mu.device}; got {generator.device}"
            )
    number: int | None = seed
    return number


def sample_ids(ids: Any, seed: Any, mu: Tensor, batch_dims: int) -> None:
    """One for each sample, of a seed's noise. (Their values are the device's to read.)"""
    if not isinstance(ids, Tensor):
        raise TypeError(f"sample_ids must be a torch.Tensor, got {type(ids).__name__}")
    if ids.dtype != torch.int64:
        raise TypeError(f"sample_ids must have dtype torch.int64, got {ids.dtype}")
    _dense("sample_ids", ids)
    if seed is None:
        raise ValueError("sample_ids says which samples' noise of a seed to draw: give seed, too")
    shape = mu.shape[:batch_dims]
    if not alike(ids.shape, shape):
        raise ValueError(
            f"sample_ids must have the batch shape {tuple(shape)}, of mu {tuple(mu.shape)} with "
            f"batch_dims={batch_dims}; got {tuple(ids.shape)}"
        )
    if ids.device != mu.device:
        raise ValueError(f"sample_ids must be on the device of mu, {mu.device}; got {ids.device}")


def clamp_bounds(
    clamp: Any, inputs: Sequence[Tensor | None] | None = None
) -> tuple[float, float] | None:
    """(lo, hi) as floats; infinite where None, or beyond the range of the dtype computed in.

    None where both are: nothing is clamped.

    `inputs`: the operands, which say the dtype; float64 without them.
    """
    if clamp is None:
        return None
    if isinstance(clamp, np.ndarray):
        clamp = clamp.tolist()
    if not isinstance(clamp, Sequence) or isinstance(clamp, str) or len(clamp) != 2:
        raise TypeError(f"clamp must be a pair (lo, hi) or None, got {clamp!r}")
    # What torch.compile makes of NumPy's scalars is an array.
    clamp = [v.item() if isinstance(v, np.ndarray) and v.ndim == 0 else v for v in clamp]
    for value in clamp:
        if value is not None and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
            raise TypeError(f"clamp bounds must be numbers or None, got {clamp!r}")
    lo, hi = (
        end if value is None else value if isinstance(value, int) else float(value)
        for value, end in zip(clamp, (-math.inf, math.inf))
    )
    if not lo <= hi:
        raise ValueError(f"clamp needs lo <= hi, got {clamp!r}")
    largest = torch.finfo(torch.float64 if inputs is None else compute_dtype(*inputs)).max
    bounds = _within(lo, largest), _within(hi, largest)
    return None if bounds == (-math.inf, math.inf) else bounds


def _within(bound: float, largest: float) -> float:
    """A float, infinite past the largest; an int may be too long for a float of its own."""
    if -largest <= bound <= largest:
        return float(bound)
    return math.inf if bound > 0 else -math.inf


def backend_name(value: Any) -> str:
    """The name of a backend, or "auto"."""
    return choice("backend", value, ("auto", *backends.names()))


def resolve_backend(backend: Any, device: torch.device) -> str:
    """The backend that runs on a device.

    Raises:
        ValueError: an unknown name, or a backend asked for on a device that it cannot use.
        ModuleNotFoundError: what the backend asked for needs is not installed, or does not work.
    """
    if backend == "auto":
        return backends.automatic(device)
    kind: str = device.type
    name: str = backend if type(backend) is str else backend_name(backend)
    problem = backends.problem(name, kind)
    if problem is None or (problem and name == "triton" and _interpreting()):
        return name
    backend_name(name)
    backends.require(name, kind)
    raise ValueError(f"backend={name!r} needs tensors on {problem.format(device)}")
