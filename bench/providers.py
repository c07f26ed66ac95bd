"""Who is measured: vaekl, and the code that a user would otherwise write.

A provider gives (z, kl, kl_of_mean): the sample, the mean of the KLs, and the KL of the mean
parameters, None unless both KLs are asked for. All but vaekl compute in the dtype of their inputs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import vaekl

Outputs = tuple[Tensor, Tensor, Tensor | None]
#: vaekl's backends that run on each kind of device.
BACKENDS = {"cpu": ("cpu", "eager"), "cuda": ("triton",)}


def plain(mu: Tensor, logvar: Tensor, both: bool) -> Outputs:
    """As in the VAE of pytorch/examples, averaged over the batch."""

    def kl_terms(m: Tensor, v: Tensor) -> Tensor:
        return -0.5 * (1 + v - m.pow(2) - v.exp())

    std = torch.exp(0.5 * logvar)
    z = mu + torch.randn_like(std) * std
    kl = kl_terms(mu, logvar).flatten(1).sum(1).mean()
    of_mean = kl_terms(mu.mean(0), logvar.mean(0)).sum() if both else None
    return z, kl, of_mean


def distributions(mu: Tensor, logvar: Tensor, both: bool) -> Outputs:
    """torch.distributions as its documentation shows it; arguments are validated by default."""
    Normal, kl_divergence = torch.distributions.Normal, torch.distributions.kl_divergence
    prior = Normal(torch.zeros_like(mu[0]), torch.ones_like(mu[0]))
    posterior = Normal(mu, torch.exp(0.5 * logvar))
    z = posterior.rsample()
    kl = kl_divergence(posterior, prior).flatten(1).sum(1).mean()
    of_mean = None
    if both:
        mean = Normal(mu.mean(0), torch.exp(0.5 * logvar.mean(0)))
        of_mean = kl_divergence(mean, prior).sum()
    return z, kl, of_mean


def diffusers(moments: Tensor, both: bool) -> Outputs:
    """The class that diffusers' autoencoders return; it takes mu and logvar as one tensor."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    posterior = DiagonalGaussianDistribution(moments)
    of_mean = None
    if both:
        of_mean = DiagonalGaussianDistribution(moments.mean(0, keepdim=True)).kl().sum()
    return posterior.sample(), posterior.kl().mean(), of_mean


def compiled() -> Callable[..., Outputs]:
    """torch.compile of the plain code, for static shapes."""
    torch.compiler.reset()  # else the limit on recompilations makes it plain again, silently
    compiled_plain: Callable[..., Outputs] = torch.compile(plain, dynamic=False, fullgraph=True)
    return compiled_plain


def of_vaekl(backend: str) -> Callable[..., Outputs]:
    """vaekl's public function on a backend."""

    def forward(mu: Tensor, logvar: Tensor, both: bool) -> Outputs:
        return vaekl.reparameterize_kl(mu, logvar, kl_of_mean=both, backend=backend)

    return forward


@dataclass(frozen=True)
class Provider:
    """A name and how to get the function."""

    name: str
    build: Callable[[], Callable[..., Outputs]]
    devices: tuple[str, ...] = ("cpu", "cuda")
    needs: str | None = None  # a module
    packed: bool = False  # takes cat([mu, logvar], 1)
    axes: int | None = None  # the only number of axes it takes

    def missing(self, device: str) -> str | None:
        """Why this machine cannot run it; None if it can."""
        if device not in self.devices:
            return f"{self.name} is not for {device}"
        if self.needs is not None and importlib.util.find_spec(self.needs) is None:
            return f"{self.needs} is not installed"
        return None

    def takes(self, shape: Sequence[int]) -> bool:
        """Whether it is made for such inputs."""
        return self.axes in (None, len(shape))


PROVIDERS = (
    Provider("plain", lambda: plain),
    *(
        Provider(f"vaekl-{name}", lambda name=name: of_vaekl(name), devices=(device,))  # type: ignore[misc]
        for device, names in BACKENDS.items()
        for name in names
    ),
    Provider("compile", compiled),
    Provider("distributions", lambda: distributions),
    Provider("diffusers", lambda: diffusers, needs="diffusers", packed=True, axes=4),
)


class Step:
    """What one training step asks of a provider, on given inputs.

    Gradients come from ``torch.autograd.grad``: nothing is accumulated, and dz and the upstream
    gradients of the KLs (``dkl``; 1 as in a loss that adds them) are there beforehand.
    """

    def __init__(
        self,
        provider: Provider,
        function: Callable[..., Outputs],
        mu: Tensor,
        logvar: Tensor,
        both: bool,
        dkl: float = 1.0,
    ) -> None:
        self.name, self.mu, self.logvar, self.both = provider.name, mu, logvar, both
        self._function, self._packed = function, provider.packed
        inputs = (torch.cat([mu, logvar], 1),) if provider.packed else (mu, logvar)
        self.inputs = tuple(tensor.detach().requires_grad_() for tensor in inputs)
        z, *terms = self.forward()
        self.upstream = (torch.randn_like(z), *(torch.full_like(kl, dkl) for kl in terms))

    def forward(self) -> tuple[Tensor, ...]:
        """z, kl and, with both KLs, kl_of_mean; ready for backward."""
        outputs: Any = self._function(*self.inputs, self.both)
        return tuple(outputs[: 2 + self.both])

    def forward_backward(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The outputs, and gradients with respect to the inputs."""
        outputs = self.forward()
        return outputs, torch.autograd.grad(outputs, self.inputs, self.upstream)

    def gradients(self, gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """(dmu, dlogvar) of the inputs' gradients."""
        return gradients[0].chunk(2, 1) if self._packed else gradients
