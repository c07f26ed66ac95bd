"""CPU code: z, kl and kl_of_mean in one pass; the twin of ``forward`` (the formulas are there)."""

from typing import NamedTuple

from numba import njit, types
from numba.extending import register_jitable

from .forms import Terms, direct_terms, is_direct, logvar_of
from .gaussian import exp_terms
from .memory import BLOCK, array_at, block, write
from .numeric import JIT, KERNEL
from .philox import NOISE_BLOCKS, Key, noise
from .plan import ALL, BATCH, Operand, operands_at, plan_at
from .prior import (
    PRIOR_BLOCKS,
    Prior,
    distances,
    phi_to,
    prior_at,
    prior_of_first,
    r_terms,
    varies,
)
from .reduction import accumulate, add_rows, copy, fold, side_by_side, total
from .team import on_team
from .tile import Place, deliver, source, target
from .walk import TILES, join, pieces, places, tile_sums, workspace

# Blocks of a worker's memory; the column sums are float64, and take two each.
MU, SCALE, LOGVAR, STD, EXPM1, PHI, EPS, Z, TWICE_KL = range(9)
NOISE = 9
SUMS = NOISE + NOISE_BLOCKS
BUFFERS = SUMS + 6
# With a prior:
PRIOR = BUFFERS
FAR = PRIOR + PRIOR_BLOCKS
PRIOR_BUFFERS = FAR + 1


class Tensors(NamedTuple):
    """What workers read and write; address 0: absent, or not wanted."""

    mu: Operand
    scale: Operand
    eps: Operand
    z: Operand
    kl: int  # address
    means: int  # address


class Sums(NamedTuple):
    """What workers leave in scratch for who adds it up, float64."""

    pieces: types.Array  # [3, pieces]: of twice kl, mu, logvar; by column [1, i_tile] of tiles
    rows: types.Array  # [tiles, B]: twice kl, if it is per row and there are several tiles
    of_columns: types.Array  # [ranges, D]: twice kl, if it is per column
    columns: types.Array  # [ranges, 2, D] of mu, logvar, if by column and there are several ranges


@register_jitable(**JIT)
def _parts(plan):
    """Lengths of the parts of scratch: counters, then those of ``Sums``."""
    rows = plan.tiles * plan.batch if plan.per_row != 0 and plan.tiles > 1 else 0
    columns = 2 * plan.ranges * plan.event if plan.mean_over == BATCH and plan.ranges > 1 else 0
    of_columns = plan.ranges * plan.event if plan.per_col != 0 else 0
    return TILES + plan.tiles, 3 * plan.tiles * plan.ranges, rows, of_columns, columns


def scratch_size(plan):
    """Length of scratch."""
    return sum(_parts(plan))


@njit(**JIT)
def sums_in(plan, scratch):
    """The sums of scratch."""
    counters, pieces, rows, of_columns, _ = _parts(plan)
    scratch = scratch[counters:]
    by_piece = scratch[:pieces].reshape(3, pieces // 3)
    columns = scratch[pieces + rows :]
    return Sums(by_piece, scratch[pieces:], columns, columns[of_columns:])


@njit(**JIT)
def sample_and_kl(mu, logvar, eps, z, twice_kl):
    """The terms of each element."""
    for i in range(len(mu)):
        std, _, phi = exp_terms(logvar[i])
        z[i] = mu[i] + std * eps[i]
        twice_kl[i] = mu[i] * mu[i] + phi


@njit(**JIT)
def sample_and_kl_of_terms(mu, far, terms, eps, z, twice_kl):
    """The same, of terms that are there; `far`: mu, as far as it is from the prior's."""
    for i in range(len(mu)):
        z[i] = mu[i] + terms.std[i] * eps[i]
        twice_kl[i] = far[i] * far[i] + terms.phi[i]


@njit(**JIT)
def sample_and_kl_to_logarithm(mu, logvar, prior, eps, z, twice_kl):
    """The terms of each element to its prior."""
    for i in range(len(mu)):
        _, phi = r_terms(logvar[i], prior.logvar[i])
        far = (mu[i] - prior.mean[i]) * prior.root[i]
        z[i] = mu[i] + exp_terms(logvar[i])[0] * eps[i]
        twice_kl[i] = far * far + phi


@njit(**JIT)
def sample_and_kl_to(plan, own, prior, mu, scale, eps, z, twice_kl):
    """The same of a block, in any form; its logvar."""
    n = len(mu)
    logvar = block(own, LOGVAR, n)
    if not is_direct(plan):
        logvar = logvar_of(plan, scale, logvar)
        sample_and_kl_to_logarithm(mu, logvar, prior, eps, z, twice_kl)
        return logvar
    std, expm1, far = block(own, STD, n), block(own, EXPM1, n), block(own, FAR, n)
    terms = Terms(logvar, std, expm1, block(own, PHI, n))
    phi_to(plan, scale, prior, terms)
    distances(prior, mu, far)
    sample_and_kl_of_terms(mu, far, terms, eps, z, twice_kl)
    return logvar


@njit(**JIT)
def write_halves(address, first, twice_kl):
    """The KLs of rows of one column each."""
    half = twice_kl.dtype.type(0.5)
    for i in range(len(twice_kl)):
        write(address, first + i, half * twice_kl[i])


@njit(**JIT)
def keep_rows(plan, piece, place, kl, twice_kl, rows):
    """Half the sum of each row of a block, or where there are several tiles the row's share of the
    sum.
    """
    dtype = twice_kl.dtype.type
    if plan.event == 1:
        write_halves(kl, place.row, twice_kl)
        return
    for r in range(place.rows):
        row_sum = total(twice_kl[r * place.cols : (r + 1) * place.cols])
        if plan.tiles == 1:
            write(kl, place.row + r, dtype(0.5 * row_sum))
        else:
            rows[piece.i_tile * plan.batch + place.row + r] = row_sum


@njit(**JIT)
def finish_rows(plan, space, rows, out):
    """Of each row, half the sum of the shares that ``keep_rows`` has left."""
    dtype = space.memories.dtype.type
    for row in range(plan.batch):
        row_sum = 0.0
        for i_tile in range(plan.tiles):
            row_sum += rows[i_tile * plan.batch + row]
        write(out, row, dtype(0.5 * row_sum))


@njit(**JIT)
def finish_columns(plan, piece, own, prior, of_mu, of_logvar, means):
    """The means of one tile's columns, and twice their share of kl_of_mean."""
    n, B, D = piece.cols, plan.batch, plan.event
    b_mu, b_logvar, twice_kl = block(own, MU, n), block(own, LOGVAR, n), block(own, TWICE_KL, n)
    for i in range(n):
        b_mu[i] = of_mu[i] / B
        b_logvar[i] = of_logvar[i] / B
        write(means, piece.col + i, b_mu[i])
        write(means, D + piece.col + i, b_logvar[i])
    unused = block(own, Z, n)
    if prior is not None:  # the same for all samples
        place = Place(piece.first_row, 1, piece.col, n, D, plan.inner)
        b_prior = prior_at(plan, prior, place, block(own, PRIOR, PRIOR_BLOCKS * BLOCK))
        sample_and_kl_to_logarithm(b_mu, b_logvar, b_prior, b_mu, unused, twice_kl)
    else:
        sample_and_kl(b_mu, b_logvar, b_mu, unused, twice_kl)
    return total(twice_kl)


@njit(**JIT)
def work(plan, space, tensors, key, prior):
    """A worker's part: pieces until none is left."""
    mu, scale, eps, z, kl, means = tensors
    own, scratch = join(space), space.scratch
    sums = sums_in(plan, scratch)
    at_sums, of_noise = block(own, SUMS, 0).ctypes.data, block(own, NOISE, NOISE_BLOCKS * BLOCK)
    b_eps, of_prior = block(own, EPS, BLOCK), block(own, PRIOR, PRIOR_BLOCKS * BLOCK)
    for piece in pieces(plan, scratch):
        kl_sum = mu_sum = logvar_sum = 0.0
        width = side_by_side(piece)
        of_mu = array_at(at_sums, 0.0, width)
        of_logvar = array_at(at_sums + 8 * BLOCK, 0.0, width)
        of_kl = array_at(at_sums + 16 * BLOCK, 0.0, width)
        of_mu[:], of_logvar[:] = 0.0, 0.0
        if plan.per_col != 0:
            of_kl[:] = 0.0
        if prior is not None:
            b_prior = prior_of_first(plan, prior, piece, of_prior)
        for place in places(plan, piece):
            n = place.rows * place.cols
            if eps.address != 0:
                b_eps = source(eps, place, block(own, EPS, n))
            elif z.address != 0:
                noise(key, place, of_noise, b_eps)
            b_mu = source(mu, place, block(own, MU, n))
            b_scale = source(scale, place, block(own, SCALE, n))
            b_z, twice_kl = target(z, place, block(own, Z, n)), block(own, TWICE_KL, n)
            b_logvar = block(own, LOGVAR, n)
            if prior is not None:
                if varies(prior) and place.row != piece.first_row:
                    b_prior = prior_at(plan, prior, place, of_prior)
                b_logvar = sample_and_kl_to(plan, own, b_prior, b_mu, b_scale, b_eps, b_z, twice_kl)
            elif is_direct(plan):
                b_std, b_expm1 = block(own, STD, n), block(own, EXPM1, n)
                terms = Terms(b_logvar, b_std, b_expm1, block(own, PHI, n))
                direct_terms(plan, b_scale, terms)
                sample_and_kl_of_terms(b_mu, b_mu, terms, b_eps, b_z, twice_kl)
            else:
                b_logvar = logvar_of(plan, b_scale, b_logvar)
                sample_and_kl(b_mu, b_logvar, b_eps, b_z, twice_kl)
            deliver(z, place, b_z)
            if kl != 0 and plan.per_row != 0:
                keep_rows(plan, piece, place, kl, twice_kl, sums.rows)
            elif plan.per_col != 0:
                add_rows(of_kl, twice_kl)
            elif kl != 0:
                kl_sum += total(twice_kl)
            if plan.mean_over == BATCH:
                add_rows(of_mu, b_mu)
                add_rows(of_logvar, b_logvar)
            elif plan.mean_over == ALL:
                mu_sum += total(b_mu)
                logvar_sum += total(b_logvar)
        sums.pieces[0, piece.index] = kl_sum
        if plan.per_col != 0:
            fold(of_kl, piece.cols)
            here = piece.i_range * plan.event + piece.col
            copy(of_kl[: piece.cols], sums.of_columns[here : here + piece.cols])
        if plan.mean_over == BATCH:
            if tile_sums(plan, piece, (of_mu, of_logvar), sums.columns, scratch):
                twice = finish_columns(plan, piece, own, prior, of_mu, of_logvar, means)
                sums.pieces[1, piece.i_tile] = twice
        elif plan.mean_over == ALL:
            sums.pieces[1, piece.index], sums.pieces[2, piece.index] = mu_sum, logvar_sum


@njit(**JIT)
def finish(plan, space, kl, kl_of_mean, means, prior):
    """All pieces are done: add their sums, in order."""
    dtype, scratch = space.memories.dtype.type, space.scratch
    B, D = plan.batch, plan.event
    sums = sums_in(plan, scratch)
    if plan.per_col != 0:
        of_kl = sums.of_columns[:D]
        for here in range(D, plan.ranges * D, D):
            accumulate(of_kl, sums.of_columns[here : here + D])
        for j in range(D):
            write(kl, j, dtype(0.5 * of_kl[j] / plan.denominator))
    elif kl != 0 and plan.per_row == 0:
        write(kl, 0, dtype(0.5 * total(sums.pieces[0]) / plan.denominator))
    if kl != 0 and plan.per_row != 0 and plan.tiles > 1:
        finish_rows(plan, space, sums.rows, kl)
    if plan.mean_over == BATCH:
        write(kl_of_mean, 0, dtype(0.5 * total(sums.pieces[1, : plan.tiles])))
    if plan.mean_over == ALL:
        mean_mu = dtype(total(sums.pieces[1]) / (float(B) * D))
        mean_logvar = dtype(total(sums.pieces[2]) / (float(B) * D))
        write(means, 0, mean_mu)
        write(means, 1, mean_logvar)
        if prior is not None:  # of which all elements are one
            memory = block(space.memories, PRIOR, PRIOR_BLOCKS * BLOCK)
            b_prior = prior_at(plan, prior, Place(0, 1, 0, 1, D, plan.inner), memory)
            mean_mu = (mean_mu - b_prior.mean[0]) * b_prior.root[0]
            phi = r_terms(mean_logvar, b_prior.logvar[0])[1]
        else:
            phi = exp_terms(mean_logvar)[2]
        write(kl_of_mean, 0, dtype(0.5 * (float(mean_mu) * float(mean_mu) + phi)))


@njit(**KERNEL)
def forward_kernel(
    parallel, threads,  # of on_team
    memories,  # [threads, BUFFERS * BLOCK] of the computation's dtype: each worker's own
    plan,  # address of a packed plan: of mu, scale, eps, z
    scratch,  # float64[scratch_size], zeros
    mu, scale, eps, z,  # addresses, [B, D]; eps 0: drawn here
    kl,  # address, [B] if per row, [D] if per column, else []
    kl_of_mean,  # address, []
    means,  # address, [2, D] by column, else [2]: of mu and logvar, for backward
    saved_key,  # address, int64[2]: the noise key, for backward
    seed, offset,
    samples,  # address, int64: what rows draw instead, as Key has it
):  # fmt: skip
    """z, kl and kl_of_mean. An address of 0: absent or not wanted."""
    if saved_key != 0:
        write(saved_key, 0, seed)
        write(saved_key, 1, offset)
    mu, scale, eps, z = operands_at(plan, (mu, scale, eps, z))
    plan, space = plan_at(plan), workspace(memories, scratch)
    tensors = Tensors(mu, scale, eps, z, kl, means)
    key = Key(seed, offset, samples, plan.keyed)
    on_team(parallel, threads, work, (plan, space, tensors, key, None))
    on_team(0, 1, finish, (plan, space, kl, kl_of_mean, means, None))


@njit(**KERNEL)
def forward_to_prior_kernel(
    parallel, threads,
    memories,  # [threads, PRIOR_BUFFERS * BLOCK]
    plan,  # of mu, scale, eps, z, prior_mean, prior_scale
    scratch,
    mu, scale, eps, z, kl, kl_of_mean, means, saved_key, seed, offset, samples,
    prior_mean, prior_scale,  # addresses, [B, D]
):  # fmt: skip
    """The same to a prior; kl_of_mean of one that all samples share."""
    if saved_key != 0:
        write(saved_key, 0, seed)
        write(saved_key, 1, offset)
    mu, scale, eps, z, prior_mean, prior_scale = operands_at(
        plan, (mu, scale, eps, z, prior_mean, prior_scale)
    )
    plan, space = plan_at(plan), workspace(memories, scratch)
    tensors = Tensors(mu, scale, eps, z, kl, means)
    key = Key(seed, offset, samples, plan.keyed)
    prior = Prior(prior_mean, prior_scale)
    on_team(parallel, threads, work, (plan, space, tensors, key, prior))
    on_team(0, 1, finish, (plan, space, kl, kl_of_mean, means, prior))
