"""CPU code: the gradients in one pass; the twin of ``backward`` (the derivation is there)."""

from typing import NamedTuple

from numba import njit

from .forms import Terms, direct_terms, is_direct, logvar_of, slopes, to_gradient_of_scale
from .gradients import (
    Gradients,
    Upstream,
    Values,
    gradients,
    gradients_of_prior,
    gradients_of_terms,
    gradients_to_logarithm,
)
from .memory import BLOCK, array_at, block, read
from .numeric import JIT, KERNEL, i64
from .philox import NOISE_BLOCKS, Key, noise
from .plan import BATCH, Operand, operands_at, plan_at
from .prior import (
    PRIOR_BLOCKS,
    Prior,
    distances,
    expm1_to,
    prior_at,
    prior_of_first,
    to_gradient_of_prior_scale,
    varies,
)
from .reduction import add_rows, copy, repeat, side_by_side
from .team import on_team
from .tile import Place, deliver, move_run, read_rows, read_run, source, target
from .walk import TILES, join, pieces, places, tile_sums, workspace

# Blocks of a worker's memory.
MU, SCALE, LOGVAR, STD, EXPM1, PHI, EPS, DZ, DMU, DSCALE, DEPS = range(11)
NOISE = 11
STD_SLOPE = PHI  # which backward has no use for
DKL, OF_MU, OF_LOGVAR, SLOPE = range(NOISE + NOISE_BLOCKS, NOISE + NOISE_BLOCKS + 4)
BUFFERS = SLOPE + 1
# With a prior; its column sums are float64, and take two each.
PRIOR = BUFFERS
FAR, PULL, DMEAN, DPRIOR_SCALE, OF_PRIOR, SUMS = range(
    PRIOR + PRIOR_BLOCKS, PRIOR + PRIOR_BLOCKS + 6
)
PRIOR_BUFFERS = SUMS + 4


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
    samples: int


def scratch_size(plan):
    """Length of scratch: counters, then [ranges, 2, D] if there are sums and several ranges."""
    columns = 2 * plan.ranges * plan.event if plan.prior_sums != 0 and plan.ranges > 1 else 0
    return TILES + plan.tiles + columns


@njit(**JIT)
def of_mean_gradients(plan, piece, own, tensors, prior, dkl, of_mean):
    """What kl_of_mean sends to each element of a block: dkl_of_mean times the gradient of a KL of
    means.

    It is the same for every row. Those of of_mean are zeros before, dkl is overwritten.
    """
    B, D, col, cols = plan.batch, plan.event, piece.col, piece.cols
    n = piece.block_rows * cols
    by_column = plan.mean_over == BATCH
    of_mu, of_logvar, of_prior = of_mean
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
    of_mu[:cols], of_logvar[:cols] = zero, zero
    row_mu, row_logvar = block(own, DMU, cols), block(own, DSCALE, cols)
    values = Values(b_mu, b_logvar, b_mu)
    sent = Upstream(False, b_mu, True, dkl, False, of_mu, of_logvar)
    out = Gradients(row_mu, row_logvar, block(own, DEPS, cols))
    if prior is not None:  # the same for all samples
        place = Place(piece.first_row, 1, col, cols, D, plan.inner)
        b_prior = prior_at(plan, prior, place, block(own, PRIOR, PRIOR_BLOCKS * BLOCK))
        far, expm1, row_prior = block(own, FAR, cols), block(own, EXPM1, cols), block(own, DZ, cols)
        gradients_to_logarithm(values, b_prior, sent, out, far, expm1)
        gradients_of_prior(far, b_prior.root, expm1, sent, of_mu, b_mu, row_prior)
        repeat(row_prior, of_prior[:n])
    else:
        gradients(values, sent, out)
    repeat(row_mu, of_mu[:n])
    repeat(row_logvar, of_logvar[:n])


@njit(**JIT)
def read_columns(plan, piece, address, dkl):
    """The upstream gradient of each column's KL, for each element of a block."""
    cols, step, denominator = piece.cols, plan.dkl_row, dkl.dtype.type(plan.denominator)
    read_run(address, piece.col * step, step, dkl[:cols])
    for j in range(cols):
        dkl[j] /= denominator
    repeat(dkl[:cols], dkl[: piece.block_rows * cols])


@njit(**JIT)
def targets(dprior, place, own):
    """Where to put the gradients of a block's prior."""
    n = place.rows * place.cols
    dmean = target(dprior.mean, place, block(own, DMEAN, n))
    return dmean, target(dprior.scale, place, block(own, DPRIOR_SCALE, n))


@njit(**JIT)
def gradients_to(plan, own, prior, dprior, place, scale, mu, eps, sent, out):
    """Those of a block against its prior, and of that; its logvar."""
    n = len(scale)
    logvar, far, expm1 = block(own, LOGVAR, n), block(own, FAR, n), block(own, EXPM1, n)
    if is_direct(plan):
        std, std_slope = block(own, STD, n), block(own, STD_SLOPE, n)
        terms = Terms(logvar, std, expm1, std_slope)
        expm1_to(plan, scale, prior, terms)
        distances(prior, mu, far)
        pull, slope = block(own, PULL, n), block(own, SLOPE, n)
        for i in range(n):
            pull[i] = far[i] * prior.root[i]
        slopes(plan, scale, std, std_slope, slope)
        gradients_of_terms(Values(pull, logvar, eps), terms, std_slope, slope, sent, out)
    else:
        logvar = logvar_of(plan, scale, logvar)
        gradients_to_logarithm(Values(mu, logvar, eps), prior, sent, out, far, expm1)
    if dprior.mean.address != 0 or dprior.scale.address != 0:
        dmean, dscale = targets(dprior, place, own)
        gradients_of_prior(far, prior.root, expm1, sent, block(own, OF_PRIOR, n), dmean, dscale)
        to_gradient_of_prior_scale(plan, prior.root, dscale)
    return logvar


@njit(**JIT)
def finish_prior(plan, piece, values, sums, scratch, dprior):
    """After a piece: the gradients of a prior that samples share, if all ranges of the tile are
    done. `values`: room for a row.
    """
    n = piece.cols
    if not tile_sums(plan, piece, sums, scratch[TILES + plan.tiles :], scratch):
        return
    for tensor, of_tile in zip(dprior, sums):
        if tensor.address != 0:
            copy(of_tile[:n], values)
            move_run(tensor.address, tensor.kind, piece.col, 1, values, True)


@njit(**JIT)
def work(plan, space, tensors, prior, dprior):
    """A worker's part: pieces until none is left."""
    mu, scale, eps, dz, dmu, dscale, deps, dkl, dkl_of_mean, _, saved_key, samples = tensors
    own, scratch = join(space), space.scratch
    dtype, zero = own.dtype.type, own.dtype.type(0)
    has_dz, has_dkl, has_of_mean = dz.address != 0, dkl != 0, dkl_of_mean != 0
    most = min(BLOCK, plan.batch * plan.event)
    b_dkl = block(own, DKL, most)
    of_mu, of_logvar = block(own, OF_MU, most), block(own, OF_LOGVAR, most)
    of_mu[:], of_logvar[:] = zero, zero
    of_prior = of_mu
    if prior is not None:
        of_prior = block(own, OF_PRIOR, most)
        of_prior[:] = zero
    b_eps, of_noise = block(own, EPS, BLOCK), block(own, NOISE, NOISE_BLOCKS * BLOCK)
    memory = block(own, PRIOR, PRIOR_BLOCKS * BLOCK)
    is_drawn = has_dz and dscale.address != 0 and eps.address == 0
    key = Key(0, 0, 0, 0)
    if is_drawn:
        seed, offset = read(saved_key, 0, i64(0)), read(saved_key, 1, i64(0))
        key = Key(seed, offset, samples, plan.keyed)
    for piece in pieces(plan, scratch):
        if prior is not None:
            b_prior = prior_of_first(plan, prior, piece, memory)
            width, at_sums = side_by_side(piece), block(own, SUMS, 0).ctypes.data
            sums = array_at(at_sums, 0.0, width), array_at(at_sums + 8 * BLOCK, 0.0, width)
            sums[0][:], sums[1][:] = 0.0, 0.0
        if has_of_mean:
            of_mean = (of_mu, of_logvar, of_prior)
            of_mean_gradients(plan, piece, own, tensors, prior, b_dkl, of_mean)
        if plan.per_col != 0 and has_dkl:
            read_columns(plan, piece, dkl, b_dkl)
        elif has_dkl and plan.per_row == 0:
            b_dkl[: piece.block_rows * piece.cols] = read(dkl, 0, zero) / dtype(plan.denominator)
        for place in places(plan, piece):
            n = place.rows * place.cols
            if eps.address != 0:
                b_eps = source(eps, place, block(own, EPS, n))
            elif is_drawn:
                noise(key, place, of_noise, b_eps)
            if has_dkl and plan.per_row != 0:
                read_rows(place, dkl, plan.dkl_row, b_dkl)
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
            if prior is not None:
                if varies(prior) and place.row != piece.first_row:
                    b_prior = prior_at(plan, prior, place, memory)
                b_logvar = gradients_to(
                    plan, own, b_prior, dprior, place, b_scale, b_mu, b_eps, sent, out
                )
            elif is_direct(plan):
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
            if prior is not None and (dprior.mean.address != 0 or dprior.scale.address != 0):
                b_dmean, b_dprior_scale = targets(dprior, place, own)
                if plan.prior_sums != 0:
                    add_rows(sums[0], b_dmean)
                    add_rows(sums[1], b_dprior_scale)
                else:
                    deliver(dprior.mean, place, b_dmean)
                    deliver(dprior.scale, place, b_dprior_scale)
        if prior is not None:
            if plan.prior_sums != 0:
                finish_prior(plan, piece, block(own, DMEAN, piece.cols), sums, scratch, dprior)


@njit(**KERNEL)
def backward_kernel(
    parallel, threads,  # of on_team
    memories,  # [threads, BUFFERS * BLOCK] of the computation's dtype: each worker's own
    plan,  # address of a packed plan: of mu, scale, eps, dz, dmu, dscale, deps
    scratch,  # float64[scratch_size], zeros
    mu, scale, eps,  # addresses, [B, D]; eps 0: drawn in forward, again here
    dz, dkl, dkl_of_mean,  # addresses: upstream gradients
    saved_key, means, samples,  # addresses: what forward left, and had
    dmu, dscale, deps,  # addresses, [B, D]
):  # fmt: skip
    """The gradients. An address of 0: absent or not wanted."""
    operands = operands_at(plan, (mu, scale, eps, dz, dmu, dscale, deps))
    plan, space = plan_at(plan), workspace(memories, scratch)
    mu, scale, eps, dz, dmu, dscale, deps = operands
    tensors = Tensors(
        mu, scale, eps, dz, dmu, dscale, deps, dkl, dkl_of_mean, means, saved_key, samples
    )  # fmt: skip
    on_team(parallel, threads, work, (plan, space, tensors, None, None))


@njit(**KERNEL)
def backward_to_prior_kernel(
    parallel, threads,
    memories,  # [threads, PRIOR_BUFFERS * BLOCK]
    plan,  # of mu, scale, eps, dz, dmu, dscale, deps, prior_mean, prior_scale and their gradients
    scratch,
    mu, scale, eps, dz, dkl, dkl_of_mean, saved_key, means, samples, dmu, dscale, deps,
    prior_mean, prior_scale,  # addresses, [B, D]
    dprior_mean, dprior_scale,  # addresses, [B, D], or if they are sums [D]
):  # fmt: skip
    """The same against a prior."""
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
        mu, scale, eps, dz, dmu, dscale, deps, dkl, dkl_of_mean, means, saved_key, samples
    )  # fmt: skip
    prior, dprior = Prior(operands[7], operands[8]), Prior(operands[9], operands[10])
    on_team(parallel, threads, work, (plan, space, tensors, prior, dprior))
