"""The oracle: NumPy float64, written from the formulas, and the plain torch code users have today.

Nothing here is shared with a backend. Slow, plain, and what every test compares with.

Sources: Philox4x32-10, Salmon et al. 2011 ("Parallel random numbers: as easy as 1, 2, 3");
Box & Muller 1958; KL of diagonal Gaussians, Kingma & Welling 2013, appendix B.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]
#: Of the key (seed, SEED_OFFSET) that ``seed=`` stands for. No generator of torch gets so far, so
#: that no noise of a seed is among the words that torch draws after ``manual_seed``.
SEED_OFFSET = 2**63


def philox4x32(counter: Array, key: tuple[int, int]) -> Array:
    """Philox4x32-10. counter: uint32 [..., 4]; key: two 32-bit words. Returns uint32 [..., 4]."""
    mask = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    c0, c1, c2, c3 = (np.asarray(counter)[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = key
    for _ in range(10):
        p0 = np.uint64(0xD2511F53) * c0
        p1 = np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (
            (p1 >> shift) ^ c1 ^ np.uint64(k0),
            p1 & mask,
            (p0 >> shift) ^ c3 ^ np.uint64(k1),
            p0 & mask,
        )
        k0 = (k0 + 0x9E3779B9) & 0xFFFFFFFF
        k1 = (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def normal(seed: int, offset: int, batch: int, event: int) -> Array:
    """The noise contract: eps [batch, event] of the key (seed, offset), float64.

    Element [b, j] is lane j % 4 of group b * ceil(event / 4) + j // 4. The counter of a group is
    (offset / 4, group) as two 64-bit numbers, low word first; the key is the 64-bit seed.
    """
    groups = (event + 3) // 4
    group = np.arange(batch * groups, dtype=np.uint64)
    counter = np.empty((batch * groups, 4), dtype=np.uint32)
    counter[:, 0] = (offset // 4) & 0xFFFFFFFF
    counter[:, 1] = (offset // 4) >> 32
    counter[:, 2] = group & np.uint64(0xFFFFFFFF)
    counter[:, 3] = group >> np.uint64(32)
    words = philox4x32(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)).astype(np.float64)
    lanes = np.empty_like(words)
    for pair in (0, 2):
        radius = np.sqrt(-2.0 * np.log((words[:, pair] + 0.5) / 2.0**32))
        angle = 2.0 * np.pi * words[:, pair + 1] / 2.0**32
        lanes[:, pair] = radius * np.cos(angle)
        lanes[:, pair + 1] = radius * np.sin(angle)
    return lanes.reshape(batch, groups * 4)[:, :event]


def phi(logvar: Array) -> Array:
    """exp(l) - 1 - l: its Taylor series for |l| <= 1, where the difference would cancel."""
    logvar = np.asarray(logvar, dtype=np.float64)
    with np.errstate(all="ignore"):
        series = np.zeros_like(logvar)
        for k in range(30, 1, -1):  # l^2/2! (1 + l/3 (1 + l/4 (...)))
            series = (1.0 + series) * logvar / k
        return np.where(np.abs(logvar) <= 1.0, series * logvar, np.expm1(logvar) - logvar)


def _sum(values: Array, axis: int | None = None) -> Array:
    """A sum whose own rounding does not show in float64."""
    return np.asarray(np.sum(values, axis=axis, dtype=np.longdouble), dtype=np.float64)


def _divide(total: Array, count: int) -> Array:
    """0 / 0 is NaN, as the mean of nothing is in torch."""
    with np.errstate(all="ignore"):
        return np.asarray(np.divide(total, np.float64(count)))


def _within(dlogvar: Array, scale: Array, bounds: tuple[float, float]) -> Array:
    """0 where clamp has no gradient: at its bounds and beyond; an infinite one is none."""
    lo, hi = bounds
    inside = (scale > lo) | (np.isneginf(lo) & ~np.isnan(scale))
    inside &= (scale < hi) | np.isposinf(hi)
    return np.where(inside, dlogvar, 0.0)


#: Of each form of a scale: (logvar of a scale, the scale's gradient from that of logvar).
FORMS: dict[str, tuple[Callable[..., Array], Callable[..., Array]]] = {
    "logvar": (lambda scale, bounds: scale, lambda dlogvar, scale, bounds: dlogvar),
    "clamped": (lambda scale, bounds: np.clip(scale, *bounds), _within),
}


@dataclass(frozen=True)
class Oracle:
    """Everything vaekl computes, in float64, for mu, logvar, eps of one shape.

    Options as in ``vaekl.reparameterize_kl``; ``eps`` may be None where z is not asked for.
    """

    mu: Array
    logvar: Array
    eps: Array | None = None
    reduction: str = "batchmean"
    mean_over: str = "batch"
    batch_dims: int = 1
    clamp: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for name in ("mu", "logvar", "eps"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, to_numpy(value))

    @property
    def _batch(self) -> int:
        return int(np.prod(self.mu.shape[: self.batch_dims], dtype=np.int64))

    @property
    def _event(self) -> int:
        return int(np.prod(self.mu.shape[self.batch_dims :], dtype=np.int64))

    def _rows(self, values: Array) -> Array:
        return values.reshape(self._batch, self._event)

    @property
    def form(self) -> str:
        """The scale's, one of FORMS."""
        return "logvar" if self.clamp is None else "clamped"

    @property
    def posterior_logvar(self) -> Array:
        """The posterior's logvar: what the form makes of the one that came in."""
        logvar, _ = FORMS[self.form]
        return logvar(self.logvar, self.clamp)

    @property
    def z(self) -> Array:
        """mu + exp(logvar / 2) eps."""
        if self.eps is None:
            raise ValueError("the oracle needs eps for z")
        with np.errstate(all="ignore"):
            return np.asarray(self.mu + np.exp(0.5 * self.posterior_logvar) * self.eps)

    @property
    def kl(self) -> Array:
        """KL to N(0, I) in nats, reduced as asked."""
        with np.errstate(all="ignore"):
            elements = self._rows(0.5 * (self.mu * self.mu + phi(self.posterior_logvar)))
        rows = _sum(elements, 1)
        if self.reduction == "none":
            return rows.reshape(self.mu.shape[: self.batch_dims])
        return _divide(_sum(rows), self._denominator)

    @property
    def _denominator(self) -> int:
        return {
            "none": 1,
            "sum": 1,
            "batchmean": self._batch,
            "mean": self._batch * self._event,
        }[self.reduction]

    @property
    def means(self) -> tuple[Array, Array]:
        """Means of mu and of that logvar: [D] for "batch", scalars for "all"."""
        axis, count = (0, self._batch) if self.mean_over == "batch" else (None, self.mu.size)
        return (
            _divide(_sum(self._rows(self.mu), axis), count),
            _divide(_sum(self._rows(self.posterior_logvar), axis), count),
        )

    @property
    def kl_of_mean(self) -> Array:
        """KL of the mean parameters, in nats."""
        mean_mu, mean_logvar = self.means
        with np.errstate(all="ignore"):
            return _sum(0.5 * (mean_mu * mean_mu + phi(mean_logvar)))

    def gradients(
        self, dz: Any = None, dkl: Any = None, dkl_of_mean: Any = None
    ) -> dict[str, Array]:
        """dmu, dlogvar (and deps) of sum(z dz) + sum(kl dkl) + kl_of_mean dkl_of_mean."""
        with np.errstate(all="ignore"):
            logvar = self._rows(self.posterior_logvar)
            std = np.exp(0.5 * logvar)
            dmu, dlogvar = np.zeros_like(logvar), np.zeros_like(logvar)
            result = {}
            if dz is not None:
                if self.eps is None:
                    raise ValueError("the oracle needs eps for the gradient of z")
                dz = self._rows(to_numpy(dz))
                dmu += dz
                dlogvar += 0.5 * dz * std * self._rows(self.eps)
                result["deps"] = (dz * std).reshape(self.mu.shape)
            if dkl is not None:
                upstream = to_numpy(dkl).reshape(-1, 1) / self._denominator
                dmu += upstream * self._rows(self.mu)
                dlogvar += upstream * 0.5 * np.expm1(logvar)
            if dkl_of_mean is not None:
                mean_mu, mean_logvar = self.means
                count = self._batch if self.mean_over == "batch" else self.mu.size
                upstream = to_numpy(dkl_of_mean) / count
                dmu += upstream * mean_mu
                dlogvar += upstream * 0.5 * np.expm1(mean_logvar)
            _, gradient = FORMS[self.form]
            dlogvar = gradient(dlogvar, self._rows(self.logvar), self.clamp)
        result["dmu"] = dmu.reshape(self.mu.shape)
        result["dlogvar"] = dlogvar.reshape(self.mu.shape)
        return result


def moments_oracle(moments: Any, eps: Any = None, *, dim: int = 1, **options: Any) -> Oracle:
    """The oracle of mu and logvar that are the halves of moments along dim."""
    mu, logvar = np.split(to_numpy(moments), 2, axis=dim)
    return Oracle(mu, logvar, eps, **options)


def moments_gradient(gradients: dict[str, Array], dim: int = 1) -> Array:
    """The gradient of moments: those of mu and logvar (or bounds on them), side by side."""
    return np.concatenate([gradients["dmu"], gradients["dlogvar"]], axis=dim)


def kl_between(mean: Any, logvar: Any, other_mean: Any, other_logvar: Any) -> Array:
    """Elementwise KL in nats from N(mean, e^logvar) to N(other_mean, e^other_logvar)."""
    m, v, n, w = (to_numpy(t) for t in (mean, logvar, other_mean, other_logvar))
    with np.errstate(all="ignore"):
        return np.asarray(0.5 * ((m - n) ** 2 * np.exp(-w) + phi(v - w)))


def nll(sample: Any, mean: Any, logvar: Any) -> Array:
    """Elementwise -log N(sample; mean, e^logvar) in nats."""
    x, m, v = (to_numpy(t) for t in (sample, mean, logvar))
    with np.errstate(all="ignore"):
        return np.asarray(0.5 * (np.log(2.0 * np.pi) + v + (x - m) ** 2 * np.exp(-v)))


def diagnostics(mu: Any, logvar: Any, batch_dims: int = 1) -> dict[str, Array]:
    """What ``vaekl.diagnose`` reports, per dimension [D], each from its definition.

    ``aggregate_kl_dims`` is the KL to N(0, 1) of the Gaussian with the mean and variance of all
    samples' posteriors together, ``information`` the mean KL of the samples' posteriors to it.
    """
    wide = np.longdouble
    batch = int(np.prod(np.shape(mu)[:batch_dims], dtype=np.int64))
    m, v = (to_numpy(t).reshape(batch, -1).astype(wide) for t in (mu, logvar))
    mean, mean_logvar = m.mean(0), v.mean(0)
    var = ((m - mean) ** 2).mean(0)
    # log of mean e^l + var, and the variance about 1, which a collapsed posterior is close to.
    log_aggregate = np.log1p(np.expm1(v).mean(0) + var)
    ratio = (v - log_aggregate).astype(np.float64)
    distances = (m - mean) ** 2 / np.exp(log_aggregate)
    values = {
        "kl_dims": (m * m + phi(v.astype(np.float64))).mean(0) / 2,
        "kl_of_mean_dims": (mean**2 + phi(mean_logvar.astype(np.float64))) / 2,
        "kl_of_mean_all": (m.mean() ** 2 + phi(np.asarray(v.mean(), np.float64))) / 2,
        "aggregate_kl_dims": (mean**2 + phi(log_aggregate.astype(np.float64))) / 2,
        "information_dims": (phi(ratio) + distances).mean(0) / 2,
        "mean_mu": mean,
        "var_mu": var,
        "mean_logvar": mean_logvar,
        "mean_var": np.exp(v).mean(0),
    }
    return {name: np.asarray(value, dtype=np.float64) for name, value in values.items()}


def to_numpy(values: Any) -> Array:
    """A float64 array of a tensor (any dtype, device), array or number."""
    if isinstance(values, Tensor):
        values = values.detach().to("cpu", torch.float64).numpy()
    return np.asarray(values, dtype=np.float64)


def torch_reparameterize_kl(
    mu: Tensor,
    logvar: Tensor,
    eps: Tensor | None = None,
    *,
    reduction: str = "batchmean",
    mean_over: str = "batch",
    batch_dims: int = 1,
    clamp: tuple[float, float] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(z, kl, kl_of_mean) as people write them today: plain torch, autograd, the input's dtype."""
    if clamp is not None:
        logvar = torch.clamp(logvar, *clamp)
    std = torch.exp(0.5 * logvar)
    z = mu + std * (torch.randn_like(std) if eps is None else eps)

    def elements(m: Tensor, v: Tensor) -> Tensor:
        return -0.5 * (1 + v - m.pow(2) - v.exp())

    rows = elements(mu, logvar)
    if batch_dims < mu.dim():
        rows = rows.flatten(batch_dims).sum(-1)
    kl = {
        "none": lambda: rows,
        "sum": lambda: rows.sum(),
        "batchmean": lambda: rows.mean(),
        "mean": lambda: elements(mu, logvar).mean(),
    }[reduction]()
    if mean_over == "batch":
        if batch_dims:  # no axes at all would be every axis to torch
            axes = tuple(range(batch_dims))
            mu, logvar = mu.mean(axes), logvar.mean(axes)
        of_mean = elements(mu, logvar).sum()
    else:
        of_mean = elements(mu.mean(), logvar.mean())
    return z, kl, of_mean
