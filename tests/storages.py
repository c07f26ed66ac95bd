"""How mu and logvar are handed over: as two tensors, or as the halves of one."""

from dataclasses import dataclass

import torch

import vaekl
from vaekl.reference import moments_gradient


@dataclass(frozen=True)
class Pair:
    """Two tensors."""

    def __str__(self):
        return "pair"

    def store(self, mu, logvar):
        """The tensors that `call` takes."""
        return mu, logvar

    def call(self, mu, logvar, eps=None, **options):
        return vaekl.reparameterize_kl(mu, logvar, eps=eps, **options)

    def halves(self, mu, logvar):
        """mu and logvar of stored tensors, or dmu and dlogvar of their gradients."""
        return mu, logvar

    def gradients(self, of):
        """Of the stored tensors, from the oracle's of mu and logvar (or bounds on them)."""
        return of["dmu"], of["dlogvar"]


@dataclass(frozen=True)
class Packed:
    """Halves of one tensor along an axis."""

    dim: int = 1

    def __str__(self):
        return "packed"

    def store(self, mu, logvar):
        return (torch.cat([mu, logvar], self.dim),)

    def call(self, moments, eps=None, **options):
        return vaekl.reparameterize_kl_moments(moments, dim=self.dim, eps=eps, **options)

    def halves(self, moments):
        return moments.chunk(2, self.dim)

    def gradients(self, of):
        return (moments_gradient(of, self.dim),)


PAIR, PACKED = Pair(), Packed()
