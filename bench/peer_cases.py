"""Other projects' own code beside vaekl's, on the same inputs: for tests/peers and bench/peers.py.

Nothing of theirs is written here: each case calls what an installed package ships. A case's
functions take the leaves (and eps, if any is to be used) and give the sample, where the package's
function draws one, and the KL in the reduction that it trains with.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import peer_priors
import torch
from peer_packages import Case, Leaves, Outputs
from torch import Tensor

import vaekl


def _diffusers(leaves: Leaves) -> Outputs:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    posterior = DiagonalGaussianDistribution(leaves[0])
    return posterior.sample(), posterior.kl().sum() / len(leaves[0])


def _moments(leaves: Leaves, eps: Tensor | None) -> Outputs:
    return vaekl.reparameterize_kl_moments(
        leaves[0], eps=eps, clamp=(-30.0, 20.0), kl_of_mean=False
    )[:2]


def _diffusers_each(leaves: Leaves) -> Outputs:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    posterior = DiagonalGaussianDistribution(leaves[0])
    return posterior.sample(), posterior.kl()


def _moments_each(leaves: Leaves, eps: Tensor | None) -> Outputs:
    return vaekl.reparameterize_kl_moments(
        leaves[0], eps=eps, clamp=(-30.0, 20.0), reduction="none", kl_of_mean=False
    )[:2]


def _ltx(leaves: Leaves) -> Outputs:
    mean, logvar = leaves
    return _diffusers((torch.cat([mean, logvar.expand_as(mean)], 1),))


def _expanded(leaves: Leaves, eps: Tensor | None) -> Outputs:
    mean, logvar = leaves
    return vaekl.reparameterize_kl(
        mean, logvar.expand_as(mean), eps=eps, clamp=(-30.0, 20.0), kl_of_mean=False
    )[:2]


def _oobleck(leaves: Leaves) -> Outputs:
    from diffusers.models.autoencoders.autoencoder_oobleck import (
        OobleckDiagonalGaussianDistribution,
    )

    posterior = OobleckDiagonalGaussianDistribution(leaves[0])
    return posterior.sample(), posterior.kl()


def _softplus(leaves: Leaves, eps: Tensor | None) -> Outputs:
    mean, scale = leaves[0].chunk(2, dim=1)
    logvar = 2 * torch.log(torch.nn.functional.softplus(scale.float()) + 1e-4)
    z, kl, _ = vaekl.reparameterize_kl(mean, logvar, eps=eps, kl_of_mean=False)
    return z, 2 * kl / mean.shape[-1]  # no ½, and a mean over time too


@cache
def _pythae_model(kind: str) -> Any:
    from pythae import models

    config = getattr(models, f"{kind}Config")
    options = {"VAE": {}, "BetaVAE": {"beta": 4.0}, "DisentangledBetaVAE": {"beta": 10.0, "C": 3.0}}
    chosen = config(input_dim=(1,), latent_dim=10, **options[kind])
    return getattr(models, kind)(chosen)


def _pythae(kind: str) -> Callable[[Leaves], Outputs]:
    def theirs(leaves: Leaves) -> Outputs:
        model, (mean, logvar) = _pythae_model(kind), leaves
        z, _ = model._sample_gauss(mean, torch.exp(0.5 * logvar))
        nothing = mean.new_zeros(len(mean), 1)  # to reconstruct: the loss is the KL's part alone
        epoch = {"epoch": 10**9} if kind.startswith("Disentangled") else {}
        return z, model.loss_function(nothing, nothing, mean, logvar, z, **epoch)[0]

    return theirs


def _batchmean(factor: float) -> Callable[[Leaves, Tensor | None], Outputs]:
    def ours(leaves: Leaves, eps: Tensor | None) -> Outputs:
        z, kl, _ = vaekl.reparameterize_kl(*leaves, eps=eps, kl_of_mean=False)
        return z, factor * kl

    return ours


def _capacity(leaves: Leaves, eps: Tensor | None) -> Outputs:
    z, kl, _ = vaekl.reparameterize_kl(*leaves, eps=eps, reduction="none", kl_of_mean=False)
    return z, 10.0 * (kl - 3.0).abs().mean()


class _Columns(torch.nn.Module):
    """Some columns of what comes in."""

    def __init__(self, columns: slice) -> None:
        super().__init__()
        self.columns = columns

    def forward(self, x: Tensor) -> Tensor:
        """[B, those]."""
        return x[:, self.columns]


@cache
def _scvi_model() -> Any:
    from scvi.module import VAE

    model = VAE(n_input=2, n_latent=10)
    # Its own forward, fed with what the last layers would give.
    model.z_encoder.encoder = torch.nn.Identity()
    model.z_encoder.mean_encoder = _Columns(slice(None, 10))
    model.z_encoder.var_encoder = _Columns(slice(10, None))
    return model


def _scvi_kl(posterior: Any, prior: Any) -> Tensor:
    """That of its loss."""
    from torch.distributions import Normal

    counts = torch.zeros(len(posterior.loc), 2)
    loss = _scvi_model().loss(
        {"X": counts},
        {"qz": posterior, "ql": None},
        {"pz": prior, "pl": None, "px": Normal(counts, counts + 1)},
    )
    kl: Tensor = loss.kl_local["kl_divergence_z"].mean()
    return kl


def _scvi(leaves: Leaves) -> Outputs:
    from torch.distributions import Normal

    posterior, z = _scvi_model().z_encoder(leaves[0])
    ones = torch.ones_like(z)
    return z, _scvi_kl(posterior, Normal(0.0 * ones, ones))


def _scvi_prior(leaves: Leaves) -> Outputs:
    """As scANVI and others have it, of a prior that a network gives."""
    from torch.distributions import Normal

    mean, std, prior_mean, prior_std = peer_priors.positive_stds(leaves)
    return (_scvi_kl(Normal(mean, std), Normal(prior_mean, prior_std)),)


def _variance(leaves: Leaves, eps: Tensor | None) -> Outputs:
    mean, raw = leaves[0].chunk(2, dim=1)
    variance = torch.exp(raw.float()) + 1e-4
    return vaekl.reparameterize_kl(mean, variance.log(), eps=eps, kl_of_mean=False)[:2]


def _keras(leaves: Leaves) -> Outputs:
    # Its package ships no VAE; these are its operations, as its example composes them.
    from keras import ops

    mean, logvar = leaves
    z = mean + ops.exp(0.5 * logvar) * torch.randn_like(mean)
    elements = ops.add(1.0, logvar) - ops.square(mean) - ops.exp(logvar)
    return z, ops.mean(ops.sum(-0.5 * elements, axis=1))


def _lerobot(leaves: Leaves) -> Outputs:
    from lerobot.policies.act.modeling_act import ACTPolicy

    head, action = leaves[0], leaves[0].new_zeros(len(leaves[0]), 1, 1)
    batch = {"action": action, "action_is_pad": action[..., 0].bool()}
    policy = SimpleNamespace(
        config=SimpleNamespace(image_features=None, use_vae=True, kl_weight=10.0),
        model=lambda _: (action, (head[:, :32], head[:, 32:])),
    )
    return (ACTPolicy.forward(policy, batch)[0],)  # type: ignore[arg-type]


def _head(leaves: Leaves, eps: Tensor | None) -> Outputs:
    return (10.0 * vaekl.kl_loss(leaves[0][:, :32], leaves[0][:, 32:]),)


CASES = (
    Case("diffusers", "Σ/B, SD", ((16, 8, 64, 64),), _diffusers, _moments, (16, 4, 64, 64)),
    Case("diffusers", "Σ/B, SDXL", ((4, 8, 128, 128),), _diffusers, _moments, (4, 4, 128, 128)),
    Case(
        "diffusers", "per sample, SD at 256", ((12, 8, 32, 32),), _diffusers_each, _moments_each,
        (12, 4, 32, 32),
    ),
    Case(
        "diffusers", "LTX: one logvar", ((1, 128, 4, 16, 24), (1, 1, 4, 16, 24)), _ltx, _expanded,
        (1, 128, 4, 16, 24),
    ),
    Case("diffusers", "Oobleck", ((4, 128, 1024),), _oobleck, _softplus, (4, 64, 1024)),
    Case("pythae", "VAE", ((64, 10),) * 2, _pythae("VAE"), _batchmean(1.0), (64, 10)),
    Case("pythae", "BetaVAE", ((64, 10),) * 2, _pythae("BetaVAE"), _batchmean(4.0), (64, 10)),
    Case(
        "pythae", "DisentangledBetaVAE", ((64, 10),) * 2, _pythae("DisentangledBetaVAE"),
        _capacity, (64, 10),
    ),
    Case("keras", "operations of its example", ((128, 2),) * 2, _keras, _batchmean(1.0), (128, 2)),
    Case("scvi", "VAE", ((128, 20),), _scvi, _variance, (128, 10)),
    Case("scvi", "learned prior", ((128, 10),) * 4, _scvi_prior, peer_priors.learned_std, (1,)),
    Case("lerobot", "ACT", ((8, 64),), _lerobot, _head, (8, 32)),
    *peer_priors.CASES,
)  # fmt: skip
