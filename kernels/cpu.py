"""CPU kernels: the twins of ``forward`` and ``backward`` (the formulas are there), by numba.

The batch is cut into pieces: column tiles (at most BLOCK wide) x row ranges. Workers (threads that
call the same kernel with the same arguments) take the next piece until none is left, and walk down
its rows a block at a time. A block is some rows, each padded to a multiple of 4 columns, so that
it is as dense for 2 columns as for 500 and its noise is one run of Philox groups.

Each piece writes its own float64 sums; the worker that finishes the last piece adds them up in a
fixed order. So results do not depend on how many workers there are or which did what.

A tensor is (address, kind, row, outer, inner): where it is (0: absent), how its elements are
stored, and its strides as in ``tile``. A shape is (B, D, inner, tile_cols, range_rows).
"""

import os
from contextlib import suppress

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from . import coefficients, cpu_math
from .cpu_math import JIT, as_f32, as_i32, exp_terms, f32, i32, normals, std_and_expm1, std_and_phi

BLOCK = 1024  # elements, padding included
BUFFERS = 10  # rows of `work`: 6 for values, 4 for the lanes of the noise
F32, F64, BF16, F16 = range(4)  # kinds of storage
NONE, BATCH, ALL = range(3)  # what kl_of_mean averages over


@intrinsic
def read(typingctx, address, index, like):
    """Element `index` of the array at `address` of what `like` is an example of."""

    def generate(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], context.get_value_type(like).as_pointer())
        return builder.load(builder.gep(pointer, [args[1]]))

    return like(types.int64, types.int64, like), generate


@intrinsic
def write(typingctx, address, index, value):
    """Store value as element `index` of the array at `address`."""

    def generate(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], context.get_value_type(value).as_pointer())
        builder.store(args[2], builder.gep(pointer, [args[1]]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, value), generate


@intrinsic
def fetch_add(typingctx, address, index):
    """Add 1 to an int64 that workers share; what it was before."""

    def generate(context, builder, signature, args):
        integer = context.get_value_type(types.int64)
        pointer = builder.gep(builder.inttoptr(args[0], integer.as_pointer()), [args[1]])
        return builder.atomic_rmw("add", pointer, integer(1), "acq_rel")

    return types.int64(types.int64, types.int64), generate


@njit(**JIT)
def bf16_to_f32(bits):
    return as_f32(i32(i32(bits) << 16))


@njit(**JIT)
def f32_to_bf16(value):
    bits = as_i32(value)
    rounded = i32(bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to nearest even
    return np.int16(0x7FC0 if value != value else rounded)


@njit(**JIT)
def f16_to_f32(bits):
    size = i32(i32(bits) & 0x7FFF)
    scaled = as_f32(i32(size << 13)) * f32(2.0**112)  # subnormals too
    special = as_f32(i32((size << 13) | 0x7F800000))  # inf and NaN
    magnitude = special if size >= 0x7C00 else scaled
    return as_f32(i32(as_i32(magnitude) | i32((i32(bits) & 0x8000) << 16)))


@njit(**JIT)
def f32_to_f16(value):
    bits = as_i32(value)
    size = i32(bits & 0x7FFFFFFF)
    # To nearest even: normal results by integers, subnormal ones by an addition that aligns them.
    normal = i32(size - 0x38000000 + 0xFFF + ((size >> 13) & 1)) >> 13
    subnormal = i32(as_i32(as_f32(size) + f32(0.5)) - 0x3F000000)
    half = subnormal if size < 0x38800000 else normal
    half = 0x7C00 if size >= 0x477FF000 else half
    half = 0x7E00 if size > 0x7F800000 else half
    return np.uint16(half | ((bits >> 16) & 0x8000))


@njit(**JIT)
def read_run(address, kind, first, step, out):
    """out[i] = element first + i step, widened."""
    n = len(out)
    if kind == F32:
        if step == 1:
            for i in range(n):
                out[i] = read(address, first + i, f32(0))
        else:
            for i in range(n):
                out[i] = read(address, first + i * step, f32(0))
    elif kind == F64:
        for i in range(n):
            out[i] = read(address, first + i * step, np.float64(0))
    elif kind == BF16:
        if step == 1:
            for i in range(n):
                out[i] = bf16_to_f32(read(address, first + i, np.int16(0)))
        else:
            for i in range(n):
                out[i] = bf16_to_f32(read(address, first + i * step, np.int16(0)))
    else:
        if step == 1:
            for i in range(n):
                out[i] = f16_to_f32(read(address, first + i, np.uint16(0)))
        else:
            for i in range(n):
                out[i] = f16_to_f32(read(address, first + i * step, np.uint16(0)))


@njit(**JIT)
def write_run(address, kind, first, step, values):
    """Element first + i step = values[i], rounded."""
    n = len(values)
    if kind == F32:
        if step == 1:
            for i in range(n):
                write(address, first + i, f32(values[i]))
        else:
            for i in range(n):
                write(address, first + i * step, f32(values[i]))
    elif kind == F64:
        for i in range(n):
            write(address, first + i * step, np.float64(values[i]))
    elif kind == BF16:
        if step == 1:
            for i in range(n):
                write(address, first + i, f32_to_bf16(f32(values[i])))
        else:
            for i in range(n):
                write(address, first + i * step, f32_to_bf16(f32(values[i])))
    else:
        if step == 1:
            for i in range(n):
                write(address, first + i, f32_to_f16(f32(values[i])))
        else:
            for i in range(n):
                write(address, first + i * step, f32_to_f16(f32(values[i])))


@njit(**JIT)
def move_block(tensor, shape, row, rows, col, cols, pitch, block, store):
    """Rows x columns of a tensor into a block, or out of it; block row r begins at r pitch."""
    address, kind, s_row, s_outer, s_inner = tensor
    inner = shape[2]
    if s_inner == 1 and s_row == pitch == cols == inner == shape[1]:  # rows end to end
        if store:
            write_run(address, kind, row * s_row, 1, block[: rows * cols])
        else:
            read_run(address, kind, row * s_row, 1, block[: rows * cols])
        return
    for r in range(rows):
        j = 0
        while j < cols:
            i_outer, i_inner = divmod(col + j, inner)
            n = min(inner - i_inner, cols - j)
            first = (row + r) * s_row + i_outer * s_outer + i_inner * s_inner
            run = block[r * pitch + j : r * pitch + j + n]
            if store:
                write_run(address, kind, first, s_inner, run)
            else:
                read_run(address, kind, first, s_inner, run)
            j += n


@njit(**JIT)
def clamp(values, lo, hi):
    """torch.clamp: NaN passes."""
    for i in range(len(values)):
        value = values[i]
        value = lo if value < lo else value
        values[i] = hi if value > hi else value


@njit(**JIT)
def shift_and_scale(mu, std, eps):
    """eps becomes z."""
    for i in range(len(eps)):
        eps[i] = mu[i] + std[i] * eps[i]


@njit(**JIT)
def square_plus(mu, phi):
    """phi becomes twice the KL of each element."""
    for i in range(len(mu)):
        phi[i] += mu[i] * mu[i]


@njit(**JIT)
def accumulate(sums, values):
    for i in range(len(values)):
        sums[i] += values[i]


@njit(nogil=True, error_model="numpy", fastmath={"contract", "reassoc"})
def total(values):
    """Sum in float64, in an order that depends on the length alone."""
    result = 0.0
    for i in range(len(values)):
        result += values[i]
    return result


@njit(**JIT)
def tile_total(tile, cols, pitch):
    """Sum of a tile without its padding."""
    result = 0.0
    for start in range(0, len(tile), pitch):
        result += total(tile[start : start + cols])
    return result


@njit(**JIT)
def geometry(shape, piece):
    """(col, cols, pitch, block_rows, first_row, end_row, i_tile, i_range) of a piece."""
    B, D, _, tile_cols, range_rows = shape
    n_tiles = (D + tile_cols - 1) // tile_cols
    i_range, i_tile = divmod(piece, n_tiles)
    col = i_tile * tile_cols
    cols = min(tile_cols, D - col)
    pitch = (cols + 3) // 4 * 4
    first_row = i_range * range_rows
    end_row = min(first_row + range_rows, B)
    # Several rows only if they are whole: their groups follow each other.
    block_rows = min(BLOCK // pitch, end_row - first_row) if n_tiles == 1 else 1
    return col, cols, pitch, block_rows, first_row, end_row, i_tile, i_range


@njit(**JIT)
def piece_count(shape):
    B, D, _, tile_cols, range_rows = shape
    return ((D + tile_cols - 1) // tile_cols) * ((B + range_rows - 1) // range_rows)


@njit(**JIT)
def finish(example, shape, options, scratch, kl, kl_of_mean, means, denominator):
    """All pieces are done: add their sums, in order."""
    B, D, _, tile_cols, _ = shape
    per_row, mean_over, _ = options
    dtype = example.dtype.type
    pieces = piece_count(shape)
    n_tiles = (D + tile_cols - 1) // tile_cols
    rest = scratch[3 * pieces :]
    if kl != 0 and not per_row:
        write(kl, 0, dtype(0.5 * total(scratch[:pieces]) / denominator))
    if kl != 0 and per_row:
        for row in range(B):
            row_sum = 0.0
            for i_tile in range(n_tiles):
                row_sum += rest[i_tile * B + row]
            write(kl, row, dtype(0.5 * row_sum))
        rest = rest[n_tiles * B :]
    if mean_over == ALL:
        mean_mu = dtype(total(scratch[pieces : 2 * pieces]) / (float(B) * D))
        mean_logvar = dtype(total(scratch[2 * pieces : 3 * pieces]) / (float(B) * D))
        write(means, 0, mean_mu)
        write(means, 1, mean_logvar)
        phi = exp_terms(mean_logvar)[2]
        write(kl_of_mean, 0, dtype(0.5 * (float(mean_mu) * float(mean_mu) + phi)))
    if mean_over == BATCH:
        columns = rest[: pieces // n_tiles * 2 * D].reshape(-1, 2, D)
        for i_range in range(1, len(columns)):
            accumulate(columns[0, 0], columns[i_range, 0])
            accumulate(columns[0, 1], columns[i_range, 1])
        of_mean = 0.0
        for col in range(D):
            mean_mu, mean_logvar = dtype(columns[0, 0, col] / B), dtype(columns[0, 1, col] / B)
            write(means, col, mean_mu)
            write(means, D + col, mean_logvar)
            of_mean += float(mean_mu) * float(mean_mu) + exp_terms(mean_logvar)[2]
        write(kl_of_mean, 0, dtype(0.5 * of_mean))


@njit(**JIT)
def forward(
    work,  # [BUFFERS, BLOCK] of the computation's dtype: this worker's own
    counters,  # int64[2], zeros: pieces taken and pieces done, shared by the workers
    scratch,  # float64: [3, pieces], kl [tiles, B] if per row, columns [ranges, 2, D] if BATCH
    mu, logvar, eps, z,  # tensors; eps absent: drawn here
    kl, kl_of_mean, means, state,  # addresses, 0: not wanted; state int64[2]: the key, for backward
    shape,
    options,  # (kl per row, mean_over, clamp)
    lo, hi, denominator,
    seed, offset,
):  # fmt: skip
    """z, kl and kl_of_mean: pieces until none is left."""
    per_row, mean_over, clamped = options
    B, D = shape[0], shape[1]
    n_pieces = piece_count(shape)
    words, sums = np.empty((4, BLOCK // 4), np.int32), np.empty((3, BLOCK), np.float64)
    lanes = work[6:].reshape(-1)[: 4 * (BLOCK // 4)].reshape(4, BLOCK // 4)
    shared = counters.ctypes.data
    lo, hi = work.dtype.type(lo), work.dtype.type(hi)
    while True:
        piece = fetch_add(shared, 0)
        if piece >= n_pieces:
            break
        if piece == 0 and state != 0:
            write(state, 0, seed)
            write(state, 1, offset)
        col, cols, pitch, block_rows, first_row, end_row, i_tile, i_range = geometry(shape, piece)
        length = block_rows * pitch
        sums[:, :length] = 0.0
        for row in range(first_row, end_row, block_rows):
            rows = min(block_rows, end_row - row)
            n = rows * pitch
            b_mu, b_logvar, b_eps = work[0, :n], work[1, :n], work[2, :n]
            b_std, b_phi = work[3, :n], work[4, :n]
            move_block(mu, shape, row, rows, col, cols, pitch, b_mu, False)
            move_block(logvar, shape, row, rows, col, cols, pitch, b_logvar, False)
            if clamped:
                clamp(b_logvar, lo, hi)
            std_and_phi(b_logvar, b_std, b_phi)
            if z[0] != 0:
                if eps[0] != 0:
                    move_block(eps, shape, row, rows, col, cols, pitch, b_eps, False)
                else:
                    group = row * ((D + 3) // 4) + col // 4
                    normals(seed, offset, group, words, lanes, b_eps)
                shift_and_scale(b_mu, b_std, b_eps)
                move_block(z, shape, row, rows, col, cols, pitch, b_eps, True)
            if kl != 0:
                square_plus(b_mu, b_phi)
                if per_row:
                    for r in range(rows):
                        row_sum = total(b_phi[r * pitch : r * pitch + cols])
                        scratch[3 * n_pieces + i_tile * B + row + r] = row_sum
                else:
                    accumulate(sums[0], b_phi)
            if mean_over != NONE:
                accumulate(sums[1], b_mu)
                accumulate(sums[2], b_logvar)

        scratch[piece] = tile_total(sums[0, :length], cols, pitch)
        if mean_over == ALL:
            scratch[n_pieces + piece] = tile_total(sums[1, :length], cols, pitch)
            scratch[2 * n_pieces + piece] = tile_total(sums[2, :length], cols, pitch)
        if mean_over == BATCH:
            for r in range(1, block_rows):
                accumulate(sums[1], sums[1, r * pitch : (r + 1) * pitch])
                accumulate(sums[2], sums[2, r * pitch : (r + 1) * pitch])
            start = 3 * n_pieces + 2 * i_range * D + col
            if kl != 0 and per_row:
                start += (D + shape[3] - 1) // shape[3] * B
            scratch[start : start + cols] = sums[1, :cols]
            scratch[start + D : start + D + cols] = sums[2, :cols]
        if fetch_add(shared, 1) == n_pieces - 1:
            finish(work, shape, options, scratch, kl, kl_of_mean, means, denominator)


@njit(**JIT)
def of_mean_gradients(means, upstream, shape, mean_over, col, cols, pitch, b_mu, b_logvar):
    """What kl_of_mean sends to each element of a block: the same for every row."""
    B, D = shape[0], shape[1]
    dtype = b_mu.dtype.type
    zero = dtype(0)
    if mean_over == BATCH:
        h, i_mu, i_logvar, step = upstream / dtype(B), col, D + col, 1
    else:
        h, i_mu, i_logvar, step = upstream / dtype(float(B) * D), 0, 1, 0
    for j in range(cols):
        b_mu[j] = h * read(means, i_mu + step * j, zero)
        b_logvar[j] = h * exp_terms(read(means, i_logvar + step * j, zero))[1]
    for j in range(pitch, len(b_mu)):
        b_mu[j] = b_mu[j - pitch]
        b_logvar[j] = b_logvar[j - pitch]


@njit(**JIT)
def mu_gradient(dz, g, mu, of_mean):
    """Over mu."""
    for i in range(len(mu)):
        mu[i] = dz[i] + g[i] * mu[i] + of_mean[i]


@njit(**JIT)
def logvar_gradient(dz, eps, g, expm1, of_mean):
    """Over expm1; dz is dz std here."""
    half = expm1.dtype.type(0.5)
    for i in range(len(expm1)):
        expm1[i] = half * (dz[i] * eps[i] + g[i] * expm1[i] + of_mean[i])


@njit(**JIT)
def zero_outside(logvar, lo, hi, gradient):
    """The gradient of clamp."""
    zero = gradient.dtype.type(0)
    for i in range(len(logvar)):
        inside = (logvar[i] >= lo) & (logvar[i] <= hi)
        gradient[i] = gradient[i] if inside else zero


@njit(**JIT)
def multiply(values, by):
    for i in range(len(values)):
        values[i] *= by[i]


@njit(**JIT)
def backward(
    work,  # [BUFFERS, BLOCK] of the computation's dtype: this worker's own
    counters,  # int64[2], zeros: pieces taken, shared by the workers
    mu, logvar, eps, dz, dmu, dlogvar, deps,  # tensors; eps absent: drawn in forward, again here
    dkl, dkl_row,  # address (0: absent) and stride of the upstream gradient of kl
    dkl_of_mean, means, state,  # addresses
    shape,
    options,  # (kl per row, mean_over, clamp)
    lo, hi, denominator,
):  # fmt: skip
    """The gradients: pieces until none is left."""
    per_row, mean_over, clamped = options
    D = shape[1]
    n_pieces = piece_count(shape)
    words, extra = np.empty((4, BLOCK // 4), np.int32), np.zeros((4, BLOCK), work.dtype)
    lanes = work[6:].reshape(-1)[: 4 * (BLOCK // 4)].reshape(4, BLOCK // 4)
    shared = counters.ctypes.data
    dtype = work.dtype.type
    zero, lo, hi = dtype(0), dtype(lo), dtype(hi)
    has_dz, has_dkl = dz[0] != 0, dkl != 0
    draws = has_dz and dlogvar[0] != 0 and eps[0] == 0
    seed = offset = 0
    if draws:
        seed, offset = read(state, 0, np.int64(0)), read(state, 1, np.int64(0))
    if has_dkl and not per_row:
        extra[0, :] = read(dkl, 0, zero) / dtype(denominator)
    while True:
        piece = fetch_add(shared, 0)
        if piece >= n_pieces:
            break
        col, cols, pitch, block_rows, first_row, end_row, _, _ = geometry(shape, piece)
        if dkl_of_mean != 0:
            full = block_rows * pitch
            of_mu, of_logvar = extra[1, :full], extra[2, :full]
            upstream = read(dkl_of_mean, 0, zero)
            of_mean_gradients(means, upstream, shape, mean_over, col, cols, pitch, of_mu, of_logvar)
        for row in range(first_row, end_row, block_rows):
            rows = min(block_rows, end_row - row)
            n = rows * pitch
            b_mu, b_logvar, b_eps = work[0, :n], work[1, :n], work[2, :n]
            b_std, b_expm1, b_dz = work[3, :n], work[4, :n], work[5, :n]
            b_g = extra[0, :n]
            if has_dkl and per_row:
                for r in range(rows):
                    b_g[r * pitch : (r + 1) * pitch] = read(dkl, (row + r) * dkl_row, zero)
            if has_dz:
                move_block(dz, shape, row, rows, col, cols, pitch, b_dz, False)
            else:
                b_dz[:] = zero
            if dmu[0] != 0:
                if has_dkl:
                    move_block(mu, shape, row, rows, col, cols, pitch, b_mu, False)
                else:
                    b_mu[:] = zero
                mu_gradient(b_dz, b_g, b_mu, extra[1])
                move_block(dmu, shape, row, rows, col, cols, pitch, b_mu, True)
            if dlogvar[0] == 0 and deps[0] == 0:
                continue
            move_block(logvar, shape, row, rows, col, cols, pitch, b_logvar, False)
            if clamped:
                b_mu[:] = b_logvar
                clamp(b_logvar, lo, hi)
            std_and_expm1(b_logvar, b_std, b_expm1)
            if has_dz:
                multiply(b_dz, b_std)
            if deps[0] != 0:
                move_block(deps, shape, row, rows, col, cols, pitch, b_dz, True)
            if dlogvar[0] == 0:
                continue
            if draws:
                group = row * ((D + 3) // 4) + col // 4
                normals(seed, offset, group, words, lanes, b_eps)
            elif has_dz:
                move_block(eps, shape, row, rows, col, cols, pitch, b_eps, False)
            else:
                b_eps[:] = zero
            if not has_dkl:
                b_expm1[:] = zero
            logvar_gradient(b_dz, b_eps, b_g, b_expm1, extra[2])
            if clamped:
                zero_outside(b_mu, lo, hi, b_expm1)
            move_block(dlogvar, shape, row, rows, col, cols, pitch, b_expm1, True)


# numba takes a change of this file alone for a change of the code; these are compiled in as well.
_STAMPS = tuple(
    (status.st_mtime, status.st_size)
    for status in map(os.stat, (__file__, cpu_math.__file__, coefficients.__file__))
)
for _kernel in (forward, backward):
    with suppress(RuntimeError):  # no folder that can be written to: compiled in each process
        _kernel.enable_caching()
        _kernel._cache._cache_file._source_stamp = _STAMPS
