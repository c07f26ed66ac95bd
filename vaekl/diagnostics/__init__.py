"""What a batch of posteriors says about the latent code: both KLs, and what lies between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from vaekl import _roads, _validate
from vaekl._spec import Prior, Values

from .formulas import evaluate
from .report import DiagnosticsReport
from .standard import collect_to, prior_of
from .statistics import Gaussian, Statistics, collect, merged

__all__ = ["DiagnosticsAccumulator", "DiagnosticsReport", "diagnose"]


class DiagnosticsAccumulator:
    """Statistics of many batches, equal to those of all their samples in one; no sample is kept.

    ```python
    accumulator = vaekl.DiagnosticsAccumulator()
    for images in loader:
        accumulator.update(*encoder(images).chunk(2, dim=-1))
    print(accumulator.report())
    ```

    Accumulators of several workers (they can be pickled, so for instance
    ``torch.distributed.all_gather_object``) are merged by :meth:`merge`. Batches are combined in
    float64 by the update of Chan, Golub & LeVeque (1979).

    Args:
        scale, prior, batch_dims: As in :func:`diagnose`.
        backend: As in :func:`vaekl.reparameterize_kl`.
    """

    def __init__(
        self,
        *,
        scale: str = "logvar",
        prior: Prior = None,
        batch_dims: int | None = None,
        backend: str = "auto",
    ) -> None:
        if batch_dims is not None:
            batch_dims = _validate.integer("batch_dims", batch_dims, 0, 64)
        if prior is not None:
            _validate.prior_pair(prior)
        self._options: dict[str, Any] = {
            "scale": _validate.choice("scale", scale, _validate.SCALES),
            "prior": prior,
            "batch_dims": batch_dims,
            "backend": _validate.backend_name(backend),
        }
        self._statistics: Statistics | None = None

    def update(self, mu: Tensor, logvar: Values) -> DiagnosticsAccumulator:
        """Add a batch, of any number of samples; arguments and errors as in :func:`diagnose`.

        Returns:
            The accumulator itself.

        Raises:
            ValueError: The batch's events have another shape than those before.
        """
        _validate.tensor("mu", mu)
        batch_dims = _validate.batch_dims(self._options["batch_dims"], mu)
        if self._statistics is not None and mu.shape[batch_dims:] != self._statistics.event:
            raise ValueError(
                f"mu must have events of shape {tuple(self._statistics.event)}, as the batches "
                f"before; got mu of shape {tuple(mu.shape)} with batch_dims={batch_dims}"
            )
        if 0 not in mu.shape[:batch_dims]:
            self._add(_statistics(mu, logvar, **self._options), "the batch's prior")
        else:
            _validate.broadcast(mu, logvar, None)
        return self

    def merge(self, other: DiagnosticsAccumulator) -> DiagnosticsAccumulator:
        """Add what another accumulator has seen; the other is not changed.

        Returns:
            The accumulator itself.

        Raises:
            TypeError: ``other`` is no accumulator.
            ValueError: Its events have another shape, or its prior differs.
        """
        if not isinstance(other, DiagnosticsAccumulator):
            raise TypeError(f"other must be a DiagnosticsAccumulator, got {type(other).__name__}")
        mine, theirs = self._statistics, other._statistics
        if mine is not None and theirs is not None and mine.event != theirs.event:
            raise ValueError(
                f"other must have events of shape {tuple(mine.event)}, got {tuple(theirs.event)}"
            )
        if theirs is not None:
            self._add(theirs, "other's prior")
        return self

    def _add(self, new: Statistics, name: str) -> None:
        if self._statistics is None:
            self._statistics = new
        elif not _alike(self._statistics.prior, new.prior):
            raise ValueError(f"{name} differs from that of the samples before")
        else:
            self._statistics = merged(self._statistics, new)

    @property
    def samples(self) -> int:
        """How many samples there have been."""
        return 0 if self._statistics is None else self._statistics.samples

    def __repr__(self) -> str:
        return f"<DiagnosticsAccumulator of {self.samples} samples>"

    def report(self) -> DiagnosticsReport:
        """The report of all samples so far.

        Raises:
            ValueError: There have been none.
        """
        if self._statistics is None:
            raise ValueError("there is nothing to report: update() has seen no samples")
        return evaluate(self._statistics)


def diagnose(
    mu: Tensor,
    logvar: Values,
    *,
    scale: str = "logvar",
    prior: Prior = None,
    batch_dims: int | None = None,
    backend: str = "auto",
) -> DiagnosticsReport:
    """What a batch's posteriors N(mu, exp(logvar)) say: both KLs, information, collapse.

    One pass over mu and logvar, in float64; no gradient, and it waits for the device. (With another
    prior or scale, float64 copies of both are made first.)

    Args:
        mu: Means, any shape with the sample axes first; float16, bfloat16, float32 or float64.
        logvar: Log variances, or what ``scale`` says, of a shape that broadcasts to mu's; a number
            for all.
        scale: The form of the second argument, as in :func:`vaekl.reparameterize_kl`.
        prior: (mean, scale) of the Gaussian that all KLs are to, in that form: tensors without
            batch axes that broadcast to mu, or numbers. None is N(0, I).
        batch_dims: Number of leading axes that index samples; all of them together are the batch.
            None: 1, where mu has two axes or more.
        backend: ``"auto"``, ``"triton"``, ``"cpu"`` or ``"eager"``.

    Returns:
        :class:`DiagnosticsReport`: print it, or see its ``to_dict()`` and ``plot()``.

    Raises:
        TypeError: An argument of the wrong type or dtype.
        ValueError: A shape, device or option that does not fit, no elements at all, or a prior that
            is not finite.
        ModuleNotFoundError: A backend asked for by name is not installed, or cannot run.
    """
    return evaluate(_statistics(mu, logvar, scale, prior, batch_dims, backend))


def _statistics(
    mu: Tensor, logvar: Values, scale: str, prior: Prior, batch_dims: int | None, backend: str
) -> Statistics:
    scale = _validate.choice("scale", scale, _validate.SCALES)
    logvar = _validate.broadcast(mu, logvar, None)[0]
    batch_dims = _validate.batch_dims(batch_dims, mu)
    if mu.numel() == 0:
        raise ValueError(f"mu must have at least one element, got shape {tuple(mu.shape)}")
    for name, tensor in (("mu", mu), ("logvar", logvar)):
        if tensor.is_meta or isinstance(tensor, FakeTensor):
            what = "FakeTensor" if isinstance(tensor, FakeTensor) else "tensor on the meta device"
            raise ValueError(f"{name} must have values, got a {what}")
    one = prior_of(prior, scale, mu, logvar, batch_dims)
    backend = _validate.resolve_backend(backend, mu.device)
    mu, logvar = (t.detach().resolve_neg() for t in (mu, logvar))
    if _roads.road(mu, logvar) != "direct":
        backend = "eager"  # subclasses, transforms: there may be no memory for a kernel to read
    if one is None:
        return collect(mu, logvar, batch_dims, backend)
    return collect_to(one, scale, mu, logvar, batch_dims, backend)


def _alike(a: Gaussian | None, b: Gaussian | None) -> bool:
    if a is None or b is None:
        return a is b
    # Logarithms that devices took may differ by an ulp.
    return all(torch.allclose(x, y, rtol=1e-12, atol=1e-12) for x, y in zip(a, b))
