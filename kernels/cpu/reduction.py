"""CPU code: sums in an order that lengths alone decide; the twin of ``reduction``."""

from numba import njit

from .numeric import JIT

WIDTH = 256  # column sums are kept for about so many columns, several rows side by side


@njit(**JIT)
def copy(values, out):
    """As out[:] = values, which takes ten times as long to compile."""
    for i in range(len(values)):
        out[i] = values[i]


@njit(**JIT)
def repeat(row, values):
    """Values = row, again and again; their first may be that row."""
    done, n = len(row), len(values)
    copy(row, values[:done])
    while done < n:
        more = min(done, n - done)
        copy(values[:more], values[done : done + more])
        done += more
    return values


@njit(**JIT)
def accumulate(sums, values):
    """Add values to sums, each to its own."""
    for i in range(len(values)):
        sums[i] += values[i]


@njit(**{**JIT, "fastmath": {"contract", "reassoc"}})
def total(values):
    """Sum in float64, in an order that depends on the length alone."""
    result = 0.0
    for i in range(len(values)):
        result += values[i]
    return result


@njit(**JIT)
def side_by_side(piece):
    """Columns of a piece times rows: how many column sums to keep."""
    return piece.cols * max(min(WIDTH // piece.cols, piece.block_rows), 1)


@njit(**JIT)
def add_rows(sums, values):
    """Column sums of values that come in rows as long as `sums`."""
    width = len(sums)
    start = 0
    while start + 4 * width <= len(values):
        a, b = values[start : start + width], values[start + width : start + 2 * width]
        start += 2 * width
        c, d = values[start : start + width], values[start + width : start + 2 * width]
        start += 2 * width
        for j in range(width):
            sums[j] += (float(a[j]) + float(b[j])) + (float(c[j]) + float(d[j]))
    while start < len(values):
        accumulate(sums, values[start : min(start + width, len(values))])
        start += width


@njit(**JIT)
def fold(sums, cols):
    """Sums of rows side by side into the first `cols`."""
    rows = len(sums) // cols
    while rows > 1:
        half = rows // 2
        accumulate(sums, sums[(rows - half) * cols : rows * cols])
        rows -= half
