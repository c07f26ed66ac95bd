"""Several samples of short events in a row of a block."""

import pytest
import torch

import vaekl
from steps import check_beside_eager
from vaekl import _plans
from vaekl._spec import Operands, Spec
from vaekl.backends import layout, strided
from vaekl.testing import make_inputs

SMALL = layout.Config(tile=128, max_cols=64, small=0, programs=5)
SPEC = Spec(True, "batchmean", "batch", 1, "logvar", None, "triton")


def view_of(mu, logvar, is_drawn):
    arrangement = strided.arrange_forward(SPEC, Operands(mu, logvar, None))
    return strided.beside(arrangement, layout.Config(), is_drawn).view


def busy(event, is_drawn):
    """Share of the columns of a block that hold an element."""
    view = view_of(*make_inputs((4000, event)), is_drawn)
    grid = layout.grid(view.rows, view.width, layout.Config())
    assert grid.tiles == 1
    return view.beside * view.event / grid.block_cols


@pytest.mark.parametrize("event", [1, 2, 3, 4, 5, 9, 10, 17, 20, 33, 40])
def test_few_columns_are_idle(event):
    assert busy(event, False) >= 3 / 4


@pytest.mark.parametrize("event", [4, 10, 11, 12, 19, 20, 33, 36, 40])
def test_few_columns_are_idle_with_groups_of_noise(event):
    """But where an event fills no group, or little of the last of two or three."""
    assert busy(event, True) >= 3 / 4


def test_which_are_beside_each_other():
    mu, logvar = make_inputs((400, 20))

    def beside(*tensors):
        return view_of(*tensors, False).beside

    assert beside(mu, logvar) == beside(*make_inputs((400, 20), layout="halves")) == 6
    assert beside(mu, logvar[:1].expand(400, 20)) == 6
    assert beside(mu[:100], logvar[:100]) == 1  # one program does it all
    assert beside(*make_inputs((400, 30))) == 1  # of 32 columns
    assert beside(*make_inputs((400, 60))) == 1  # 2 are as many columns as 64
    assert beside(*make_inputs((100, 4, 5, 5), layout="channels_last")) == 1
    assert beside(*make_inputs((400, 2, 2, 5))) == 6


OPTIONS = {
    "over batch": {},
    "eps": {"given": True},
    "clamp": {"clamp": (-1.0, 0.5), "reduction": "sum"},
    "over all": {"mean_over": "all"},
    "elbo": {"kl_of_mean": False},
}


@pytest.fixture
def beside_each_other(monkeypatch):
    """Some of the test's calls have samples beside each other."""
    found, original = [], layout.beside
    monkeypatch.setattr(layout, "beside", lambda *a: found.append(original(*a)) or found[-1])
    yield
    assert any(view.beside > 1 for view in found)


def check(shape, options, memory, device):
    wanted = (True, True, options != "elbo")
    check_beside_eager(shape, wanted, device, memory=memory, **OPTIONS[options])


#: Of D = 10, five are beside each other with drawn noise, six without; of 20, three; of 3, 21.
CASES = [
    (shape, memory, options)
    for memory in ("contiguous", "halves")
    for shape in [(11, 10), (63, 10), (47, 20), (2, 20)]
    for options in OPTIONS
    # Where no column is asked for, whole groups of noise are read end to end.
    if memory == "halves" or shape[1] % 4 or options not in ("over all", "elbo")
]
CASES += [
    (shape, memory, "eps")
    for memory in ("contiguous", "halves")
    for shape in [(101, 3), (70, 2), (150, 1)]
]


@pytest.mark.parametrize(("shape", "memory", "options"), CASES, ids=str)
def test_small_blocks(shape, memory, options, beside_each_other, device):
    """The last row is not full, in columns of several ranges of rows and in those of one."""
    with _plans.use_config(SMALL):
        check(shape, options, memory, device)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("memory", ["contiguous", "halves"])
@pytest.mark.parametrize("shape", [(300, 20), (401, 10), (150, 33), (1100, 2)])
def test_usual_blocks(shape, memory, options, device):
    check(shape, options, memory, device)


@pytest.mark.parametrize("options", ["over batch", "eps"])
def test_one_range(options, beside_each_other, device):
    """Whose program has the sums of columns in its registers."""
    with _plans.use_config(layout.Config(tile=128, max_cols=64, small=0, programs=1)):
        check((41, 10), options, "contiguous", device)


def test_tiles_narrower_than_columns_may_be(beside_each_other, device):
    with _plans.use_config(layout.Config(tile=32, max_cols=64, small=0)):
        check((40, 5), "eps", "contiguous", device)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_in_its_column(value, device):
    mu, logvar = make_inputs((41, 10), device=device)
    mu[7, 2] = value
    with _plans.use_config(SMALL):
        mu.requires_grad_()
        loss = vaekl.kl_of_mean(mu, logvar, backend="triton")
        (gradient,) = torch.autograd.grad(loss, mu)
    finite = torch.isfinite(gradient).all(0)
    assert finite.tolist() == [column != 2 for column in range(10)]
