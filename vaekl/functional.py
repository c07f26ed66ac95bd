"""The public functions: documentation, validation, and the road that a call takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, cast, overload

import torch
from torch import Tensor

from . import _autograd, _broadcast, _calls, _packed, _validate
from ._options import Options
from ._results import CallOptions, Clamp, ReparamKL, Values

if TYPE_CHECKING:
    from typing_extensions import Unpack


@overload
def reparameterize_kl(
    mu: Tensor,
    logvar: Values,
    *,
    kl_of_mean: Literal[True] = ...,
    **options: Unpack[CallOptions],
) -> ReparamKL[Tensor]: ...
@overload
def reparameterize_kl(
    mu: Tensor,
    logvar: Values,
    *,
    kl_of_mean: Literal[False],
    **options: Unpack[CallOptions],
) -> ReparamKL[None]: ...
@overload
def reparameterize_kl(
    mu: Tensor, logvar: Values, *, kl_of_mean: bool, **options: Unpack[CallOptions]
) -> ReparamKL: ...
def reparameterize_kl(
    mu: Tensor,
    logvar: Values,
    *,
    reduction: str = "batchmean",
    kl_of_mean: bool = True,
    mean_over: str = "batch",
    batch_dims: int | None = None,
    eps: Values | None = None,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    clamp: Clamp = None,
    backend: str = "auto",
) -> ReparamKL:
    r"""Sample a diagonal Gaussian posterior and take both KL terms, in one pass.

    With k(m, l) = (m² + e^l − 1 − l) / 2, the KL from N(m, e^l) to N(0, 1) (Kingma & Welling
    2013, appendix B), B samples and D elements per event:

    - ``z = mu + exp(logvar / 2) * eps``
    - ``kl[b] = sum_d k(mu[b, d], logvar[b, d])``, reduced over b; its mean is the ELBO's term
    - ``kl_of_mean = sum_d k(mean_b mu, mean_b logvar) <= mean of kl``: a diagnostic

    Args:
        mu: Means, any shape with the sample axes first; float16, bfloat16, float32 or float64.
            Strided, expanded and channels-last tensors are read in place.
        logvar: Log variances, of a shape that broadcasts to mu's (one per dimension, [D], or per
            sample, [B, 1], or a number for all), on its device. A tensor's gradient has its shape.
        reduction: Of kl. ``"none"``: one per sample, of shape ``mu.shape[:batch_dims]``;
            ``"sum"``; ``"batchmean"``: sum / B; ``"mean"``: sum / (B D).
        kl_of_mean: Whether to compute kl_of_mean; None is returned for it otherwise.
        mean_over: ``"batch"``: parameters are averaged over samples, one mean per event element;
            ``"all"``: over every element, one pair.
        batch_dims: Number of leading axes that index samples. None: 1, where mu has two axes or
            more; for one axis say whether it is one observation (0) or samples of one element (1).
        eps: Noise to use, of a shape that broadcasts to mu's. Gets a gradient if it requires one.
        generator: Source of the noise, on mu's device. Default: torch's own.
        seed: Noise of this seed, a pure function of (seed, b, d); no generator is touched.
            At most one of eps, generator and seed.
        clamp: (lo, hi) bounds on logvar as in torch.clamp, for z and both KLs; the gradient of
            logvar is 0 at the bounds and beyond (as torch.clamp's since torch 2.14, which before
            was 1 at the bounds). None or infinity is no bound on that side; one too large for the
            dtype of the KLs is infinite.
        backend: ``"auto"``, ``"triton"``, ``"cpu"`` or ``"eager"``.

    Returns:
        :class:`ReparamKL` (z, kl, kl_of_mean). z has the dtype of ``mu + std * eps``; the KLs
        are float32, or float64 if any input is, in nats.

    Raises:
        TypeError: An argument of the wrong type or dtype.
        ValueError: A shape, device, option or combination that does not fit.
        ModuleNotFoundError: A backend asked for by name is not installed, or cannot run.
    """
    reduction = _validate.choice("reduction", reduction, _validate.REDUCTIONS)
    mean_over = _validate.choice("mean_over", mean_over, _validate.MEANS_OVER)
    kl_of_mean = _validate.flag("kl_of_mean", kl_of_mean)
    results: Any = compute(
        mu,
        logvar,
        reduction=reduction,
        mean_over=mean_over if kl_of_mean else None,
        batch_dims=batch_dims,
        sample=True,
        noise=(eps, generator, seed),
        clamp=clamp,
        backend=backend,
    )
    return ReparamKL(*results)


@overload
def reparameterize_kl_moments(
    moments: Tensor,
    *,
    dim: int = ...,
    kl_of_mean: Literal[True] = ...,
    **options: Unpack[CallOptions],
) -> ReparamKL[Tensor]: ...
@overload
def reparameterize_kl_moments(
    moments: Tensor, *, dim: int = ..., kl_of_mean: Literal[False], **options: Unpack[CallOptions]
) -> ReparamKL[None]: ...
@overload
def reparameterize_kl_moments(
    moments: Tensor, *, dim: int = ..., kl_of_mean: bool, **options: Unpack[CallOptions]
) -> ReparamKL: ...
def reparameterize_kl_moments(
    moments: Tensor,
    *,
    dim: int = 1,
    reduction: str = "batchmean",
    kl_of_mean: bool = True,
    mean_over: str = "batch",
    batch_dims: int | None = None,
    eps: Values | None = None,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    clamp: Clamp = None,
    backend: str = "auto",
) -> ReparamKL:
    """:func:`reparameterize_kl` of ``mu, logvar = moments.chunk(2, dim)``, as an encoder's last
    layer gives them; the same result.

    Both halves are read where they are, and backward writes one gradient tensor of the layout of
    moments: no cat, and no zeros to add halves to. (Second derivatives, by create_graph, take
    plain torch operations.)

    Args:
        moments: mu and logvar, the halves along dim, of any shape and layout; float16, bfloat16,
            float32 or float64.
        dim: The axis of moments that holds mu, then logvar; negative counts from the end.
        eps: As in :func:`reparameterize_kl`, of the shape of one half.
        reduction, kl_of_mean, mean_over, batch_dims, generator, seed, clamp, backend: As in
            :func:`reparameterize_kl`; batch_dims counts axes of mu, which are those of moments.

    Returns:
        :class:`ReparamKL` (z, kl, kl_of_mean) as from :func:`reparameterize_kl`; z has the shape
        of one half.

    Raises:
        TypeError: An argument of the wrong type or dtype.
        ValueError: An odd size along dim; a shape, device, option or combination that does not fit.
        ModuleNotFoundError: A backend asked for by name is not installed, or cannot run.
    """
    reduction = _validate.choice("reduction", reduction, _validate.REDUCTIONS)
    mean_over = _validate.choice("mean_over", mean_over, _validate.MEANS_OVER)
    kl_of_mean = _validate.flag("kl_of_mean", kl_of_mean)
    results: Any = compute_moments(
        moments,
        dim=dim,
        reduction=reduction,
        mean_over=mean_over if kl_of_mean else None,
        batch_dims=batch_dims,
        noise=(eps, generator, seed),
        clamp=clamp,
        backend=backend,
    )
    return ReparamKL(*results)


def reparameterize(
    mu: Tensor,
    logvar: Values,
    *,
    eps: Values | None = None,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    clamp: Clamp = None,
    backend: str = "auto",
) -> Tensor:
    """``z = mu + exp(logvar / 2) * eps`` (Kingma & Welling 2013), of mu's shape.

    Arguments and errors as in :func:`reparameterize_kl`. The first axis indexes samples, which
    matters for the noise of a seed alone.
    """
    z = compute(
        mu,
        logvar,
        batch_dims=min(1, mu.dim()) if isinstance(mu, Tensor) else None,
        sample=True,
        noise=(eps, generator, seed),
        clamp=clamp,
        backend=backend,
    )[0]
    return cast(Tensor, z)


def kl_loss(
    mu: Tensor,
    logvar: Values,
    *,
    reduction: str = "batchmean",
    batch_dims: int | None = None,
    clamp: Clamp = None,
    backend: str = "auto",
) -> Tensor:
    """KL from N(mu, exp(logvar)) to N(0, I) in nats: float32, or float64 for float64 inputs.

    Arguments, formula and errors as in :func:`reparameterize_kl`; shape ``mu.shape[:batch_dims]``
    for ``reduction="none"``, else a scalar.
    """
    reduction = _validate.choice("reduction", reduction, _validate.REDUCTIONS)
    kl = compute(
        mu, logvar, reduction=reduction, batch_dims=batch_dims, clamp=clamp, backend=backend
    )[1]
    return cast(Tensor, kl)


def kl_of_mean(
    mu: Tensor,
    logvar: Values,
    *,
    mean_over: str = "batch",
    batch_dims: int | None = None,
    clamp: Clamp = None,
    backend: str = "auto",
) -> Tensor:
    """KL of the mean parameters to N(0, I) in nats, a scalar; never above the mean of the KLs.

    Arguments, formula and errors as in :func:`reparameterize_kl`. A diagnostic of how alike the
    codes of a batch are, not the ELBO's term.
    """
    mean_over = _validate.choice("mean_over", mean_over, _validate.MEANS_OVER)
    of_mean = compute(
        mu, logvar, mean_over=mean_over, batch_dims=batch_dims, clamp=clamp, backend=backend
    )[2]
    return cast(Tensor, of_mean)


def compute(
    mu: Tensor,
    logvar: Any,
    *,
    reduction: str | None = None,
    mean_over: str | None = None,
    batch_dims: int | None,
    sample: bool = False,
    noise: tuple[Any, torch.Generator | None, int | None] = (None, None, None),
    clamp: Clamp,
    backend: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Validate tensors, noise and clamp, then (z, kl, kl_of_mean).

    Each only if asked for: kl by reduction, kl_of_mean by mean_over, z by sample.
    """
    eps, generator, seed = noise
    z_dtype = None
    is_plain = mu is not None and logvar is not None and _autograd.is_plain(mu, logvar, eps)
    if not (is_plain and _broadcast.is_like(mu, logvar, eps)):
        logvar, eps, z_dtype = _broadcast.to_mu(mu, logvar, eps)
        is_plain = _autograd.is_plain(mu, logvar, eps)
    if not is_plain or type(batch_dims) is not int:  # else checked for a new kind of calls
        batch_dims = _validate.batch_dims(batch_dims, mu)
    if eps is not None or generator is not None or seed is not None:
        seed = _validate.noise(mu, eps, generator, seed)
    if clamp is not None:
        clamp = _validate.clamp_bounds(clamp, (mu, logvar, eps))
    options = Options(reduction, mean_over, sample, batch_dims, clamp)
    backend = _validate.resolve_backend(backend, mu.device)
    if is_plain:
        call = _calls.find(mu, logvar, eps, options, backend)
        results = _autograd.direct(call, mu, logvar, eps, generator, seed)
    else:
        results = _autograd.indirect(mu, logvar, eps, generator, seed, options, backend)
    if z_dtype is not None and results[0] is not None:
        results = results[0].to(z_dtype), results[1], results[2]
    return results


def compute_moments(
    moments: Tensor,
    *,
    dim: int,
    reduction: str | None = None,
    mean_over: str | None = None,
    batch_dims: int | None = None,
    noise: tuple[Values | None, torch.Generator | None, int | None] = (None, None, None),
    clamp: Clamp,
    backend: str,
    sample: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """:func:`compute` of the halves of moments along dim."""
    dim = _validate.moments(moments, dim)
    batch_dims = _validate.batch_dims(batch_dims, moments, "moments")
    given, generator, seed = noise
    half, eps, z_dtype = moments, None, None
    if given is not None:
        half, other = _packed.halves(moments, dim)
        _, eps, z_dtype = _broadcast.to_mu(half, other, given)
    seed = _validate.noise(half, eps, generator, seed)
    bounds = _validate.clamp_bounds(clamp, (moments, moments, eps))
    options = Options(reduction, mean_over, sample, batch_dims, bounds)
    backend = _validate.resolve_backend(backend, moments.device)
    z, kl, kl_of_mean = _packed.reparameterize_kl_moments(
        moments, eps, generator, seed, dim, options, backend
    )
    return z if z is None or z_dtype is None else z.to(z_dtype), kl, kl_of_mean
