"""torch.distributions' Normal with vaekl's noise, and a KL that keeps its digits."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent
from torch.distributions import Normal as TorchNormal
from torch.distributions.kl import _kl_independent_independent, register_kl

from vaekl import functional

from .draws import given


class Normal(TorchNormal):
    r"""N(loc, scale²), as ``torch.distributions.Normal``, of which it is a subclass.

    Same constructor, properties and methods. What differs: samples come from vaekl's noise, also of
    a ``seed=`` or ``generator=``, and ``torch.distributions.kl_divergence`` of two of them, or of
    one and torch's own, is one launch that is exact where one is close to the other:
    :math:`\frac12 (((\mu - \mu') / \sigma')^2 + u^2 + 2 (u - \ln(1 + u)))` with
    :math:`u = (\sigma - \sigma') / \sigma'`. So is that of ``Independent`` of either, the sum
    included. KLs are in nats, float32 for half precision, else of the inputs' dtype. (So vaekl
    registers a function for pairs of ``Independent``: it hands on to torch's what is not its own.)
    As of torch's own, a first ``kl_divergence`` of two bare Normals does not compile into one
    graph.

    ```python
    posterior = Independent(vaekl.distributions.Normal(mu, std), 1)
    prior = Independent(vaekl.distributions.Normal(torch.zeros(20), torch.ones(20)), 1)
    kl = torch.distributions.kl_divergence(posterior, prior)  # [B]
    ```

    Args:
        loc: Means; a tensor or a number.
        scale: Standard deviations, of a shape that broadcasts with loc's.
        validate_args: As in torch.distributions: whether to raise ValueError for a scale of 0 or
            less, or NaN.
    """

    def sample(
        self,
        sample_shape: Sequence[int] = (),
        *,
        generator: torch.Generator | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """As :meth:`rsample`, without a gradient."""
        with torch.no_grad():
            return self.rsample(sample_shape, generator=generator, seed=seed)

    def rsample(
        self,
        sample_shape: Sequence[int] = (),
        *,
        generator: torch.Generator | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """``loc + scale * eps`` of shape ``sample_shape + batch_shape``, with gradients.

        Args:
            sample_shape: Of independent draws.
            generator, seed: As in :func:`vaekl.reparameterize`; the first axis indexes samples.

        Raises:
            TypeError, ValueError: A generator of another device, a seed that is no int64.
        """
        shape = self._extended_shape(torch.Size(sample_shape))
        loc, scale = (_floating(t).expand(shape) for t in (self.loc, self.scale))
        return functional.reparameterize(loc, scale, scale="std", generator=generator, seed=seed)

    def rsample_and_kl(
        self,
        prior: Distribution,
        *,
        generator: torch.Generator | None = None,
        seed: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """A sample of ``batch_shape`` and its KL to a prior, in one launch and one backward.

        Args:
            prior: A Normal, vaekl's or torch's, whose batch_shape broadcasts to this one's: the KL
                is ``kl_divergence(self, prior)``. Or ``Independent(normal, n)``: it is that of
                ``Independent(self, n)``, summed over the last n axes.
            generator, seed: As in :func:`vaekl.reparameterize_kl`; axes that the KL keeps index
                samples.

        Returns:
            (z, kl): z in the dtype of loc + scale, kl in nats.

        Raises:
            TypeError: prior is no Normal; noise as in :meth:`rsample`.
            ValueError: It does not broadcast to this shape, or has more axes.
        """
        base, summed = _base(prior)
        if not isinstance(base, TorchNormal):
            raise TypeError(
                "prior must be a Normal, or Independent of one; got " + type(prior).__name__
            )
        kept = self.loc.dim() - summed
        if kept < 0:
            raise ValueError(
                f"prior has {summed} event axes; batch_shape is {tuple(self.batch_shape)}"
            )
        z, kl, _ = functional.reparameterize_kl(
            _floating(self.loc), _floating(self.scale), scale="std",
            prior=(_floating(base.loc), _floating(base.scale)), reduction="none",
            kl_of_mean=False, batch_dims=kept, generator=generator, seed=seed,
        )  # fmt: skip
        return z, given(kl)


def _base(distribution: Any) -> tuple[Any, int]:
    """What Independent has been put around, and how many axes are events' in all."""
    summed = 0
    while isinstance(distribution, Independent):
        summed += distribution.reinterpreted_batch_ndims
        distribution = distribution.base_dist
    return distribution, summed


def _kl(p: TorchNormal, q: TorchNormal, summed: int = 0) -> Tensor:
    """KL(p || q), summed over so many last axes."""
    try:
        shape = torch.broadcast_shapes(p.loc.shape, q.loc.shape)
    except RuntimeError:
        raise ValueError(
            "p and q must have batch shapes that broadcast, got "
            f"{tuple(p.batch_shape)} and {tuple(q.batch_shape)}"
        ) from None
    mu, std, mean, of_prior = map(_floating, (p.loc, p.scale, q.loc, q.scale))
    if mu.dim() == 0 < mean.dim():  # numbers are where the others are, of their dtype
        dtype = torch.promote_types(mean.dtype, torch.float32)
        mu, std = mu.to(mean.device, dtype), std.to(mean.device, dtype)
    return functional.kl_loss(
        mu.expand(shape), std.expand(shape), scale="std", prior=(mean, of_prior),
        reduction="none", batch_dims=len(shape) - summed,
    )  # fmt: skip


def _floating(values: Tensor) -> Tensor:
    """Torch's takes integers, too."""
    return values if values.is_floating_point() else values.to(torch.get_default_dtype())


def _kl_of_independent(p: Any, q: Any) -> Tensor:
    """One launch for a Normal of vaekl's beside one of either; all else as torch does it."""
    (of_p, summed), (of_q, of_theirs) = _base(p), _base(q)
    kinds = {type(of_p), type(of_q)}
    if summed == of_theirs and Normal in kinds and kinds <= {Normal, TorchNormal}:
        return _kl(of_p, of_q, summed)
    found: Tensor = _kl_independent_independent(p, q)
    return found


for _pair in product((Normal, TorchNormal), repeat=2):
    if Normal in _pair:
        register_kl(*_pair)(_kl)
register_kl(Independent, Independent)(_kl_of_independent)
