"""Everything vaekl computes of a batch, with its gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from .arrays import Array, divide, to_numpy, total, unbroadcast
from .gaussian import SCALES, Pair, Scale

_LOG_2_PI = float(np.log(2.0 * np.pi))


@dataclass(frozen=True)
class Oracle:
    """In float64, for mu, logvar, eps of one shape.

    Options as in ``vaekl.reparameterize_kl``; ``eps`` may be None where z is not asked for.

    Args:
        logvar: The scale of the posterior, in the form that ``scale`` names.
        scale: ``"logvar"``, ``"log_std"``, ``"std"`` or ``"var"``: the posterior's and the prior's.
        prior: (mean, scale), arrays or numbers that broadcast to mu; None is N(0, I). Without batch
            axes where kl_of_mean is asked for; one number each for mean_over="all".
        reduction: ``"per_dim"`` is the mean over the batch of each element's KL.
        clamp: Bounds on the posterior's logvar in every form of the scale.
        path_derivative: Of log_q, with the parameters of q held (Roeder et al. 2017).
    """

    mu: Array
    logvar: Array
    eps: Array | None = None
    reduction: str = "batchmean"
    mean_over: str = "batch"
    batch_dims: int = 1
    clamp: tuple[float, float] | None = None
    scale: str = "logvar"
    prior: tuple[Any, Any] | None = None
    path_derivative: bool = False

    def __post_init__(self) -> None:
        for name in ("mu", "logvar", "eps"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, to_numpy(value))

    @property
    def _batch(self) -> int:
        return int(np.prod(self.mu.shape[: self.batch_dims], dtype=np.int64))

    @property
    def _event(self) -> tuple[int, ...]:
        return self.mu.shape[self.batch_dims :]

    def _rows(self, values: Array) -> Array:
        return values.reshape(self._batch, math.prod(self._event))

    @property
    def _form(self) -> Scale:
        return SCALES[self.scale]

    @property
    def prior_pair(self) -> tuple[Array, Array]:
        """Its mean and scale, of their own shapes."""
        mean, scale = (0.0, self._form.one) if self.prior is None else self.prior
        return to_numpy(mean), to_numpy(scale)

    @property
    def _inside(self) -> Array:
        """Where clamp has a gradient: between its bounds, of which an infinite one is none."""
        lo, hi = self.clamp or (-np.inf, np.inf)
        with np.errstate(all="ignore"):
            logvar = self._form.logvar(self.logvar)
        above = (logvar > lo) | (np.isneginf(lo) & ~np.isnan(logvar))
        inside: Array = above & ((logvar < hi) | np.isposinf(hi))
        return inside

    @property
    def posterior_logvar(self) -> Array:
        """The posterior's logvar, within its bounds."""
        with np.errstate(all="ignore"):
            logvar = self._form.logvar(self.logvar)
        return logvar if self.clamp is None else np.clip(logvar, *self.clamp)

    @property
    def _std(self) -> Array:
        """In long double: z, and what else is made of it, is rounded once."""
        with np.errstate(all="ignore"):
            std = self._form.std(self.logvar.astype(np.longdouble))
            if self.clamp is None:
                return std
            bounded = self.posterior_logvar.astype(np.longdouble)
            return np.where(self._inside, std, np.exp(0.5 * bounded))

    def _against_prior(self, mean: Array, logvar: Array) -> Pair:
        """Of Gaussians whose logvar is known."""
        prior_mean, prior_scale = self.prior_pair
        with np.errstate(all="ignore"):
            wide = self._form.logvar(prior_scale.astype(np.longdouble))
            expm1, phi = SCALES["logvar"].terms(logvar.astype(np.longdouble), wide)
            return Pair(mean - prior_mean, np.exp(-wide).astype(np.float64), expm1, phi)

    @property
    def pair(self) -> Pair:
        """Of all elements."""
        of_logvar = self._against_prior(self.mu, self.posterior_logvar)
        if self.scale == "logvar":
            return of_logvar
        with np.errstate(all="ignore"):
            expm1, phi = self._form.terms(self.logvar, self.prior_pair[1])
        if self.clamp is not None:
            expm1 = np.where(self._inside, expm1, of_logvar.expm1)
            phi = np.where(self._inside, phi, of_logvar.phi)
        return of_logvar._replace(expm1=expm1, phi=phi)

    @property
    def z(self) -> Array:
        """mu + std eps."""
        if self.eps is None:
            raise ValueError("the oracle needs eps for z")
        with np.errstate(all="ignore"):
            return np.asarray(self.mu + self._std * self.eps, np.float64)

    @property
    def kl(self) -> Array:
        """KL to the prior in nats, reduced as asked."""
        with np.errstate(all="ignore"):
            elements = self._rows(np.broadcast_to(self.pair.kl, self.mu.shape))
            if self.reduction == "per_dim":
                return divide(total(elements, 0), self._batch).reshape(self._event)
            rows = total(elements, 1)
        if self.reduction == "none":
            return rows.reshape(self.mu.shape[: self.batch_dims])
        return divide(total(rows), self._denominator)

    @property
    def _denominator(self) -> int:
        return {
            "none": 1,
            "sum": 1,
            "batchmean": self._batch,
            "per_dim": self._batch,
            "mean": self.mu.size,
        }[self.reduction]

    @property
    def means(self) -> tuple[Array, Array]:
        """Means of mu and of logvar: [D] for "batch", scalars for "all"."""
        axis, count = (0, self._batch) if self.mean_over == "batch" else (None, self.mu.size)
        return (
            divide(total(self._rows(self.mu), axis), count),
            divide(total(self._rows(self.posterior_logvar), axis), count),
        )

    @property
    def pair_of_mean(self) -> Pair:
        """Of the event's shape; a scalar for "all"."""
        shape = self._event if self.mean_over == "batch" else ()
        mean, logvar = (values.reshape(shape) for values in self.means)
        pair = self._against_prior(mean, logvar)
        fits = np.broadcast_shapes(shape, *(p.shape for p in self.prior_pair))
        if int(np.prod(fits, dtype=np.int64)) != int(np.prod(shape, dtype=np.int64)):
            raise ValueError("the oracle knows kl_of_mean of a prior without batch axes alone")
        return pair

    @property
    def kl_of_mean(self) -> Array:
        """KL of the mean parameters, in nats."""
        with np.errstate(all="ignore"):
            return total(self.pair_of_mean.kl)

    @property
    def log_q(self) -> Array:
        """log N(z; mu, std^2) of each sample, of the noise itself: z has lost digits of it."""
        if self.eps is None:
            raise ValueError("the oracle needs eps for log_q")
        with np.errstate(all="ignore"):
            elements = -0.5 * (_LOG_2_PI + self.posterior_logvar + self.eps**2)
        return total(self._rows(elements), 1).reshape(self.mu.shape[: self.batch_dims])

    @property
    def log_p(self) -> Array:
        """log density of z under the prior, of each sample."""
        with np.errstate(all="ignore"):
            pair = self._against_prior(self.z, self.posterior_logvar)
            logvar = self._form.logvar(self.prior_pair[1])
            elements = -0.5 * (_LOG_2_PI + logvar + pair.distance**2 * pair.weight)
        rows = self._rows(np.broadcast_to(elements, self.mu.shape))
        return total(rows, 1).reshape(self.mu.shape[: self.batch_dims])

    def gradients(
        self,
        dz: Any = None,
        dkl: Any = None,
        dkl_of_mean: Any = None,
        dlog_q: Any = None,
        dlog_p: Any = None,
    ) -> dict[str, Array]:
        """Of sum(z dz) + sum(kl dkl) + kl_of_mean dkl_of_mean + ...: dmu, dlogvar (of the tensor
        that came in, whatever its form), deps, and of a prior dprior_mean and dprior_scale.
        """
        shape = self.mu.shape
        dmu, dlogvar, of_mean, of_logvar, deps = (np.zeros(shape) for _ in range(5))
        prior_mean, prior_scale = self.prior_pair
        dz = None if dz is None else np.array(to_numpy(dz))
        with np.errstate(all="ignore"):
            if dlog_q is not None:
                upstream, eps = self._of_rows(dlog_q), self._noise
                if self.path_derivative:
                    dz = (0.0 if dz is None else dz) - upstream * eps / self._std
                else:
                    dlogvar = dlogvar - 0.5 * upstream
                    deps = deps - upstream * eps
            if dlog_p is not None:
                upstream = self._of_rows(dlog_p)
                pair = self._against_prior(self.z, self.posterior_logvar)
                slope = pair.distance * pair.weight
                dz = (0.0 if dz is None else dz) - upstream * slope
                of_mean = of_mean + upstream * slope
                of_logvar = of_logvar - 0.5 * upstream * (1.0 - pair.distance * slope)
            if dkl is not None:
                upstream = self.of_elements(dkl)
                dmu, dlogvar, of_mean, of_logvar = (
                    old + upstream * slope
                    for old, slope in zip((dmu, dlogvar, of_mean, of_logvar), self.pair.slopes)
                )
            if dkl_of_mean is not None:
                h = to_numpy(dkl_of_mean)
                m, v, m_prior, v_prior = (h * slope for slope in self.pair_of_mean.slopes)
                count = self._batch if self.mean_over == "batch" else self.mu.size
                dmu, dlogvar = dmu + m / count, dlogvar + v / count
                # What the loop over the batch below sums is one term here.
                of_mean, of_logvar = of_mean + m_prior / count, of_logvar + v_prior / count
            dscale = np.zeros(shape)
            if not all(g is None for g in (dlog_q, dkl, dkl_of_mean)):
                # 0 times an infinite slope is NaN, as it is to autograd.
                dscale = dlogvar * self._form.slope(self.logvar)
            if dz is not None:
                dmu, deps = dmu + dz, deps + dz * self._std
                dscale = dscale + dz * self._noise * self._form.std_slope(self.logvar)
            if self.clamp is not None:
                dscale = np.where(self._inside, dscale, 0.0)
            of_scale = of_logvar * self._form.slope(prior_scale)
        result = {"dmu": dmu, "dlogvar": dscale}
        if dz is not None or dlog_q is not None:
            result["deps"] = deps
        if self.prior is not None:
            result["dprior_mean"] = unbroadcast(of_mean, prior_mean.shape)
            result["dprior_scale"] = unbroadcast(of_scale, prior_scale.shape)
        return {name: np.asarray(value, np.float64) for name, value in result.items()}

    @property
    def _noise(self) -> Array:
        if self.eps is None:
            raise ValueError("the oracle needs eps for the gradient of z")
        return self.eps

    def of_elements(self, dkl: Any) -> Array:
        """The upstream gradient of kl as that of each element's KL; it broadcasts against mu."""
        upstream = to_numpy(dkl) / self._denominator
        return self._of_rows(upstream) if self.reduction == "none" else upstream

    def _of_rows(self, upstream: Any) -> Array:
        """A number for each sample, as it broadcasts against mu."""
        values = to_numpy(upstream)
        return values.reshape(values.shape + (1,) * len(self._event))


def moments_oracle(moments: Any, eps: Any = None, *, dim: int = 1, **options: Any) -> Oracle:
    """The oracle of mu and logvar that are the halves of moments along dim."""
    mu, logvar = np.split(to_numpy(moments), 2, axis=dim)
    return Oracle(mu, logvar, eps, **options)


def moments_gradient(gradients: dict[str, Array], dim: int = 1) -> Array:
    """The gradient of moments: those of mu and logvar (or bounds on them), side by side."""
    return np.concatenate([gradients["dmu"], gradients["dlogvar"]], axis=dim)
