"""Input factories, a step forward and back, and the error budget, for tests and benchmarks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .backends.layout import Config
from .reference import SCALES, Array, Oracle, to_numpy
from .reference.arrays import unbroadcast

#: Largest relative error of a KL, by the dtype of the computation.
KL_BUDGET = {torch.float32: 5e-7, torch.float64: 1e-13}
#: Largest absolute error of eps drawn in float32; float64 draws are exact to rounding.
EPS_BUDGET = {torch.float32: 2e-6, torch.float64: 1e-14}

#: Block choices so small that a few elements make several programs along both axes, with and
#: without several blocks per program; "default" is what users get.
CONFIGS = {
    "default": Config(),
    "many": Config(tile=32, max_cols=8, small=0, programs=12),
    "loops": Config(tile=16, max_cols=8, small=0, programs=6),
}


def make_inputs(
    shape: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    logvar_dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    scale: float = 1.0,
    layout: str = "contiguous",
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Random mu, logvar of a layout: one of :data:`LAYOUTS`."""
    generator = torch.Generator().manual_seed(seed)
    pair = []
    for kind in (dtype, logvar_dtype or dtype):
        values = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        pair.append(values.to(device, kind))
    return LAYOUTS[layout](pair[0], pair[1])


def _halves(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    """Both from one tensor, side by side along the last axis."""
    packed = torch.cat([mu, logvar], dim=-1)
    width = mu.shape[-1]
    return packed[..., :width], packed[..., width:]


def _transposed(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    """The last axis varies slowest in memory."""
    return mu.movedim(-1, 0).contiguous().movedim(0, -1), logvar


def _channels_last(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    """Axis 1 varies fastest in memory; needs three axes or more to differ."""
    return tuple(t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (mu, logvar))  # type: ignore[return-value]


def _expanded(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    """One logvar for every position of axis 1: stride 0."""
    return mu, logvar[:, :1].expand_as(logvar)


def _steps(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    """Every second element along every axis: needs a copy beyond three axes."""
    pair = []
    for t in (mu, logvar):
        wide = t.new_zeros([2 * n for n in t.shape])
        view = wide[tuple(slice(None, None, 2) for _ in t.shape)]
        pair.append(view.copy_(t))
    return pair[0], pair[1]


LAYOUTS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "contiguous": lambda mu, logvar: (mu, logvar),
    "halves": _halves,
    "transposed": _transposed,
    "channels_last": _channels_last,
    "expanded": _expanded,
    "steps": _steps,
}


class Step(NamedTuple):
    """What a forward and a backward gave."""

    #: What the function returned.
    outputs: Any
    #: Gradients handed to the outputs; None for those that are not used or need none.
    upstream: tuple[Tensor | None, ...]
    #: Gradients of the inputs; None for those that need none.
    gradients: tuple[Tensor | None, ...]

    @property
    def tensors(self) -> list[Tensor]:
        """The outputs, then the gradients; those that there are."""
        return [t for t in (*_listed(self.outputs), *self.gradients) if t is not None]


def _listed(outputs: Any) -> tuple[Tensor | None, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def step(
    function: Callable[..., Any],
    inputs: Sequence[Tensor | None],
    upstream: Sequence[Tensor | None] | None = None,
    *,
    needs: Sequence[bool] | None = None,
) -> Step:
    """Forward, and backward from an upstream gradient of every output.

    Args:
        function: Of as many arguments as there are inputs; returns a tensor, or several and None.
        inputs: Tensors of any layout, or None. The function gets leaves in the same memory.
        upstream: Gradients of the outputs, None for an output that is not used. By default random:
            for outputs of the same shapes always the same ones, on any device, and no generator
            of torch's is touched.
        needs: Which inputs need gradients; by default all of them.
    """
    leaves = [
        None if t is None else t.detach().requires_grad_(need)
        for t, need in zip(inputs, [True] * len(inputs) if needs is None else needs, strict=True)
    ]
    outputs = function(*leaves)
    if upstream is None:
        upstream = random_upstream(outputs)
    pairs = list(zip(_listed(outputs), upstream, strict=True))
    pairs = [(o, g if o is not None and o.requires_grad else None) for o, g in pairs]
    used = [(o, g) for o, g in pairs if o is not None and g is not None]
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    found = iter(torch.autograd.grad([o for o, _ in used], wanted, [g for _, g in used]))
    gradients = (next(found) if t is not None and t.requires_grad else None for t in leaves)
    return Step(outputs, tuple(g for _, g in pairs), tuple(gradients))


def random_upstream(outputs: Any) -> list[Tensor | None]:
    """A gradient for each output, as :func:`step` takes them by default; None beside None."""
    generator = torch.Generator().manual_seed(1)
    return [
        None if o is None else torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o)
        for o in _listed(outputs)
    ]


def unit(dtype: torch.dtype) -> float:
    """The unit roundoff: half an ulp, relative."""
    return float(torch.finfo(dtype).eps) / 2


def kl_of_mean_bound(oracle: Oracle, dtype: torch.dtype) -> Array:
    """Absolute error allowed: the KL budget, and what rounding in the batch means can do.

    A mean of n terms is good to a few units e of the mean of |terms|, however much they cancel:

        |k(m + e, l) - k(m, l)| <= (|d| e + e^2 / 2) e^-l'
        |k(m, l + e) - k(m, l)| <= (|e^r - 1| e + e^r e^2 / 2) / 2, to its second order

    where the squares are all that there is if the terms cancel. (d, r, l': of ``Pair``.)
    """
    pair = oracle.pair_of_mean
    of_mu, of_logvar = (8 * unit(dtype) * size for size in _mean_sizes(oracle))
    with np.errstate(all="ignore"):
        slope_mu = (np.abs(pair.distance) + 0.5 * of_mu) * pair.weight
        slope_logvar = np.abs(pair.expm1) + 0.5 * (1.0 + pair.expm1) * of_logvar
        rounding = np.sum(slope_mu * of_mu + 0.5 * slope_logvar * of_logvar)
    exact: Array = KL_BUDGET[dtype] * oracle.kl_of_mean + rounding
    return exact


def _mean_sizes(oracle: Oracle) -> tuple[Array, Array]:
    """Means of |mu| and |logvar| along the axes of the oracle's means, as its pair_of_mean."""
    sizes = Oracle(
        np.abs(oracle.mu),
        np.abs(oracle.posterior_logvar),
        mean_over=oracle.mean_over,
        batch_dims=oracle.batch_dims,
    )
    shape = oracle.pair_of_mean.expm1.shape
    of_mu, of_logvar = (mean.reshape(shape) for mean in sizes.means)
    return of_mu, of_logvar


def _gradient_sizes(oracle: Oracle, dz: Any, dkl: Any, dkl_of_mean: Any) -> dict[str, Array]:
    """Sums of |terms| of the oracle's gradients."""
    shape, form = oracle.mu.shape, SCALES[oracle.scale]
    prior = None
    if oracle.prior is not None:
        mean, scale = (np.broadcast_to(t, shape) for t in oracle.prior_pair)
        prior = mean, scale
    eps = None if oracle.eps is None else np.abs(oracle.eps)
    each = replace(oracle, eps=eps, prior=prior)
    upstream = [None if g is None else np.abs(to_numpy(g)) for g in (dz, dkl)]
    sizes = each.gradients(upstream[0])
    with np.errstate(all="ignore"):
        slope, prior_slope = (np.abs(form.slope(s)) for s in (oracle.logvar, each.prior_pair[1]))
    if upstream[1] is not None:
        for name, values in each.gradients(dkl=upstream[1]).items():
            sizes[name] = sizes[name] + np.abs(values)
        if prior is not None:  # of d^2 e^-l' + e^r - 1 the second may be negative
            of_logvar = each.of_elements(upstream[1]) * np.abs(each.pair.expm1)
            sizes["dprior_scale"] = sizes["dprior_scale"] + of_logvar * prior_slope
    if dkl_of_mean is not None:
        pair, (of_mu, of_logvar) = oracle.pair_of_mean, _mean_sizes(oracle)
        h = np.abs(to_numpy(dkl_of_mean)) / (oracle.mu.size / max(pair.expm1.size, 1))
        of_mu = h * np.maximum(of_mu, np.abs(pair.distance)) * pair.weight
        of_logvar = 0.5 * h * (1.0 + pair.expm1) * np.maximum(of_logvar, np.abs(pair.expm1))
        sizes["dmu"] = sizes["dmu"] + of_mu
        sizes["dlogvar"] = sizes["dlogvar"] + of_logvar * slope
        if prior is not None:
            of_both = np.abs(pair.distance) * of_mu + of_logvar
            sizes["dprior_mean"] = sizes["dprior_mean"] + of_mu
            sizes["dprior_scale"] = sizes["dprior_scale"] + of_both * prior_slope
    if oracle.prior is not None:
        for name, of in zip(("dprior_mean", "dprior_scale"), oracle.prior_pair):
            sizes[name] = unbroadcast(np.broadcast_to(sizes[name], shape), of.shape)
    return sizes


def gradient_bounds(
    oracle: Oracle,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    dz: Any = None,
    dkl: Any = None,
    dkl_of_mean: Any = None,
    *,
    drawn: bool = False,
) -> dict[str, Array]:
    """Absolute errors allowed in what ``oracle.gradients`` gives, element by element.

    8 units of the computation's dtype on the sum of |terms|, one ulp of the output dtype, and
    the output's smallest step, and the noise's own budget where it was drawn.
    """
    sizes = _gradient_sizes(oracle, dz, dkl, dkl_of_mean)
    bounds = {}
    for name, values in oracle.gradients(dz, dkl, dkl_of_mean).items():
        bound = 8 * unit(dtype) * sizes[name] + 2 * unit(out_dtype) * np.abs(values)
        bounds[name] = bound + torch.finfo(out_dtype).smallest_normal * 2 * unit(out_dtype)
    if drawn and dz is not None:
        with np.errstate(all="ignore"):
            slope = np.abs(SCALES[oracle.scale].std_slope(oracle.logvar))
            noise = np.abs(to_numpy(dz)) * slope * EPS_BUDGET[dtype]
        bounds["dlogvar"] = bounds["dlogvar"] + noise
    return bounds


def worst(actual: Any, expected: Array, bound: Any) -> float:
    """Largest error / bound; 0 where both are equal, NaN and inf included.

    The error of a finite value is |actual - expected|, where ``expected`` is past the range of the
    tensor's dtype too. An inf stands for every value that rounds to it, so its error is what
    ``expected`` lacks of the least of them: half an ulp above the largest finite value.
    """
    info = torch.finfo(actual.dtype if isinstance(actual, Tensor) else torch.float64)
    half_ulp = info.max / (2 - info.eps) * info.eps / 2  # of the largest finite value
    actual = to_numpy(actual)
    with np.errstate(all="ignore"):
        lacking = np.maximum(info.max - np.sign(actual) * expected + half_ulp, 0.0)
        error = np.where(np.isinf(actual), lacking, np.abs(actual - expected))
        error = np.where(np.isnan(actual) & np.isnan(expected), 0.0, error)
        ratio = np.where((error == 0) | (actual == expected), 0.0, error / bound)
    return float(np.max(np.where(np.isnan(ratio), np.inf, ratio), initial=0.0))


def large_operators(call: Callable[[], Any], elements: int) -> list[tuple[str, int]]:
    """Operators of a call on tensors of at least so many elements, as torch's profiler sees them.

    In order, each its name (without ``aten::``) and the bytes that it allocated itself. Those that
    make a tensor of so many float32 are among them.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(
        activities=activities, record_shapes=True, profile_memory=True, acc_events=True
    ) as profile:
        call()
    found = []
    for event in profile.events():
        shapes = [s for s in event.input_shapes if s and all(isinstance(n, int) for n in s)]
        largest = max((math.prod(s) for s in shapes), default=0)
        allocated = max(event.self_cpu_memory_usage, event.self_device_memory_usage, 0)
        if event.name.startswith("aten::") and max(largest, allocated // 4) >= elements:
            found.append((event.name.removeprefix("aten::"), allocated))
    return found
