"""CPU code: the gradients of each element of a block (the derivation is in ``backward``)."""

from typing import NamedTuple

from numba import njit, types

from .gaussian import exp_terms
from .numeric import JIT
from .prior import r_terms


class Values(NamedTuple):
    """The elements of a block."""

    mu: types.Array
    logvar: types.Array
    eps: types.Array


class Upstream(NamedTuple):
    """What is sent to the elements of a block."""

    has_dz: bool
    dz: types.Array
    has_dkl: bool
    dkl: types.Array  # of each element's KL
    has_of_mean: bool
    of_mu: types.Array  # by kl_of_mean
    of_logvar: types.Array


class Gradients(NamedTuple):
    """Of the elements of a block."""

    dmu: types.Array
    dlogvar: types.Array
    deps: types.Array


@njit(**JIT)
def gradients(values, upstream, out):
    """Of each element."""
    mu, logvar, eps = values
    has_dz, dz, has_dkl, dkl, _, of_mu, of_logvar = upstream
    dmu, dlogvar, deps = out
    zero, half = dkl.dtype.type(0), dkl.dtype.type(0.5)
    for i in range(len(dmu)):
        std, expm1, _ = exp_terms(logvar[i])
        # What is absent is not read, whatever it holds.
        kl_mu = dkl[i] * mu[i] if has_dkl else zero
        kl_logvar = dkl[i] * expm1 if has_dkl else zero
        z_mu = dz[i] if has_dz else zero
        z_eps = z_mu * std
        z_logvar = z_eps * eps[i] if has_dz else zero
        dmu[i] = z_mu + kl_mu + of_mu[i]
        dlogvar[i] = half * (z_logvar + kl_logvar) + of_logvar[i]
        deps[i] = z_eps


@njit(**JIT)
def gradients_of_terms(values, terms, std_slope, slope, upstream, out):
    """The same, of terms that are there; of the scale itself in place of logvar."""
    mu, _, eps = values
    has_dz, dz, has_dkl, dkl, has_of_mean, of_mu, of_logvar = upstream
    dmu, dscale, deps = out
    zero, half = dkl.dtype.type(0), dkl.dtype.type(0.5)
    has_dlogvar = has_dkl | has_of_mean
    for i in range(len(dmu)):
        kl_mu = dkl[i] * mu[i] if has_dkl else zero
        kl_logvar = dkl[i] * terms.expm1[i] if has_dkl else zero
        # A gradient of 0 that is there makes NaN of an infinite slope; one that is absent does not.
        of_kls = (half * kl_logvar + of_logvar[i]) * slope[i] if has_dlogvar else zero
        z_mu = dz[i] if has_dz else zero
        z_scale = z_mu * (std_slope[i] * eps[i]) if has_dz else zero
        dmu[i] = z_mu + kl_mu + of_mu[i]
        dscale[i] = half * z_scale + of_kls
        deps[i] = z_mu * terms.std[i]


@njit(**JIT)
def gradients_of_prior(far, root, expm1, upstream, of_prior, dmean, dlogvar):
    """Of the prior of each element."""
    has_dkl, dkl, of_mu = upstream.has_dkl, upstream.dkl, upstream.of_mu
    zero, half = dkl.dtype.type(0), dkl.dtype.type(0.5)
    for i in range(len(far)):
        kl_mean = dkl[i] * (far[i] * root[i]) if has_dkl else zero
        kl_logvar = dkl[i] * (far[i] * far[i] + expm1[i]) if has_dkl else zero
        dmean[i] = -(kl_mean + of_mu[i])
        dlogvar[i] = of_prior[i] - half * kl_logvar


@njit(**JIT)
def gradients_to_logarithm(values, prior, upstream, out, far, expm1):
    """As gradients, against a prior; far and e^r - 1 are left for the gradients of that."""
    mu, logvar, eps = values
    has_dz, dz, has_dkl, dkl, _, of_mu, of_logvar = upstream
    dmu, dlogvar, deps = out
    zero, half = dkl.dtype.type(0), dkl.dtype.type(0.5)
    for i in range(len(dmu)):
        std = exp_terms(logvar[i])[0]
        expm1[i] = r_terms(logvar[i], prior.logvar[i])[0]
        far[i] = (mu[i] - prior.mean[i]) * prior.root[i]
        kl_mu = dkl[i] * (far[i] * prior.root[i]) if has_dkl else zero
        kl_logvar = dkl[i] * expm1[i] if has_dkl else zero
        z_mu = dz[i] if has_dz else zero
        z_eps = z_mu * std
        z_logvar = z_eps * eps[i] if has_dz else zero
        dmu[i] = z_mu + kl_mu + of_mu[i]
        dlogvar[i] = half * (z_logvar + kl_logvar) + of_logvar[i]
        deps[i] = z_eps
