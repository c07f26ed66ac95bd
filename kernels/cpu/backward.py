"""CPU code: the gradients in one pass; the twin of ``backward`` (the derivation is there)."""

from typing import NamedTuple

import numpy as np
from numba import njit, types

from .forms import Terms, direct_terms, is_direct, logvar_of, slopes, to_gradient_of_scale
from .gaussian import exp_terms
from .memory import BLOCK, block, read
from .numeric import JIT, KERNEL
from .philox import NOISE_BLOCKS, Key, noise
from .plan import BATCH, Operand, operands_at, plan_at
from .reduction import copy
from .team import on_team
from .tile import deliver, read_run, source, target
from .walk import TILES, join, pieces, places, workspace

# Blocks of a worker's memory.
MU, SCALE, LOGVAR, STD, EXPM1, PHI, EPS, DZ, DMU, DSCALE, DEPS = range(11)
NOISE = 11
STD_SLOPE = PHI  # which backward has no use for
DKL, OF_MU, OF_LOGVAR, SLOPE = range(NOISE + NOISE_BLOCKS, NOISE + NOISE_BLOCKS + 4)
BUFFERS = SLOPE + 1


class Tensors(NamedTuple):
    """What workers read and write; address 0: absent, or not wanted."""

    mu: Operand
    scale: Operand
    eps: Operand
    dz: Operand
    dmu: Operand
    dscale: Operand
    deps: Operand
    dkl: int  # addresses
    dkl_of_mean: int
    means: int
    saved_key: int


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


def scratch_size(plan):
    """Length of scratch: counters alone."""
    return TILES + plan.tiles


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
def of_mean_gradients(plan, piece, own, tensors, dkl, of_mean):
    """What kl_of_mean sends to each element of a block: dkl_of_mean times the gradient of a KL of
    means.

    It is the same for every row. Both of of_mean are zeros before, dkl is overwritten.
    """
    B, D, col, cols = plan.batch, plan.event, piece.col, piece.cols
    by_column = plan.mean_over == BATCH
    of_mu, of_logvar = of_mean
    zero = dkl.dtype.type(0)
    b_mu, b_logvar = block(own, MU, cols), block(own, LOGVAR, cols)
    if by_column:
        for j in range(cols):
            b_mu[j] = read(tensors.means, col + j, zero)
            b_logvar[j] = read(tensors.means, D + col + j, zero)
    else:
        b_mu[:] = read(tensors.means, 0, zero)
        b_logvar[:] = read(tensors.means, 1, zero)
    h = read(tensors.dkl_of_mean, 0, zero)
    dkl[:cols] = h / dkl.dtype.type(B if by_column else float(B) * D)
    row_mu, row_logvar = block(own, DMU, cols), block(own, DSCALE, cols)
    of_mu[:cols], of_logvar[:cols] = zero, zero
    gradients(
        Values(b_mu, b_logvar, b_mu),
        Upstream(False, b_mu, True, dkl, False, of_mu, of_logvar),
        Gradients(row_mu, row_logvar, block(own, DEPS, cols)),
    )
    for start in range(0, piece.block_rows * cols, cols):
        copy(row_mu, of_mu[start : start + cols])
        copy(row_logvar, of_logvar[start : start + cols])


@njit(**JIT)
def read_rows(plan, place, address, dkl):
    """The upstream gradient of each row's KL, for each element of a block."""
    step, zero = plan.dkl_row, dkl.dtype.type(0)
    if plan.event == 1:
        read_run(address, place.row * step, step, dkl[: place.rows])
        return
    for r in range(place.rows):
        dkl[r * place.cols : (r + 1) * place.cols] = read(address, (place.row + r) * step, zero)


@njit(**JIT)
def work(plan, space, tensors):
    """A worker's part: pieces until none is left."""
    mu, scale, eps, dz, dmu, dscale, deps, dkl, dkl_of_mean, _, saved_key = tensors
    own, scratch = join(space), space.scratch
    dtype, zero = own.dtype.type, own.dtype.type(0)
    has_dz, has_dkl, has_of_mean = dz.address != 0, dkl != 0, dkl_of_mean != 0
    most = min(BLOCK, plan.batch * plan.event)
    b_dkl = block(own, DKL, most)
    of_mu, of_logvar = block(own, OF_MU, most), block(own, OF_LOGVAR, most)
    of_mu[:], of_logvar[:] = zero, zero
    b_eps, of_noise = block(own, EPS, BLOCK), block(own, NOISE, NOISE_BLOCKS * BLOCK)
    is_drawn = has_dz and dscale.address != 0 and eps.address == 0
    key = Key(0, 0)
    if is_drawn:
        key = Key(read(saved_key, 0, np.int64(0)), read(saved_key, 1, np.int64(0)))
    for piece in pieces(plan, scratch):
        if has_of_mean:
            of_mean_gradients(plan, piece, own, tensors, b_dkl, (of_mu, of_logvar))
        if has_dkl and plan.per_row == 0:
            b_dkl[: piece.block_rows * piece.cols] = read(dkl, 0, zero) / dtype(plan.denominator)
        for place in places(plan, piece):
            n = place.rows * place.cols
            if eps.address != 0:
                b_eps = source(eps, place, block(own, EPS, n))
            elif is_drawn:
                noise(key, place, of_noise, b_eps)
            if has_dkl and plan.per_row != 0:
                read_rows(plan, place, dkl, b_dkl)
            b_mu = source(mu, place, block(own, MU, n)) if has_dkl else block(own, MU, n)
            b_dz = source(dz, place, block(own, DZ, n)) if has_dz else block(own, DZ, n)
            b_scale = source(scale, place, block(own, SCALE, n))
            out = Gradients(
                target(dmu, place, block(own, DMU, n)),
                target(dscale, place, block(own, DSCALE, n)),
                target(deps, place, block(own, DEPS, n)),
            )
            sent = Upstream(has_dz, b_dz, has_dkl, b_dkl, has_of_mean, of_mu, of_logvar)
            b_logvar = block(own, LOGVAR, n)
            if is_direct(plan):
                b_std, std_slope = block(own, STD, n), block(own, STD_SLOPE, n)
                # phi is not used here; its block then has the slope of std.
                terms = Terms(b_logvar, b_std, block(own, EXPM1, n), std_slope)
                direct_terms(plan, b_scale, terms)
                slope = block(own, SLOPE, n)
                slopes(plan, b_scale, b_std, std_slope, slope)
                values = Values(b_mu, b_logvar, b_eps)
                gradients_of_terms(values, terms, std_slope, slope, sent, out)
            else:
                b_logvar = logvar_of(plan, b_scale, b_logvar)
                gradients(Values(b_mu, b_logvar, b_eps), sent, out)
            to_gradient_of_scale(plan, b_logvar, out.dlogvar)
            deliver(dmu, place, out.dmu)
            deliver(dscale, place, out.dlogvar)
            deliver(deps, place, out.deps)


@njit(**KERNEL)
def backward_kernel(
    parallel, threads,  # of on_team
    memories,  # [threads, BUFFERS * BLOCK] of the computation's dtype: each worker's own
    plan,  # address of a packed plan: of mu, scale, eps, dz, dmu, dscale, deps
    scratch,  # float64[scratch_size], zeros
    mu, scale, eps,  # addresses, [B, D]; eps 0: drawn in forward, again here
    dz, dkl, dkl_of_mean,  # addresses: upstream gradients
    saved_key, means,  # addresses: what forward left
    dmu, dscale, deps,  # addresses, [B, D]
):  # fmt: skip
    """The gradients. An address of 0: absent or not wanted."""
    operands = operands_at(plan, (mu, scale, eps, dz, dmu, dscale, deps))
    plan, space = plan_at(plan), workspace(memories, scratch)
    mu, scale, eps, dz, dmu, dscale, deps = operands
    tensors = Tensors(mu, scale, eps, dz, dmu, dscale, deps, dkl, dkl_of_mean, means, saved_key)
    on_team(parallel, threads, work, (plan, space, tensors))
