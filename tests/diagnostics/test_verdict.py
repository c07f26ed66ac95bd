"""Details of a report's words, and of the launch behind its numbers."""

import math

import pytest
import torch

import vaekl
from vaekl.backends import layout
from vaekl.backends.workspace import workspaces
from vaekl.testing import make_inputs


def test_the_verdict_counts_what_is_not_collapsed():
    """Collapsed dimensions carry a little each, which is not promised."""
    mu, logvar = make_inputs((64, 10))
    mu[:, :7], logvar[:, :7] = 0.1 * mu[:, :7], 0
    report = vaekl.diagnose(mu, logvar)
    assert report.collapsed.tolist() == [True] * 7 + [False] * 3
    kept, every = report.information_dims[7:].sum(), report.information_dims.sum()
    assert f"{kept:.3g}" != f"{every:.3g}"
    assert f"the other 3 carry at most {kept:.3g} nats" in report.verdict


@pytest.mark.parametrize(("shift", "said"), [(1.3, False), (1.7, True)])
def test_most_of_the_kl_is_more_than_half(shift, said):
    """Codes at shift + 1 and shift - 1, of variance 0.1: about 1.2 nats of information."""
    mu = shift + torch.tensor([[1.0], [-1.0]])
    report = vaekl.diagnose(mu, torch.full_like(mu, math.log(0.1)))
    assert (report.aggregate_kl > report.kl / 2) == said
    assert report.aggregate_kl > report.kl / 3
    assert report.aggregate_kl < report.kl / 1.5
    assert ("most of the KL" in report.verdict) == said


def test_what_is_not_finite_comes_first_in_the_table():
    mu, logvar = make_inputs((8, 40))
    mu[:, 3], mu[2, 31] = 1e3, math.nan
    rows = [line.split() for line in str(vaekl.diagnose(mu, logvar)).splitlines()]
    table = [row for row in rows if row[:1] and row[0].isdigit() and len(row) == 6]
    assert [row[0] for row in table[:2]] == ["31", "3"]
    assert table[0][1] == "nan"


def test_each_column_tile_has_a_counter_of_its_own(many_programs, device):
    """One that is not at 0 keeps its tile from being finished, and no other."""
    mu, logvar = make_inputs((9, 22), device=device)
    from vaekl.kernels.reduction import partial_sums

    from vaekl.backends import triton as launcher

    ranges = layout.grid(9, 22, launcher.statistics_config()).ranges
    assert ranges > 1
    right = launcher.statistics(mu, logvar, 1)
    counters = next(iter(workspaces.counters.values()))
    counters[partial_sums(ranges)] = 100  # the second tile's first
    try:
        found = launcher.statistics(mu, logvar, 1)
    finally:
        workspaces.forget()
    same = (found == right).all(0)
    assert 0 < same.sum() < 22
    assert not same[8:16].any()
    assert same[:8].all()
    assert same[16:].all()
