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
from .reduction import accumulate, add_rows, copy, fold, side_by_side, total
from .team import on_team
from .tile import deliver, source, target
from .walk import TILES, is_last_range, join, pieces, places, workspace

# Blocks of a worker's memory; the column sums are float64, and take two each.
MU, SCALE, LOGVAR, STD, EXPM1, PHI, EPS, Z, TWICE_KL = range(9)
NOISE = 9
SUMS = NOISE + NOISE_BLOCKS
BUFFERS = SUMS + 4


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
    columns: types.Array  # [ranges, 2, D] of mu, logvar, if by column and there are several ranges


@register_jitable(**JIT)
def _parts(plan):
    """Lengths of the parts of scratch: counters, then those of ``Sums``."""
    rows = plan.tiles * plan.batch if plan.per_row != 0 and plan.tiles > 1 else 0
    columns = 2 * plan.ranges * plan.event if plan.mean_over == BATCH and plan.ranges > 1 else 0
    return TILES + plan.tiles, 3 * plan.tiles * plan.ranges, rows, columns


def scratch_size(plan):
    """Length of scratch."""
    return sum(_parts(plan))


@njit(**JIT)
def sums_in(plan, scratch):
    """The sums of scratch."""
    counters, pieces, rows, _ = _parts(plan)
    scratch = scratch[counters:]
    by_piece = scratch[:pieces].reshape(3, pieces // 3)
    return Sums(by_piece, scratch[pieces:], scratch[pieces + rows :])


@njit(**JIT)
def sample_and_kl(mu, logvar, eps, z, twice_kl):
    """The terms of each element."""
    for i in range(len(mu)):
        std, _, phi = exp_terms(logvar[i])
        z[i] = mu[i] + std * eps[i]
        twice_kl[i] = mu[i] * mu[i] + phi


@njit(**JIT)
def sample_and_kl_of_terms(mu, terms, eps, z, twice_kl):
    """The same, of terms that are there."""
    for i in range(len(mu)):
        z[i] = mu[i] + terms.std[i] * eps[i]
        twice_kl[i] = mu[i] * mu[i] + terms.phi[i]


@njit(**JIT)
def write_halves(address, first, twice_kl):
    """The KLs of rows of one column each."""
    half = twice_kl.dtype.type(0.5)
    for i in range(len(twice_kl)):
        write(address, first + i, half * twice_kl[i])


@njit(**JIT)
def keep_rows(plan, piece, place, kl, twice_kl, rows):
    """The KL of each row of a block, or where there are several tiles the row's share of it."""
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
def finish_columns(plan, piece, own, of_mu, of_logvar, means):
    """The means of one tile's columns, and twice their share of kl_of_mean."""
    n, B, D = len(of_mu), plan.batch, plan.event
    b_mu, b_logvar, twice_kl = block(own, MU, n), block(own, LOGVAR, n), block(own, TWICE_KL, n)
    for i in range(n):
        b_mu[i] = of_mu[i] / B
        b_logvar[i] = of_logvar[i] / B
        write(means, piece.col + i, b_mu[i])
        write(means, D + piece.col + i, b_logvar[i])
    sample_and_kl(b_mu, b_logvar, b_mu, block(own, Z, n), twice_kl)
    return total(twice_kl)


@njit(**JIT)
def finish_tile(plan, piece, own, column_sums, scratch, means):
    """After a piece: its column sums, and if it is the last range of its tile those of the tile."""
    sums = sums_in(plan, scratch)
    of_mu, of_logvar = column_sums
    cols, D = piece.cols, plan.event
    fold(of_mu, cols)
    fold(of_logvar, cols)
    of_mu, of_logvar = of_mu[:cols], of_logvar[:cols]
    if plan.ranges > 1:
        here = 2 * piece.i_range * D + piece.col
        copy(of_mu, sums.columns[here : here + cols])
        copy(of_logvar, sums.columns[here + D : here + D + cols])
        if not is_last_range(plan, piece, scratch):
            return
        of_mu[:], of_logvar[:] = 0.0, 0.0
        for here in range(piece.col, 2 * plan.ranges * D, 2 * D):
            accumulate(of_mu, sums.columns[here : here + cols])
            accumulate(of_logvar, sums.columns[here + D : here + D + cols])
    sums.pieces[1, piece.i_tile] = finish_columns(plan, piece, own, of_mu, of_logvar, means)


@njit(**JIT)
def work(plan, space, tensors, key):
    """A worker's part: pieces until none is left."""
    mu, scale, eps, z, kl, means = tensors
    own, scratch = join(space), space.scratch
    sums = sums_in(plan, scratch)
    at_sums, of_noise = block(own, SUMS, 0).ctypes.data, block(own, NOISE, NOISE_BLOCKS * BLOCK)
    b_eps = block(own, EPS, BLOCK)
    for piece in pieces(plan, scratch):
        kl_sum = mu_sum = logvar_sum = 0.0
        width = side_by_side(piece)
        of_mu = array_at(at_sums, 0.0, width)
        of_logvar = array_at(at_sums + 8 * BLOCK, 0.0, width)
        of_mu[:], of_logvar[:] = 0.0, 0.0
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
            if is_direct(plan):
                b_std, b_expm1 = block(own, STD, n), block(own, EXPM1, n)
                terms = Terms(b_logvar, b_std, b_expm1, block(own, PHI, n))
                direct_terms(plan, b_scale, terms)
                sample_and_kl_of_terms(b_mu, terms, b_eps, b_z, twice_kl)
            else:
                b_logvar = logvar_of(plan, b_scale, b_logvar)
                sample_and_kl(b_mu, b_logvar, b_eps, b_z, twice_kl)
            deliver(z, place, b_z)
            if kl != 0 and plan.per_row != 0:
                keep_rows(plan, piece, place, kl, twice_kl, sums.rows)
            elif kl != 0:
                kl_sum += total(twice_kl)
            if plan.mean_over == BATCH:
                add_rows(of_mu, b_mu)
                add_rows(of_logvar, b_logvar)
            elif plan.mean_over == ALL:
                mu_sum += total(b_mu)
                logvar_sum += total(b_logvar)
        sums.pieces[0, piece.index] = kl_sum
        if plan.mean_over == BATCH:
            finish_tile(plan, piece, own, (of_mu, of_logvar), scratch, means)
        elif plan.mean_over == ALL:
            sums.pieces[1, piece.index], sums.pieces[2, piece.index] = mu_sum, logvar_sum


@njit(**JIT)
def finish(plan, space, kl, kl_of_mean, means):
    """All pieces are done: add their sums, in order."""
    dtype, scratch = space.memories.dtype.type, space.scratch
    B, D = plan.batch, plan.event
    sums = sums_in(plan, scratch)
    if kl != 0 and plan.per_row == 0:
        write(kl, 0, dtype(0.5 * total(sums.pieces[0]) / plan.denominator))
    if kl != 0 and plan.per_row != 0 and plan.tiles > 1:
        for row in range(B):
            row_sum = 0.0
            for i_tile in range(plan.tiles):
                row_sum += sums.rows[i_tile * B + row]
            write(kl, row, dtype(0.5 * row_sum))
    if plan.mean_over == BATCH:
        write(kl_of_mean, 0, dtype(0.5 * total(sums.pieces[1, : plan.tiles])))
    if plan.mean_over == ALL:
        mean_mu = dtype(total(sums.pieces[1]) / (float(B) * D))
        mean_logvar = dtype(total(sums.pieces[2]) / (float(B) * D))
        write(means, 0, mean_mu)
        write(means, 1, mean_logvar)
        phi = exp_terms(mean_logvar)[2]
        write(kl_of_mean, 0, dtype(0.5 * (float(mean_mu) * float(mean_mu) + phi)))


@njit(**KERNEL)
def forward_kernel(
    parallel, threads,  # of on_team
    memories,  # [threads, BUFFERS * BLOCK] of the computation's dtype: each worker's own
    plan,  # address of a packed plan: of mu, scale, eps, z
    scratch,  # float64[scratch_size], zeros
    mu, scale, eps, z,  # addresses, [B, D]; eps 0: drawn here
    kl,  # address, [B] if per row, else []
    kl_of_mean,  # address, []
    means,  # address, [2, D] by column, else [2]: of mu and logvar, for backward
    saved_key,  # address, int64[2]: the noise key, for backward
    seed, offset,
):  # fmt: skip
    """z, kl and kl_of_mean. An address of 0: absent or not wanted."""
    if saved_key != 0:
        write(saved_key, 0, seed)
        write(saved_key, 1, offset)
    mu, scale, eps, z = operands_at(plan, (mu, scale, eps, z))
    plan, space = plan_at(plan), workspace(memories, scratch)
    tensors = Tensors(mu, scale, eps, z, kl, means)
    on_team(parallel, threads, work, (plan, space, tensors, Key(seed, offset)))
    on_team(0, 1, finish, (plan, space, kl, kl_of_mean, means))
