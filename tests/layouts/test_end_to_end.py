"""Samples of short events that follow each other in memory, read as one."""

import pytest
import torch

from steps import NUMBER, check_beside_eager
from vaekl import _plans
from vaekl._spec import Operands, Spec
from vaekl.backends import layout, strided
from vaekl.testing import make_inputs


def one(mu, logvar, config=layout.Config()):  # noqa: B008
    """Are they read as one sample?"""
    spec = Spec(True, "batchmean", None, 1, "logvar", None, "triton")
    arrangement = strided.arrange_forward(spec, Operands(mu, logvar, None))
    found = strided.end_to_end(strided.in_memory_order(arrangement), config)
    assert found.view.batch * found.view.event == mu.numel()
    return found.view.batch == 1


@pytest.mark.parametrize("event", [1, 2, 3, 4, 10, 20, 32, 33, 60, 100, 130, 500, 700, 1000])
def test_few_columns_are_idle(event):
    """At most a ninth of a block's, of many samples."""
    mu, logvar = make_inputs((4000, event))
    spec = Spec(True, "batchmean", None, 1, "logvar", None, "triton")
    arrangement = strided.arrange_forward(spec, Operands(mu, logvar, None))
    view = strided.end_to_end(arrangement, layout.Config()).view
    grid = layout.grid(view.batch, view.event, layout.Config())
    assert view.event >= 8 / 9 * grid.tiles * grid.block_cols


def test_which_are_read_as_one():
    mu, logvar = make_inputs((400, 20))
    assert one(mu, logvar)
    assert one(mu, NUMBER.expand(400, 20))
    assert not one(mu, logvar[:1].expand(400, 20))  # one for each column
    assert not one(mu, logvar[:, :1].expand(400, 20))  # one for each sample
    assert not one(mu, logvar.t().contiguous().t())
    assert not one(*torch.cat([mu, logvar], 1).chunk(2, 1))
    assert not one(mu[:100], logvar[:100])  # one program does it all
    assert not one(*make_inputs((400, 30)))  # of 32 columns
    assert not one(*(t[::2] for t in (mu, logvar)))
    assert one(*make_inputs((200, 2, 4, 5)))
    # Columns in the order of memory have their groups of noise in another.
    assert not one(*make_inputs((200, 2, 4, 5), layout="channels_last"))


OPTIONS = {
    "elbo": {"kl_of_mean": False},
    "sum": {"kl_of_mean": False, "reduction": "sum", "clamp": (-1.0, 0.5)},
    "over all": {"mean_over": "all", "reduction": "mean"},
    "eps": {"kl_of_mean": False, "given": True},
    "a number": {"kl_of_mean": False, "number": True},
    "over batch": {},  # as columns here
    "rows": {"reduction": "none", "kl_of_mean": False},  # forward has them; backward may not
}
WANTED = [(True, True, True), (True, True, False), (True, False, False), (False, True, False),
          (False, False, True)]  # fmt: skip


CASES = [
    (options, upstream)
    for options, chosen in OPTIONS.items()
    for upstream in WANTED
    if chosen.get("kl_of_mean", True) or not upstream[2]
]


@pytest.mark.parametrize(("options", "upstream"), CASES, ids=str)
@pytest.mark.parametrize("shape", [(9, 12), (7, 5)])
def test_several_programs(shape, upstream, options, many_programs, device):
    """5 columns have two groups of noise each, which are not those of rows end to end."""
    check_beside_eager(shape, upstream, device, **OPTIONS[options])


@pytest.mark.parametrize("options", ["elbo", "over all", "over batch"])
@pytest.mark.parametrize("shape", [(300, 20), (500, 10), (10, 20, 20)])
def test_usual_blocks(shape, options, device):
    check_beside_eager(shape, (True, True, options != "elbo"), device, **OPTIONS[options])


@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
@pytest.mark.parametrize("upstream", [(True, True, False), (True, True, True)], ids=str)
@pytest.mark.parametrize("options", ["elbo", "over all", "over batch"])
@pytest.mark.parametrize("shape", [(130, 2, 4, 5), (40, 4, 6, 6)])
def test_images(shape, options, upstream, memory, device):
    """Upstream gradients are contiguous, outputs as the inputs."""
    check_beside_eager(shape, upstream, device, memory=memory, **OPTIONS[options])


@pytest.mark.parametrize("mean_over", ["batch", "all"])
@pytest.mark.parametrize("event", [21, 64])
def test_rows_of_many_programs(mean_over, event, device):
    """Several programs for each range of rows, and more ranges than the device holds."""
    config = layout.Config(tile=32, max_cols=8, small=0, resident=1, row_sums=16)
    grid = layout.grid(70, event, config, sums=layout.Sums(of_columns=False, of_rows=True))
    assert grid.ranges * grid.tiles > layout.MULTIPROCESSORS or event == 21
    with _plans.use_config(config):
        check_beside_eager(
            (70, event), (True, True, True), device, reduction="none", mean_over=mean_over
        )
