"""The public functions: documentation, validation, and the road that a call takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast, overload

import torch
from torch import Tensor

from . import _ops, _roads, _validate, backends
from ._noise import signed64
from ._spec import (
    CallOptions,
    Clamp,
    Operands,
    Prior,
    ReparamKL,
    Source,
    Spec,
    Terms,
    Values,
    halves,
)

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
    sample_ids: Tensor | None = None,
    scale: str = "logvar",
    prior: Prior = None,
    clamp: Clamp = None,
    backend: str = "auto",
) -> ReparamKL:
    r"""Sample a diagonal Gaussian posterior and take both KL terms, in one pass.

    With k(m, l) = (m² + e^l − 1 − l) / 2, the KL from N(m, e^l) to N(0, 1) (Kingma & Welling
    2013, appendix B), B samples and D elements per event:

    - ``z = mu + exp(logvar / 2) * eps``
    - ``kl[b] = sum_d k(mu[b, d], logvar[b, d])``, reduced over b; its mean is the ELBO's term
    - ``kl_of_mean = sum_d k(mean_b mu, mean_b logvar) <= mean of kl``: a diagnostic

    Against a prior N(m', e^l') it is k(m, l) = ((m − m')² e^−l' + e^r − 1 − r) / 2, r = l − l'.

    Args:
        mu: Means, any shape with the sample axes first; float16, bfloat16, float32 or float64.
            Strided, expanded and channels-last tensors are read in place.
        logvar: Log variances, or what ``scale`` says, of a shape that broadcasts to mu's (one per
            dimension, [D], or per sample, [B, 1], or a number for all), on its device. A tensor's
            gradient has its shape.
        reduction: Of kl. ``"none"``: one per sample, of shape ``mu.shape[:batch_dims]``;
            ``"sum"``; ``"batchmean"``: sum / B; ``"mean"``: sum / (B D); ``"per_dim"``: the mean
            over the batch of each element of an event, of shape ``mu.shape[batch_dims:]``: free
            bits and the like are a line of it (docs/recipes.md).
        kl_of_mean: Whether to compute kl_of_mean; None is returned for it otherwise.
        mean_over: ``"batch"``: parameters are averaged over samples, one mean per event element;
            ``"all"``: over every element, one pair.
        batch_dims: Number of leading axes that index samples. None: 1, where mu has two axes or
            more; for one axis say whether it is one observation (0) or samples of one element (1).
        eps: Noise to use, of a shape that broadcasts to mu's. Gets a gradient if it requires one.
        generator: Source of the noise, on mu's device. Default: torch's own.
        seed: Noise of this seed, −2⁶³ ≤ seed < 2⁶⁴: a pure function of (seed, b, d), as
            docs/noise.md says; no generator is touched. At most one of eps, generator and seed.
        sample_ids: With ``seed``: which sample's noise each row gets, int64 of shape
            ``mu.shape[:batch_dims]``, such as indices of a data set: a shard, a shuffled batch or
            a single sample draws what it would anywhere else. None: ``arange(B)``. Not negative,
            and below 2⁶³ / ⌈D / 4⌉; neither is checked.
        scale: What the second argument is: ``"logvar"`` l; ``"log_std"`` s, l = 2 s; ``"std"`` s,
            l = 2 ln s; ``"var"`` v, l = ln v. Where s or v is 0 or less, the KLs are what torch
            makes of its logarithm, inf or NaN; z without clamp takes any s as it is. kl_of_mean is
            of the means of mu and l, whatever the form.
        prior: (mean, scale) of the Gaussian that the KLs are to, its scale in the same form;
            tensors on mu's device that broadcast to mu, or numbers. None is N(0, I). Each gets a
            gradient of its shape if it requires one. With kl_of_mean it may have no batch axis
            (one prior for all samples), and for mean_over="all" is one number each.
        clamp: (lo, hi) bounds on the posterior's l, in every form, as in torch.clamp, for z and
            both KLs; the gradient of logvar is 0 at the bounds and beyond (as torch.clamp's since
            torch 2.14, which before was 1 at the bounds). None or infinity is no bound on that
            side; one too large for the dtype of the KLs is infinite.
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
    terms = Terms(True, reduction, mean_over if kl_of_mean else None)
    source = _of_torch
    if generator is not None or seed is not None or sample_ids is not None:
        source = source_of(generator, seed, sample_ids)
    given: Any = Operands(mu, logvar, eps)  # type: ignore[arg-type]
    results: Any = compute(given, source, terms, batch_dims, scale, clamp, backend, prior)
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
    sample_ids: Tensor | None = None,
    scale: str = "logvar",
    prior: Prior = None,
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
        reduction, kl_of_mean, mean_over, batch_dims, generator, seed, sample_ids, scale, prior,
            clamp, backend: As in :func:`reparameterize_kl`; batch_dims counts axes of mu, which are
            those of moments, and a prior broadcasts to one half.

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
    terms = Terms(True, reduction, mean_over if kl_of_mean else None)
    given, source = Packed(moments, dim, eps), source_of(generator, seed, sample_ids)
    results: Any = compute_moments(given, source, terms, batch_dims, scale, clamp, backend, prior)
    return ReparamKL(*results)


def reparameterize(
    mu: Tensor,
    logvar: Values,
    *,
    eps: Values | None = None,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    sample_ids: Tensor | None = None,
    scale: str = "logvar",
    clamp: Clamp = None,
    backend: str = "auto",
) -> Tensor:
    """``z = mu + exp(logvar / 2) * eps`` (Kingma & Welling 2013), of mu's shape.

    Arguments and errors as in :func:`reparameterize_kl`. The first axis indexes samples, which
    matters for the noise of a seed alone.
    """
    batch_dims = min(1, mu.dim()) if isinstance(mu, Tensor) else None
    given: Any = Operands(mu, logvar, eps)  # type: ignore[arg-type]
    source = source_of(generator, seed, sample_ids)
    z = compute(given, source, Terms(sample=True), batch_dims, scale, clamp, backend)[0]
    return cast(Tensor, z)


def kl_loss(
    mu: Tensor,
    logvar: Values,
    *,
    reduction: str = "batchmean",
    batch_dims: int | None = None,
    scale: str = "logvar",
    prior: Prior = None,
    clamp: Clamp = None,
    backend: str = "auto",
) -> Tensor:
    """KL from N(mu, exp(logvar)) to N(0, I), or to ``prior``, in nats: float32, or float64 for
    float64 inputs.

    Arguments, formula and errors as in :func:`reparameterize_kl`; shape ``mu.shape[:batch_dims]``
    for ``reduction="none"``, ``mu.shape[batch_dims:]`` for ``"per_dim"``, else a scalar.
    """
    reduction = _validate.choice("reduction", reduction, _validate.REDUCTIONS)
    terms = Terms(reduction=reduction)
    given: Any = Operands(mu, logvar)  # type: ignore[arg-type]
    kl = compute(given, _of_torch, terms, batch_dims, scale, clamp, backend, prior)[1]
    return cast(Tensor, kl)


def kl_of_mean(
    mu: Tensor,
    logvar: Values,
    *,
    mean_over: str = "batch",
    batch_dims: int | None = None,
    scale: str = "logvar",
    prior: Prior = None,
    clamp: Clamp = None,
    backend: str = "auto",
) -> Tensor:
    """KL of the mean parameters to N(0, I) or ``prior`` in nats, a scalar; never above the mean of
    the KLs.

    Arguments, formula and errors as in :func:`reparameterize_kl`. A diagnostic of how alike the
    codes of a batch are, not the ELBO's term.
    """
    mean_over = _validate.choice("mean_over", mean_over, _validate.MEANS_OVER)
    terms = Terms(mean_over=mean_over)
    given: Any = Operands(mu, logvar)  # type: ignore[arg-type]
    of_mean = compute(given, _of_torch, terms, batch_dims, scale, clamp, backend, prior)[2]
    return cast(Tensor, of_mean)


_of_torch = Source()


def source_of(generator: Any, seed: Any, sample_ids: Any) -> Source:
    """As a caller gives it."""
    return Source(generator, seed, sample_ids, None if sample_ids is None else "ids")


class Packed(NamedTuple):
    """Parameters that are the halves of one tensor, and noise, as a caller gives them."""

    moments: Tensor
    dim: int
    eps: Any = None


def compute(
    given: Operands,
    source: Source,
    terms: Terms,
    batch_dims: int | None,
    scale: str,
    clamp: Clamp,
    backend: str,
    prior: Prior = None,
) -> _ops.Results:
    """Validate, then (z, kl, kl_of_mean), None for what the terms do not ask for.

    `given`: the operands as a caller gives them, numbers and smaller tensors among them.
    """
    mu, logvar, eps, *_ = given
    z_dtype = kind = None
    # is_direct denies what is no tensor; None it passes, which eps alone may be.
    road: _roads.Road = "direct"
    if (
        mu is None
        or logvar is None
        or not _roads.is_direct(mu, logvar, eps)
        or logvar.shape != mu.shape
        or (eps is not None and eps.shape != mu.shape)
    ):
        logvar, eps, z_dtype = _validate.broadcast(mu, logvar, eps)
        given = Operands(mu, logvar, eps)
        road = _roads.road(mu, logvar, eps)
    if (
        prior is not None
        or source[2] is not None
        or road != "direct"
        or type(batch_dims) is not int
    ):
        # Else once a kind, by _plans.
        batch_dims = _validate.batch_dims(batch_dims, mu)
    form = scale if scale == "logvar" else _validate.choice("scale", scale, _validate.SCALES)
    if prior is not None and not _validate.is_standard(prior, form):
        kind = _plain_prior(prior, mu, batch_dims, terms[2]) if road == "direct" else None
        if kind is not None:
            given = Operands(mu, logvar, eps, *prior)  # type: ignore[arg-type]
        else:
            kind, *pair = _validate.prior(prior, mu, (logvar, eps), batch_dims, terms.mean_over)
            given = Operands(mu, logvar, eps, *pair)
            road = _roads.road(*given)
    generator, seed, samples, _ = source  # any() takes longer than the three questions
    if eps is not None or generator is not None or seed is not None or samples is not None:
        source = _checked(mu, eps, source, batch_dims)
        if not terms.sample:
            source = _of_torch
        elif samples is not None:
            road = _roads.road(*given, source.samples)
    bounds = None if clamp is None else _validate.clamp_bounds(clamp, given)
    known = backends.chosen.get(mu.device) if road == "direct" and backend == "auto" else None
    backend = known or _validate.resolve_backend(backend, mu.device)
    sample, reduction, mean_over, log_prob = terms
    has_eps = eps is not None
    spec = Spec(
        sample, reduction, mean_over, batch_dims, form, bounds, backend, has_eps, None, kind,
        source.kind, log_prob,
    )  # fmt: skip
    results = _ops.run(road, spec, given, source)
    return results if z_dtype is None else _cast(results, z_dtype)


def _plain_prior(prior: Any, mu: Tensor, batch_dims: Any, mean_over: str | None) -> str | None:
    """Its kind, if it is two plain tensors of the shape of mu or of an event.

    The rest of it is checked once a kind, by _plans.
    """
    if not isinstance(prior, tuple | list) or len(prior) != 2 or mean_over == "all":
        return None
    mean, scale = prior
    if mean is None or scale is None or not _roads.is_direct(mean, scale):
        return None
    if mean.shape != scale.shape or mean.dim() == 0:  # numbers take mu's device, and its dtype
        return None
    if mean.shape == mu.shape[batch_dims:]:
        return "event"
    return "sample" if mean_over is None and mean.shape == mu.shape else None


def compute_moments(
    packed: Packed,
    source: Source,
    terms: Terms,
    batch_dims: int | None,
    scale: str,
    clamp: Clamp,
    backend: str,
    prior: Prior = None,
) -> _ops.Results:
    """:func:`compute` of the halves of moments along dim."""
    moments = packed.moments
    dim = _validate.moments(moments, packed.dim)
    batch_dims = _validate.batch_dims(batch_dims, moments, "moments")
    form = _validate.choice("scale", scale, _validate.SCALES)
    half, eps, z_dtype, kind = moments, None, None, None
    of_prior: tuple[Tensor | None, ...] = (None, None)
    prior = None if prior is None or _validate.is_standard(prior, form) else prior
    if packed.eps is not None or prior is not None or source.kind == "ids":
        half, other = halves(moments, dim)
    if prior is not None:
        kind, *pair = _validate.prior(prior, half, (packed.eps,), batch_dims, terms.mean_over)
        of_prior = tuple(pair)
    if packed.eps is not None:
        _, eps, z_dtype = _validate.broadcast(half, other, packed.eps)
    source = _checked(half, eps, source, batch_dims)
    storage: Any = (moments, None, eps, *of_prior)
    bounds = _validate.clamp_bounds(clamp, storage)
    road = _roads.road(*storage, source.samples)
    backend = _validate.resolve_backend(backend, moments.device)
    has_eps = eps is not None
    spec = Spec(*terms[:3], batch_dims, form, bounds, backend, has_eps, dim, kind, source.kind)
    return _cast(_ops.run(road, spec, storage, source), z_dtype)


def _checked(mu: Tensor, eps: Tensor | None, source: Source, batch_dims: int | None) -> Source:
    """The source, if it is one and fits mu; the seed as an int64."""
    generator, given, samples, kind = source
    if kind == "ids":
        _validate.sample_ids(samples, given, mu, _validate.batch_dims(batch_dims, mu))
    if type(given) is int and 0 <= given < 1 << 63 and eps is None and generator is None:
        return source  # as most are
    seed = _validate.noise(mu, eps, generator, given)
    if seed is None or (seed is given and seed < 1 << 63):
        return source
    return Source(None, signed64(seed), samples, kind)


def _cast(results: _ops.Results, z_dtype: torch.dtype | None) -> _ops.Results:
    """With z in the dtype that it is to have, if it has not."""
    if z_dtype is None or results[0] is None:
        return results
    return results[0].to(z_dtype), results[1], results[2]
