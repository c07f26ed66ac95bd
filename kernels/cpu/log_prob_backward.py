"""CPU code: the gradients of a sample and its log densities; the twin of ``log_prob_backward``."""

from typing import NamedTuple

from numba import njit, types

from .backward import finish_prior, scratch_size
from .forms import is_direct, slopes, to_gradient_of_scale
from .log_prob import EPS, MU, NOISE, OWN, PRIOR, SCALE, SLOPE, UNUSED, logvar_and_std, standard
from .memory import BLOCK, array_at, block, read
from .numeric import JIT, KERNEL, i64
from .philox import NOISE_BLOCKS, Key, noise
from .plan import Operand, operands_at, plan_at
from .prior import (
    PRIOR_BLOCKS,
    Prior,
    prior_at,
    prior_of_first,
    to_gradient_of_prior_scale,
    varies,
)
from .reduction import add_rows, side_by_side
from .team import on_team
from .tile import deliver, read_rows, source, target
from .walk import join, of_one_draw, pieces, places, workspace

__all__ = ["BUFFERS", "log_prob_backward_kernel", "scratch_size"]

# Blocks of a worker's memory; the column sums are float64, and take two each.
STD_SLOPE = UNUSED
DZ, DLOG_Q, DLOG_P, DMU, DSCALE, DEPS, DMEAN, DPRIOR_SCALE, SUMS = range(OWN, OWN + 9)
BUFFERS = SUMS + 4


class Tensors(NamedTuple):
    """What workers read and write; address 0: absent, or not wanted."""

    mu: Operand
    scale: Operand
    eps: Operand
    dz: Operand
    dmu: Operand
    dscale: Operand
    deps: Operand
    dlog_q: int  # addresses
    dlog_p: int
    saved_key: int
    samples: int


class Sent(NamedTuple):
    """What is sent to the elements of a block."""

    has_dz: bool
    dz: types.Array
    by_path: bool  # of dlog_q: goes along the path
    by_parameters: bool  # or to those of q
    dlog_q: types.Array
    has_dlog_p: bool
    dlog_p: types.Array


class Gradients(NamedTuple):
    """Of the elements of a block."""

    dmu: types.Array
    dscale: types.Array
    deps: types.Array
    dmean: types.Array  # of the prior's mean, and logvar
    dprior: types.Array


@njit(**JIT)
def gradients(mu, std, eps, std_slope, slope, prior, sent, out):
    """Of each element. What is absent is not read, whatever it holds."""
    zero, one, half = std.dtype.type(0), std.dtype.type(1), std.dtype.type(0.5)
    has_dz, dz, by_path, by_parameters, dlog_q, has_dlog_p, dlog_p = sent
    has_z = has_dz | by_path | has_dlog_p
    for i in range(len(std)):
        far = (mu[i] + std[i] * eps[i] - prior.mean[i]) * prior.root[i]
        pull = dlog_p[i] * (far * prior.root[i]) if has_dlog_p else zero
        along = dlog_q[i] * (eps[i] / std[i]) if by_path else zero
        z_mu = dz[i] if has_dz else zero
        to_z = z_mu - pull - along
        to_scale = dlog_q[i] * slope[i] if by_parameters else zero
        to_eps = dlog_q[i] * eps[i] if by_parameters else zero
        out.dmu[i] = to_z
        z_scale = to_z * (std_slope[i] * eps[i]) if has_z else zero
        z_eps = to_z * std[i] if has_z else zero
        out.dscale[i] = half * (z_scale - to_scale)
        out.deps[i] = z_eps - to_eps
        out.dmean[i] = pull
        out.dprior[i] = half * (dlog_p[i] * (far * far - one)) if has_dlog_p else zero


@njit(**JIT)
def work(plan, space, tensors, prior, dprior):
    """A worker's part: pieces until none is left."""
    mu, scale, eps, dz, dmu, dscale, deps, dlog_q, dlog_p, saved_key, samples = tensors
    own, scratch = join(space), space.scratch
    b_eps, of_noise = block(own, EPS, BLOCK), block(own, NOISE, NOISE_BLOCKS * BLOCK)
    memory, b_prior = block(own, PRIOR, PRIOR_BLOCKS * BLOCK), standard(own)
    b_dq, b_dp = block(own, DLOG_Q, BLOCK), block(own, DLOG_P, BLOCK)
    at_sums = block(own, SUMS, 0).ctypes.data
    has_dq, by_path = dlog_q != 0, plan.by_path != 0
    of_prior = (dprior.mean.address != 0) | (dprior.scale.address != 0)
    key = Key(0, 0, 0, 0)
    if eps.address == 0:
        seed, offset = read(saved_key, 0, i64(0)), read(saved_key, 1, i64(0))
        key = Key(seed, offset, samples, plan.keyed)
    for piece in pieces(plan, scratch):
        if prior.mean.address != 0 and not varies(prior):
            b_prior = prior_of_first(plan, prior, piece, memory)
        width = side_by_side(piece)
        sums = array_at(at_sums, 0.0, width), array_at(at_sums + 8 * BLOCK, 0.0, width)
        sums[0][:], sums[1][:] = 0.0, 0.0
        for place in places(plan, piece):
            n, of_one = place.rows * place.cols, of_one_draw(plan, place)
            if eps.address != 0:
                b_eps = source(eps, place, block(own, EPS, n))
            else:
                noise(key, place, of_noise, b_eps)
            if dlog_q != 0:
                read_rows(place, dlog_q, plan.dkl_row, b_dq)
            if dlog_p != 0:
                read_rows(place, dlog_p, plan.dsecond_row, b_dp)
            if prior.mean.address != 0 and varies(prior):
                b_prior = prior_at(plan, prior, of_one, memory)
            b_mu = source(mu, of_one, block(own, MU, n))
            b_scale = source(scale, of_one, block(own, SCALE, n))
            b_dz = source(dz, place, block(own, DZ, n)) if dz.address != 0 else block(own, DZ, n)
            logvar, std = logvar_and_std(plan, own, b_scale)
            std_slope, slope = block(own, STD_SLOPE, n), block(own, SLOPE, n)
            if is_direct(plan):
                slopes(plan, b_scale, std, std_slope, slope)
            else:
                std_slope = std
                slope[:] = slope.dtype.type(1)
            sent = Sent(
                dz.address != 0, b_dz, has_dq & by_path, has_dq & (not by_path), b_dq,
                dlog_p != 0, b_dp,
            )  # fmt: skip
            out = Gradients(
                target(dmu, place, block(own, DMU, n)),
                target(dscale, place, block(own, DSCALE, n)),
                target(deps, place, block(own, DEPS, n)),
                target(dprior.mean, place, block(own, DMEAN, n)),
                target(dprior.scale, place, block(own, DPRIOR_SCALE, n)),
            )
            gradients(b_mu, std, b_eps, std_slope, slope, b_prior, sent, out)
            to_gradient_of_scale(plan, logvar, out.dscale)
            deliver(dmu, place, out.dmu)
            deliver(dscale, place, out.dscale)
            deliver(deps, place, out.deps)
            if of_prior:
                to_gradient_of_prior_scale(plan, b_prior.root, out.dprior)
                if plan.prior_sums != 0:
                    add_rows(sums[0], out.dmean)
                    add_rows(sums[1], out.dprior)
                else:
                    deliver(dprior.mean, place, out.dmean)
                    deliver(dprior.scale, place, out.dprior)
        if plan.prior_sums != 0:
            finish_prior(plan, piece, block(own, DMEAN, piece.cols), sums, scratch, dprior)


@njit(**KERNEL)
def log_prob_backward_kernel(
    parallel, threads,  # of on_team
    memories,  # [threads, BUFFERS * BLOCK] of the computation's dtype: each worker's own
    plan,  # of mu, scale, eps, dz, dmu, dscale, deps, prior_mean, prior_scale and their gradients
    scratch,  # float64[scratch_size], zeros
    mu, scale, eps,  # addresses, [B, D]; eps 0: drawn in forward, again here
    dz, dlog_q, dlog_p,  # addresses: upstream gradients
    saved_key, samples,  # addresses: what forward left, and had
    dmu, dscale, deps,  # addresses, [B, D]
    prior_mean, prior_scale,  # addresses, [B, D]; 0: N(0, I)
    dprior_mean, dprior_scale,  # addresses, [B, D], or if they are sums [D]
):  # fmt: skip
    """The gradients. An address of 0: absent or not wanted."""
    operands = operands_at(
        plan,
        (
            mu, scale, eps, dz, dmu, dscale, deps,
            prior_mean, prior_scale, dprior_mean, dprior_scale,
        ),
    )  # fmt: skip
    plan, space = plan_at(plan), workspace(memories, scratch)
    mu, scale, eps, dz, dmu, dscale, deps = operands[:7]
    tensors = Tensors(
        mu, scale, eps, dz, dmu, dscale, deps, dlog_q, dlog_p, saved_key, samples
    )  # fmt: skip
    prior, dprior = Prior(operands[7], operands[8]), Prior(operands[9], operands[10])
    on_team(parallel, threads, work, (plan, space, tensors, prior, dprior))
