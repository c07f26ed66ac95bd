"""Other projects' KLs to a learned prior, or of another form of the scale: the rest of
``peer_cases``.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import torch
from peer_packages import Case, Leaves, Outputs
from torch import Tensor

import vaekl


def _diffusers_other(leaves: Leaves) -> Outputs:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    posterior, prior = map(DiagonalGaussianDistribution, leaves)
    return (posterior.kl(prior).mean(),)


def _other(leaves: Leaves, eps: Tensor | None) -> Outputs:
    (mean, logvar), prior = (t.chunk(2, dim=1) for t in leaves)
    return (vaekl.kl_loss(mean, logvar, prior=prior, clamp=(-30.0, 20.0)),)


@cache
def _multivae_utils() -> Any:
    found = importlib.util.find_spec("multivae")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("multivae is not installed")
    path = f"{found.submodule_search_locations[0]}/models/base/base_utils.py"
    spec: Any = importlib.util.spec_from_file_location("multivae_base_utils", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _multivae(leaves: Leaves) -> Outputs:
    return (_multivae_utils().kl_divergence(*leaves).mean(),)


def _learned(leaves: Leaves, eps: Tensor | None) -> Outputs:
    mean, logvar, *prior = leaves
    return (vaekl.kl_loss(mean, logvar, prior=(prior[0], prior[1])),)


def positive_stds(leaves: Leaves) -> Leaves:
    """Mean, standard deviation, and both of a prior, as Dreamer's networks give them."""
    mean, raw, prior_mean, prior_raw = leaves
    std, prior_std = (torch.nn.functional.softplus(t) + 0.1 for t in (raw, prior_raw))
    return mean, std, prior_mean, prior_std


def _torchrl(leaves: Leaves) -> Outputs:
    from torchrl.objectives import DreamerModelLoss

    loss = object.__new__(DreamerModelLoss)
    for name, value in {"free_nats": 3.0, "global_average": False, "delayed_clamp": False}.items():
        object.__setattr__(loss, name, value)
    mean, std, prior_mean, prior_std = positive_stds(leaves)
    return (DreamerModelLoss.kl_loss(loss, prior_mean, prior_std, mean, std),)


def _dreamer(leaves: Leaves, eps: Tensor | None) -> Outputs:
    mean, std, *prior = positive_stds(leaves)
    kl = vaekl.kl_loss(
        mean, std, scale="std", prior=(prior[0], prior[1]), batch_dims=2, reduction="none"
    )
    return (kl.clamp(min=3.0).mean(),)


def _vgae(leaves: Leaves) -> Outputs:
    from torch_geometric.nn import VGAE

    return (VGAE(torch.nn.Identity()).kl_loss(*leaves),)


def _log_std(leaves: Leaves, eps: Tensor | None) -> Outputs:
    return (vaekl.kl_loss(*leaves, scale="log_std", clamp=(None, 20.0)),)


def _stable_audio(leaves: Leaves) -> Outputs:
    from stable_audio_tools.models.bottleneck import vae_sample

    found: Outputs = vae_sample(*leaves)
    return found


def _std(leaves: Leaves, eps: Tensor | None) -> Outputs:
    mean, scale = leaves
    std = torch.nn.functional.softplus(scale.float()) + 1e-4
    z, kl, _ = vaekl.reparameterize_kl(mean, std, scale="std", eps=eps, kl_of_mean=False)
    return z.to(mean.dtype), 2 * kl / mean.shape[-1]  # no ½, and a mean over time too


def _pyro(leaves: Leaves) -> Outputs:
    from pyro.distributions import Normal
    from torch.distributions import kl_divergence

    mean, std, prior_mean, prior_std = positive_stds(leaves)
    posterior, prior = Normal(mean, std).to_event(2), Normal(prior_mean, prior_std).to_event(2)
    return (kl_divergence(posterior, prior).mean(),)


def learned_std(leaves: Leaves, eps: Tensor | None) -> Outputs:
    """vaekl's, of those."""
    mean, std, *prior = positive_stds(leaves)
    return (vaekl.kl_loss(mean, std, scale="std", prior=(prior[0], prior[1])),)


CASES = (
    Case("diffusers", "kl(other)", ((4, 8, 32, 32),) * 2, _diffusers_other, _other, (1,)),
    Case("multivae", "learned prior", ((64, 20),) * 4, _multivae, _learned, (1,)),
    Case("torchrl", "Dreamer", ((16, 10, 30),) * 4, _torchrl, _dreamer, (1,)),
    Case("torch_geometric", "VGAE", ((200, 16),) * 2, _vgae, _log_std, (1,)),
    Case(
        "stable_audio_tools", "vae_sample", ((4, 64, 256),) * 2, _stable_audio, _std, (4, 64, 256)
    ),
    Case("pyro", "KL of two normals", ((16, 10, 30),) * 4, _pyro, learned_std, (1,)),
)  # fmt: skip
