"""How tensors become rows, columns and programs: views, widths of offsets, grids."""

import pytest
import torch
from vaekl.kernels.finish import ROW_BLOCK, scratch_parts
from vaekl.kernels.reduction import GROUP

from vaekl.backends import layout as geometry
from vaekl.backends import triton_launch
from vaekl.testing import CONFIGS, make_inputs


def test_blocks_reach_every_path():
    """The block choices of the tests do give several programs along each axis, and loops."""
    many = geometry.grid(7, 21, CONFIGS["many"])
    assert many.tiles > 1
    assert many.ranges > 1
    assert 7 % many.block_rows
    assert 21 % many.block_cols
    loops = geometry.grid(7, 21, CONFIGS["loops"])
    assert loops.tiles > 1
    assert loops.ranges > 1
    assert loops.rows_per_range > loops.block_rows
    assert 7 % loops.block_rows
    assert 21 % loops.block_cols
    down = geometry.grid(33, 4, CONFIGS["loops"])
    assert down.tiles == 1
    assert down.ranges > 1
    assert down.rows_per_range > down.block_rows
    alone = geometry.grid(7, 21, CONFIGS["default"])
    assert (alone.tiles, alone.ranges) == (1, 1)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("batch", [1, 3, 64, 1000])
@pytest.mark.parametrize("event", [1, 20, 700, 70_000, 7_600_000])
@pytest.mark.parametrize("multiprocessors", [16, 132, 304])
def test_no_more_programs_than_a_device_runs(batch, event, config, multiprocessors):
    """Of a few column tiles too many, each takes two."""
    config = CONFIGS[config]
    grid = geometry.grid(batch, event, config, multiprocessors)
    assert grid.walkers * grid.ranges <= (config.programs or config.resident * multiprocessors)
    assert grid.walkers == grid.tiles or grid.ranges == 1
    each = -(-grid.tiles // grid.walkers)
    assert (each - 1) * grid.walkers < grid.tiles
    assert grid.tiles * grid.block_cols >= event
    assert grid.ranges * grid.rows_per_range >= batch


def test_few_kernels_serve_all_shapes():
    """By their blocks and threads, of which kernels are compiled anew."""
    sizes = [*range(1, 140), 200, 300, 500, 1000, 1500, 3000, 10_000, 300_000]
    config = geometry.Config()
    grids = [geometry.grid(batch, event, config) for batch in sizes for event in sizes]
    kinds = {(grid.block_rows, grid.block_cols, grid.threads) for grid in grids}
    assert len(kinds) == 20
    alone = [grid for grid in grids if grid.tiles * grid.ranges == 1]
    assert all(grid.rows_per_range == grid.block_rows for grid in alone)  # one iteration
    assert {8 * grid.threads for grid in grids} == {1024, 4096}  # elements of a block


def test_ranges_are_as_many_as_their_sums_allow():
    """Of 32 blocks two to a program leave one round of sums, where one to each would take two."""
    config = geometry.Config()
    assert config.group == GROUP.value
    assert geometry.grid(1024, 32, config).ranges == 16
    assert geometry.grid(128 * 32, 32, config).ranges == 128
    assert geometry.rounds(256, 16) == 2
    assert geometry.rounds(257, 16) == 3
    assert geometry.grid(2**20, 32, config).ranges > 900


@pytest.mark.parametrize("shape", [(1024, 65536), (256, 65536), (5000, 20_000), (65536, 65536)])
@pytest.mark.parametrize("multiprocessors", [132, 304])
def test_rows_are_added_up_by_many_programs(shape, multiprocessors):
    """One that did it alone would read some thousand times one after the other."""
    config = geometry.Config()
    assert config.row_sums == 16 * ROW_BLOCK.value
    sums = geometry.Sums(of_columns=False, of_rows=True)
    grid = geometry.grid(*shape, config, multiprocessors, 1, sums)
    assert grid.rows_per_range < config.row_sums // grid.tiles + grid.block_rows  # whole blocks
    # Column sums of each range take memory, too.
    sums = geometry.Sums(of_columns=True, of_rows=True)
    both = geometry.grid(*shape, config, multiprocessors, 1, sums)
    usual = geometry.grid(*shape, config, multiprocessors)
    assert usual.ranges < both.ranges <= grid.ranges
    size = scratch_parts(both.walkers, both.ranges, shape[1], 0).size
    assert size < 0.07 * shape[0] * shape[1]


@pytest.mark.parametrize("shape", [(1024, 512), (2**24, 128), (4, 65536), (1, 7_600_000)])
def test_rows_that_few_programs_add_up_change_nothing(shape):
    for of_columns in (False, True):
        one, other = (
            geometry.grid(*shape, geometry.Config(), sums=geometry.Sums(of_columns, of_rows))
            for of_rows in (False, True)
        )
        assert one == other


def test_offsets_turn_wide_in_time():
    assert not geometry.view((2**16, 2**14), 1, ((2**14, 1),)).wide
    assert geometry.view((2**17, 2**14), 1, ((2**14, 1),)).wide
    assert geometry.view((2, 4), 1, ((2**31, 1),)).wide
    assert geometry.view((2**17, 2**14), 1, ((0, 0),)).wide  # by the noise's group index


def test_layouts_are_read_in_place():
    """No copy of what docs/layouts.md promises to read in place: three strides describe it."""
    shape = (2, 3, 4, 5)
    for layout in ("contiguous", "channels_last", "expanded"):
        pair = make_inputs(shape, layout=layout)
        model = torch.empty_like(pair[0])
        strides = tuple(t.stride() for t in (*pair, model))
        assert geometry.view(shape, 1, strides) is not None, layout
    odd = make_inputs(shape, layout="steps")[0]
    assert geometry.view(shape, 1, (odd.stride(),)) is None


@pytest.mark.parametrize(("threads", "warps"), [(32, 1), (64, 1), (128, 2)])
def test_a_program_has_at_least_one_wave_of_64(threads, warps, monkeypatch):
    """A block of 32 threads, as tests ask for, is half a wave on AMD's data-centre GPUs."""
    monkeypatch.setattr(triton_launch, "warp_size", lambda: 64)
    grid = geometry.grid(7, 21, geometry.Config(threads=threads))
    assert triton_launch.Launch(None, grid, 1, []).options["num_warps"] == warps
