"""Options as configs, NumPy and enumerations give them; how many axes are the batch."""

import enum

import numpy as np
import pytest
import torch

import vaekl
from vaekl.testing import make_inputs


class Reduction(str, enum.Enum):
    NONE = "none"
    MEAN = "mean"


class Axes(enum.IntEnum):
    TWO = 2


class Text(str):
    pass


#: Of the same meaning as the plain value beside it.
SAME = {
    "np.bool_": ({"kl_of_mean": np.True_}, {"kl_of_mean": True}),
    "np.bool_ False": ({"kl_of_mean": np.False_}, {"kl_of_mean": False}),
    "np.int64": ({"batch_dims": np.int64(2)}, {"batch_dims": 2}),
    "np.uint8": ({"batch_dims": np.uint8(0)}, {"batch_dims": 0}),
    "IntEnum": ({"batch_dims": Axes.TWO}, {"batch_dims": 2}),
    "np.uint64 seed": ({"seed": np.uint64(2**64 - 1)}, {"seed": 2**64 - 1}),
    "np.int32 seed": ({"seed": np.int32(-3)}, {"seed": -3}),
    "np.float32": ({"clamp": (np.float32(-0.5), np.float64(0.5))}, {"clamp": (-0.5, 0.5)}),
    "np.float16": ({"clamp": (np.float16(-0.5), None)}, {"clamp": (-0.5, None)}),
    "np.int64 bound": ({"clamp": (np.int64(-1), 1)}, {"clamp": (-1, 1)}),
    "array": ({"clamp": np.array([-0.5, 0.5])}, {"clamp": (-0.5, 0.5)}),
    "list": ({"clamp": [-0.5, 0.5]}, {"clamp": (-0.5, 0.5)}),
    "str enum": ({"reduction": Reduction.NONE}, {"reduction": "none"}),
    "np.str_": ({"mean_over": np.str_("all")}, {"mean_over": "all"}),
    "str subclass": ({"reduction": Text("sum")}, {"reduction": "sum"}),
}


@pytest.mark.parametrize("case", list(SAME))
def test_what_means_the_same(case, backend, device):
    """On every road: plain, compiled, packed, under a transform, as a module."""
    given, plain = SAME[case]
    mu, logvar = make_inputs((3, 4, 6), device=device)
    moments = torch.cat([mu, logvar], 1)

    def every(options):
        options = {"seed": 5, "backend": Text(backend), **options}
        found = [*vaekl.reparameterize_kl(mu, logvar, **options)]
        found += vaekl.reparameterize_kl_moments(moments, dim=np.int64(1), **options)
        fixed = {k: v for k, v in options.items() if k != "seed"}
        found += vaekl.nn.ReparameterizeKL(**fixed)(mu, logvar, seed=options["seed"])
        scalar = lambda m: vaekl.reparameterize_kl(m, logvar, **options).kl.sum()  # noqa: E731
        return [t for t in [*found, torch.func.grad(scalar)(mu)] if t is not None]

    for a, b in zip(every(given), every(plain), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", ["str enum", "list"])
def test_compiled(case, device):
    given, plain = SAME[case]
    mu, logvar = make_inputs((3, 4, 6), device=device)
    options = {"seed": 5, "backend": "eager"}
    compiled = torch.compile(
        lambda m, v: tuple(vaekl.reparameterize_kl(m, v, **{**options, **given})),
        fullgraph=True, backend="eager",
    )  # fmt: skip
    expected = vaekl.reparameterize_kl(mu, logvar, **{**options, **plain})
    for a, b in zip(compiled(mu, logvar), expected):
        assert torch.equal(a, b)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_bounds_of_numpy_in_a_program(fullgraph, device):
    """Which torch.compile makes arrays of."""
    mu, logvar = make_inputs((3, 4, 6), device=device)
    compiled = torch.compile(
        lambda m, v: vaekl.kl_loss(m, v, clamp=(np.float32(-0.5), np.float64(0.5))),
        fullgraph=fullgraph, backend="aot_eager",
    )  # fmt: skip
    expected = vaekl.kl_loss(mu, logvar, clamp=(-0.5, 0.5))
    assert torch.equal(compiled(mu, logvar), expected)


def test_a_module_keeps_numbers_of_python(device):
    """Whatever it was given, a compiled program takes them for constants."""
    mu, logvar = make_inputs((4, 6), device=device)
    for clamp in (np.array([-0.5, 0.5]), (np.float32(-0.5), np.float64(0.5))):
        module = vaekl.nn.ReparameterizeKL(clamp=clamp, backend="eager")
        compiled = torch.compile(module, fullgraph=True, backend="eager")
        expected = vaekl.kl_loss(mu, logvar, clamp=(-0.5, 0.5), backend="eager")
        assert torch.equal(compiled(mu, logvar).kl, expected)


SINGLE = {
    "reparameterize_kl": lambda m, **o: vaekl.reparameterize_kl(m, m, **o).kl,
    "kl_loss": lambda m, **o: vaekl.kl_loss(m, m, **o),
    "kl_of_mean": lambda m, **o: vaekl.kl_of_mean(m, m, **o),
    "moments": lambda m, **o: vaekl.reparameterize_kl_moments(torch.cat([m, m]), dim=0, **o).kl,
    "module": lambda m, **o: vaekl.nn.ReparameterizeKL(**o)(m, m).kl,
    "diagnose": lambda m, **o: torch.tensor(vaekl.diagnose(m, m, **o).kl),
    "accumulator": lambda m, **o: torch.tensor(
        vaekl.DiagnosticsAccumulator(**o).update(m, m).report().kl
    ),
}


@pytest.mark.parametrize("name", list(SINGLE))
def test_one_axis_has_to_be_said_to_be_the_batch_or_the_event(name, backend, device):
    """Taken for a batch without a word, an unbatched observation has a KL too small by D."""
    mu = make_inputs((5,), device=device)[0]
    call = SINGLE[name]
    with pytest.raises(ValueError, match=r"batch_dims must be given .*batch_dims=0 .*batch_dims=1"):
        call(mu, backend=backend)
    elements = 0.5 * (mu.double() ** 2 + torch.expm1(mu.double()) - mu.double())
    whole = call(mu, batch_dims=0, backend=backend).double()
    torch.testing.assert_close(whole, elements.sum(), rtol=1e-6, atol=0)
    if name != "kl_of_mean":
        mean = call(mu, batch_dims=1, backend=backend).double()
        torch.testing.assert_close(mean, elements.mean(), rtol=1e-6, atol=0)


def test_sampling_alone_needs_no_batch(backend, device):
    """z does not depend on what is the batch but through the noise of a seed."""
    for shape in ((), (5,)):
        mu = torch.zeros(shape, device=device)
        assert vaekl.reparameterize(mu, mu, seed=1, backend=backend).shape == shape


@pytest.mark.parametrize("name", [name for name in SINGLE if name not in ("moments",)])
def test_no_axis(name, backend, device):
    mu = torch.ones((), device=device)
    with pytest.raises(ValueError, match=r"batch_dims must be given .*batch_dims=0 for one obs"):
        SINGLE[name](mu, backend=backend)
