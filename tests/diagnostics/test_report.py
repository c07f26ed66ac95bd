"""The report of diagnose: its verdict, table, dictionary and figure."""

import sys

import pytest
import torch

import vaekl
from vaekl.testing import make_inputs


def example(collapsed, dimensions=10):
    """A report of so many collapsed dimensions."""
    mu, logvar = make_inputs((64, dimensions))
    mu[:, :collapsed], logvar[:, :collapsed] = 1e-3 * mu[:, :collapsed], 0
    return vaekl.diagnose(mu, logvar)


@pytest.mark.parametrize(
    ("collapsed", "dimensions", "start"),
    [
        (7, 10, "7 of 10 dimensions are collapsed; the other 3 carry at most "),
        (1, 2, "1 of 2 dimensions is collapsed; the other one carries at most "),
        (0, 10, "None of 10 dimensions is collapsed; together they carry at most "),
        (10, 10, "All 10 dimensions are collapsed: "),
        (1, 1, "The only dimension is collapsed: "),
        (0, 1, "The only dimension is not collapsed and carries at most "),
    ],
)
def test_verdict(collapsed, dimensions, start):
    report = example(collapsed, dimensions)
    assert report.verdict.startswith(start)
    assert report.verdict.count(". ") == 0
    assert report.verdict.endswith(".")
    lines = str(report).splitlines()
    assert lines[-1] == report.verdict
    assert lines[0] == (
        f"64 samples, {dimensions} dimension{'s' if dimensions > 1 else ''}; KLs in nats per sample"
    )
    assert repr(report) == f"<DiagnosticsReport of 64 samples: {report.verdict}>"


def test_verdict_on_codes_far_from_the_prior():
    """Collapse is not all that can go wrong."""
    mu, logvar = make_inputs((64, 2))
    report = vaekl.diagnose(mu + 6, logvar - 2)
    assert report.aggregate_kl > 36
    start, end = report.verdict.split("; most of the KL (")
    assert start.startswith("None of 2 dimensions is collapsed; together they carry at most ")
    assert end == (
        f"{report.aggregate_kl:.3g} of {report.kl:.3g} nats) is how far all codes together are "
        "from the prior."
    )
    assert "most of the KL" not in vaekl.diagnose(mu, logvar - 2).verdict


def test_table():
    """Every dimension of a small event; the largest of a wide one, as they would be indexed."""
    report = example(7)
    text = str(report)
    rows = [line.split() for line in text.splitlines()]
    table = [row for row in rows if row and row[0].isdigit()][1:-1]  # not the first and last line
    assert [int(row[0]) for row in table] == list(range(10))
    for i, row in enumerate(table):
        assert float(row[1]) == pytest.approx(float(report.kl_dims[i]), rel=1e-3)
        assert float(row[3]) == pytest.approx(float(report.information_dims[i]), rel=1e-3)
        assert (row[-1] == "collapsed") == (i < 7)
    assert max(map(len, text.splitlines()[:-1])) <= 100

    mu, logvar = make_inputs((8, 3, 20))
    mu[:, 2, 19] += 50
    lines = str(vaekl.diagnose(mu, logvar)).splitlines()
    assert any(line.split()[:1] == ["2,19"] for line in lines)
    assert "  ... and 44 of smaller KL" in lines
    scalar = torch.tensor([0.5, 1.5])
    assert "The only dimension" in str(vaekl.diagnose(scalar, scalar, batch_dims=1))


def test_to_dict_is_flat_floats():
    report = example(7)
    totals = report.to_dict()
    assert all(type(value) is float for value in totals.values())
    assert totals["kl"] == report.kl
    assert totals["collapsed_units"] == 7
    every = report.to_dict(per_dimension=True)
    assert every.items() >= totals.items()
    assert all(type(value) is float for value in every.values())
    assert every["information_dims/9"] == report.information_dims[9]
    assert len(every) == len(totals) + 5 * 10


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    report = example(7)
    figure = report.plot()
    figure.savefig(tmp_path / "report.png")
    (axes,) = figure.axes
    bars = [bar.get_height() for bar in axes.patches]
    torch.testing.assert_close(torch.tensor(bars[:10]).double(), report.aggregate_kl_dims)
    torch.testing.assert_close(torch.tensor(bars[10:]).double(), report.information_dims)
    marks = [torch.tensor(line.get_ydata()) for line in axes.lines]
    torch.testing.assert_close(marks[0], report.kl_dims)
    torch.testing.assert_close(marks[1], report.kl_of_mean_dims)
    assert axes.get_ylabel() == "nats per sample"
    wide = example(5, 100).plot(most=20)
    assert len(wide.axes[0].patches) == 40
    assert wide.axes[0].get_xlabel() == "the 20 of 100 dimensions of the largest KL"


def test_plot_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"plot\(\) needs matplotlib: pip install"):
        example(1).plot()
