"""Host geometry: how strided tensors become rows x columns, and how those become a grid.

Everything here is arithmetic on sizes, cached by its arguments.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

Strides = tuple[int, ...]

#: Largest offset that is left to int32 arithmetic. Those of masked rows past the end may wrap.
NARROW_OFFSETS = 2**31 - 2**24
#: Of one position; four positions are a block's columns at least.
MOST_CHANNELS = 256
#: Of an H100, where no device says how many it has.
MULTIPROCESSORS = 132


class View(NamedTuple):
    """Tensors of one shape as [batch, event / inner, inner], with one stride each per axis; of
    samples beside each other as [rows, beside, inner], where inner may exceed the event.
    """

    batch: int
    event: int
    inner: int
    strides: tuple[tuple[int, int, int], ...]
    wide: bool  # an offset may pass 2^31
    #: Columns are in the order of memory: of so many channels the first position, then the next.
    channels: int = 1
    #: Samples in a row, each in `inner` columns.
    beside: int = 1
    #: Rows of one of several draws, where parameters have those of one alone; 0 elsewhere.
    period: int = 0

    @property
    def split(self) -> bool:
        return self.inner != self.width

    @property
    def rows(self) -> int:
        return -(-self.batch // self.beside)

    @property
    def width(self) -> int:
        """Of a row, in columns."""
        return self.event if self.beside == 1 else self.beside * self.inner

    def unit(self, most: int) -> int:
        """The largest power of 2 up to `most` that divides where rows begin and end."""
        sizes = [
            self.event,
            self.inner,
            *(n for row, outer, _ in self.strides for n in (row, outer)),
        ]
        return math.gcd(most, *sizes)


class Grid(NamedTuple):
    """Column tiles x row ranges, and the block that walks down them."""

    tiles: int
    walkers: int  # of the tiles, where a program has several of them
    ranges: int
    rows_per_range: int
    block_rows: int
    block_cols: int
    threads: int


class Sums(NamedTuple):
    """What is added up over programs."""

    of_columns: bool  # along the batch; or all there is
    of_rows: bool  # along an event


SUMS_OF_COLUMNS = Sums(True, False)
NO_SUMS = Sums(False, False)


@dataclass(frozen=True)
class Config:
    """Block choice. One default; tests set others to reach every path with small inputs."""

    tile: int = 1024  # elements of a block
    max_cols: int = 128  # columns of a block, while the batch fills its rows
    small: int = 4096  # padded elements that one program takes alone
    widest: int = 4096  # elements of its block, where a tile is too small
    #: Programs of a multiprocessor: of 128 threads with 72 registers it holds so many at a time.
    resident: int = 7
    programs: int | None = None  # in all; else what the device holds. Backward has one a tile
    threads: int = 128  # of a program: 8 elements of a full block each
    group: int = 16  # partial sums that a program adds up, as reduction.GROUP says
    row_sums: int = 8192  # partial KLs that a program adds up, 16 times finish.ROW_BLOCK


_config = Config()


def current_config() -> Config:
    return _config


def set_config(config: Config) -> Config:
    """Use another from now on; the one before. Plans made before have their own."""
    global _config
    previous, _config = _config, config
    return previous


def _merge(shape: tuple[int, ...], strides: tuple[Strides, ...], axes: range) -> list[list[int]]:
    """Axes as [size, stride per tensor], neighbours joined where one stride serves every tensor."""
    merged: list[list[int]] = []
    for axis in axes:
        size = shape[axis]
        if size == 1:
            continue
        step = [s[axis] for s in strides]
        if merged and all(a == b * size for a, b in zip(merged[-1][1:], step)):
            merged[-1] = [merged[-1][0] * size, *step]
        else:
            merged.append([size, *step])
    return merged


@lru_cache(maxsize=256)
def view(shape: tuple[int, ...], batch_dims: int, strides: tuple[Strides, ...]) -> View | None:
    """The common View of tensors with these strides, or None where three strides are too few."""
    count = len(strides)
    rows = _merge(shape, strides, range(batch_dims))
    columns = _merge(shape, strides, range(batch_dims, len(shape)))
    if len(rows) > 1 or len(columns) > 2:
        return None
    one = [1] + [0] * count
    row = rows[0] if rows else one
    if len(columns) < 2:
        columns = [one, *(columns or [[1] + [1] * count])]
    outer, inner = columns
    span = max(
        sum((axis[0] - 1) * abs(axis[i + 1]) for axis in (row, outer, inner)) for i in range(count)
    )
    event = outer[0] * inner[0]
    return View(
        batch=row[0],
        event=event,
        inner=inner[0],
        strides=tuple((row[i + 1], outer[i + 1], inner[i + 1]) for i in range(count)),
        wide=max(span, row[0] * event) >= NARROW_OFFSETS,
    )


@lru_cache(maxsize=256)
def view_of_draws(
    shape: tuple[int, ...], batch_dims: int, strides: tuple[Strides, ...], own: tuple[bool, ...]
) -> View | None:
    """The View where tensors that are `own` have one draw's rows, expanded to several draws, and
    the others all rows; None where that is not so, or three strides are too few.
    """
    rows = _merge(shape, strides, range(batch_dims))
    if len(rows) != 2:
        return None
    (draws, *of_draws), (period, *of_rows) = rows
    for is_own, of_draw, row in zip(own, of_draws, of_rows):
        if of_draw != (0 if is_own else row * period):
            return None
    flat = tuple((row, *each[batch_dims:]) for row, each in zip(of_rows, strides))
    found = view((draws * period, *shape[batch_dims:]), 1, flat)
    return None if found is None else found._replace(period=period)


def in_memory_order(view: View) -> View:
    """Its columns in the order of memory where channels come last in it; else as it is.

    A power of 2 of them, so that a block has all channels of its positions, and whole groups of
    noise of each.
    """
    channels, positions = view.event // view.inner, view.inner
    read = [(outer, inner) for _, outer, inner in view.strides if outer or inner]
    if (
        channels & (channels - 1)
        or not 1 < channels <= MOST_CHANNELS
        or positions % 4
        or not read
        or any(outer != 1 or inner < channels for outer, inner in read)
    ):
        return view
    if all(inner == channels for _, inner in read):  # one stride is enough
        strides = tuple((row, 0, outer) for row, outer, _ in view.strides)
        return view._replace(inner=view.event, strides=strides, channels=channels)
    strides = tuple((row, inner, outer) for row, outer, inner in view.strides)
    return view._replace(inner=channels, strides=strides, channels=channels)


def end_to_end(view: View, config: Config) -> View:
    """All samples as one where each begins where the one before it ends, if more than a ninth of a
    block, whose columns are a power of 2, would be idle; else as it is.
    """
    columns, size = max(_power_of_2(view.event), 4), view.batch * view.event
    ends = tuple((view.event * inner, 0, inner) for _, _, inner in view.strides)
    idle = -view.event % min(columns, config.max_cols)
    if (
        view.strides != ends
        or view.split
        or view.channels > 1
        or 8 * idle <= view.event
        or _power_of_2(view.batch) * columns <= config.small
    ):
        return view
    strides = tuple((0, 0, inner) for _, _, inner in ends)
    return view._replace(batch=1, event=size, inner=size, strides=strides)


def beside(view: View, config: Config, is_drawn: bool) -> View:
    """As many samples in a row as a block has room for, if more than a ninth of it would be idle
    and fewer are then; else as it is. Noise that is drawn has groups of 4 columns.
    """
    alone = max(_power_of_2(view.event), 4)
    columns = -(-view.event // 4) * 4 if is_drawn else view.event
    most = min(config.max_cols, config.tile) // columns  # in one tile
    if (
        view.split
        or view.channels > 1
        or 8 * (alone - view.event) <= view.event
        or most * alone <= min(config.max_cols, config.tile)
        or _power_of_2(view.batch) * alone <= config.small
    ):
        return view
    strides = tuple((most * row, row, inner) for row, _, inner in view.strides)
    return view._replace(inner=columns, strides=strides, beside=most)


def rows(batch: int, event: int, count: int) -> View:
    """The View of so many contiguous tensors [batch, event], without looking at their strides."""
    wide = batch * event >= NARROW_OFFSETS
    return View(batch, event, event, ((event, 0, 1),) * count, wide)


def _power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def rounds(partials: int, group: int) -> int:
    """Of groups, until one sum is left."""
    return 0 if partials < 2 else 1 + rounds(-(-partials // group), group)


def _soonest(blocks: int, most: int, group: int) -> int:
    """Row ranges that end soonest: more have fewer blocks each, and more rounds of sums after them.

    In a round the last program waits three times, for a block once.
    """
    fitting = [n for n in (most, group, group**2) if n <= most]
    return min(fitting, key=lambda n: -(-blocks // n) + 3 * rounds(n, group))


@lru_cache(maxsize=256)
def grid(
    batch: int,
    event: int,
    config: Config,
    multiprocessors: int = MULTIPROCESSORS,
    channels: int = 1,
    sums: Sums = SUMS_OF_COLUMNS,
) -> Grid:
    """Blocks as wide as the event up to a limit, wider where the batch is short.

    One program alone has a block of one of two sizes: so few kernels serve all shapes.
    """
    columns = max(_power_of_2(event), 4)
    alone = _power_of_2(batch) * columns
    size = config.tile if alone <= config.tile else max(config.widest, config.tile)
    if alone <= config.small and columns <= size:
        rows = size // columns
        all_rows = -(-batch // rows) * rows
        return Grid(1, 1, 1, all_rows, rows, columns, config.threads * size // config.tile)
    groups = 4 * channels  # of noise, side by side
    block_cols = min(columns, max(config.max_cols, groups))
    block_rows = min(max(config.tile // block_cols, 1), _power_of_2(batch))
    block_cols = min(columns, max(config.tile // block_rows, groups))
    tiles = -(-event // block_cols)
    blocks = -(-batch // block_rows)
    programs = config.programs or config.resident * multiprocessors
    ranges = min(blocks, max(programs // tiles, 1))
    if config.programs is None:
        if sums.of_columns:
            ranges = _soonest(blocks, ranges, config.group)
        if sums.of_rows and 1 < tiles <= programs:  # the last program of a range adds up its rows
            short = min(blocks, -(-batch * tiles // config.row_sums))
            if sums.of_columns:  # which every range leaves, too, and scratch has to hold
                short = min(short, batch // 32, config.group**2)
            ranges = max(ranges, short)
    blocks_per_range = -(-blocks // ranges)
    each = -(-tiles // max(programs, 2))
    return Grid(
        tiles=tiles,
        walkers=-(-tiles // each),
        ranges=-(-blocks // blocks_per_range),
        rows_per_range=blocks_per_range * block_rows,
        block_rows=block_rows,
        block_cols=block_cols,
        threads=config.threads,
    )
