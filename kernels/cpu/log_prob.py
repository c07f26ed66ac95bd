"""CPU code: a sample with its log densities; the twin of ``log_prob`` (the formulas are there)."""

import math
from typing import NamedTuple

from numba import njit

from .forms import Terms, direct_terms, is_direct, logvar_of
from .forward import finish_rows, keep_rows
from .gaussian import exp_terms
from .memory import BLOCK, block, write
from .numeric import JIT, KERNEL
from .philox import NOISE_BLOCKS, Key, noise
from .plan import Operand, operands_at, plan_at
from .prior import PRIOR_BLOCKS, Prior, PriorBlock, logs, prior_at, prior_of_first, varies
from .team import on_team
from .tile import deliver, source, target
from .walk import TILES, join, of_one_draw, pieces, places, workspace

# Blocks of a worker's memory; those that backward has, too, come first.
MU, SCALE, LOGVAR, STD, UNUSED, SLOPE, EPS, NOISE = range(8)
PRIOR = NOISE + NOISE_BLOCKS
OWN = PRIOR + PRIOR_BLOCKS
Z, OF_Q, OF_P = range(OWN, OWN + 3)
BUFFERS = OWN + 3
LN_2_PI = math.log(2 * math.pi)


class Tensors(NamedTuple):
    """What forward's workers read and write; address 0: absent."""

    mu: Operand
    scale: Operand
    eps: Operand
    z: Operand
    log_q: int  # addresses
    log_p: int


def scratch_size(plan):
    """Length of scratch: counters, then [2, tiles, B] if there are several tiles."""
    rows = 2 * plan.tiles * plan.batch if plan.tiles > 1 else 0
    return TILES + plan.tiles + rows


@njit(**JIT)
def standard(own):
    """N(0, I), as the prior of any block."""
    memory = block(own, PRIOR, PRIOR_BLOCKS * BLOCK)
    memory[:] = memory.dtype.type(0)
    zero, root = block(memory, 0, BLOCK), block(memory, 1, BLOCK)
    root[:] = memory.dtype.type(1)
    return PriorBlock(zero, zero, zero, root)


@njit(**JIT)
def with_logvar(plan, prior):
    """A block's prior."""
    if is_direct(plan):
        logs(plan, prior.scale, prior.logvar)
    return prior


@njit(**JIT)
def logvar_and_std(plan, own, scale):
    """Of a block's posterior, within its bounds."""
    n = len(scale)
    logvar, std = block(own, LOGVAR, n), block(own, STD, n)
    if is_direct(plan):
        direct_terms(plan, scale, Terms(logvar, std, block(own, UNUSED, n), block(own, SLOPE, n)))
        return logvar, std
    logvar = logvar_of(plan, scale, logvar)
    for i in range(n):
        std[i] = exp_terms(logvar[i])[0]
    return logvar, std


@njit(**JIT)
def densities(mu, logvar, std, eps, prior, z, of_q, of_p):
    """z, and what the log densities are half the sums of."""
    constant = z.dtype.type(LN_2_PI)
    for i in range(len(mu)):
        z[i] = mu[i] + std[i] * eps[i]
        far = (z[i] - prior.mean[i]) * prior.root[i]
        of_q[i] = -(eps[i] * eps[i] + (logvar[i] + constant))
        of_p[i] = -(far * far + (prior.logvar[i] + constant))


@njit(**JIT)
def work(plan, space, tensors, key, prior):
    """A worker's part of forward: pieces until none is left."""
    mu, scale, eps, z, log_q, log_p = tensors
    own, scratch = join(space), space.scratch
    rows = scratch[TILES + plan.tiles :]
    of_tiles = plan.tiles * plan.batch
    of_noise, b_eps = block(own, NOISE, NOISE_BLOCKS * BLOCK), block(own, EPS, BLOCK)
    memory, b_prior = block(own, PRIOR, PRIOR_BLOCKS * BLOCK), standard(own)
    for piece in pieces(plan, scratch):
        if prior.mean.address != 0 and not varies(prior):
            b_prior = with_logvar(plan, prior_of_first(plan, prior, piece, memory))
        for place in places(plan, piece):
            n, of_one = place.rows * place.cols, of_one_draw(plan, place)
            if eps.address != 0:
                b_eps = source(eps, place, block(own, EPS, n))
            else:
                noise(key, place, of_noise, b_eps)
            b_mu = source(mu, of_one, block(own, MU, n))
            b_scale = source(scale, of_one, block(own, SCALE, n))
            b_z = target(z, place, block(own, Z, n))
            if prior.mean.address != 0 and varies(prior):
                b_prior = with_logvar(plan, prior_at(plan, prior, of_one, memory))
            logvar, std = logvar_and_std(plan, own, b_scale)
            of_q, of_p = block(own, OF_Q, n), block(own, OF_P, n)
            densities(b_mu, logvar, std, b_eps, b_prior, b_z, of_q, of_p)
            deliver(z, place, b_z)
            keep_rows(plan, piece, place, log_q, of_q, rows)
            keep_rows(plan, piece, place, log_p, of_p, rows[of_tiles:])


@njit(**JIT)
def finish(plan, space, log_q, log_p):
    """All pieces are done: add the parts of rows, in order."""
    if plan.tiles > 1:
        rows = space.scratch[TILES + plan.tiles :]
        finish_rows(plan, space, rows, log_q)
        finish_rows(plan, space, rows[plan.tiles * plan.batch :], log_p)


@njit(**KERNEL)
def log_prob_forward_kernel(
    parallel, threads,  # of on_team
    memories,  # [threads, BUFFERS * BLOCK] of the computation's dtype: each worker's own
    plan,  # address of a packed plan: of mu, scale, eps, z, prior_mean, prior_scale
    scratch,  # float64[scratch_size], zeros
    mu, scale, eps, z,  # addresses, [B, D]; eps 0: drawn here
    log_q, log_p,  # addresses, [B]
    saved_key,  # address, int64[2]: the noise key, for backward
    seed, offset,
    samples,  # address, int64: what rows draw instead, as Key has it
    prior_mean, prior_scale,  # addresses, [B, D]; 0: N(0, I)
):  # fmt: skip
    """z, log q and log p."""
    if saved_key != 0:
        write(saved_key, 0, seed)
        write(saved_key, 1, offset)
    mu, scale, eps, z, prior_mean, prior_scale = operands_at(
        plan, (mu, scale, eps, z, prior_mean, prior_scale)
    )
    plan, space = plan_at(plan), workspace(memories, scratch)
    tensors = Tensors(mu, scale, eps, z, log_q, log_p)
    key, prior = Key(seed, offset, samples, plan.keyed), Prior(prior_mean, prior_scale)
    on_team(parallel, threads, work, (plan, space, tensors, key, prior))
    on_team(0, 1, finish, (plan, space, log_q, log_p))
