"""Bad input gives its documented error before any work."""

import math
import warnings

import numpy as np
import pytest
import torch

import vaekl

GOOD = torch.zeros(4, 3)
BOTH = torch.zeros(4, 6)  # packed
BAD_CALLS = {
    "mu no tensor": (dict(mu=[1.0]), TypeError, "mu must be a torch.Tensor, got list"),
    "logvar no tensor": (dict(logvar=1j), TypeError, "logvar must be .* or a number, got complex"),
    "integer dtype": (dict(mu=GOOD.long()), TypeError, "mu must have one of the dtypes .*int64"),
    "complex dtype": (dict(logvar=GOOD.cfloat()), TypeError, "logvar must .*complex64"),
    "sparse": (dict(mu=GOOD.to_sparse()), TypeError, "mu must be a dense .*sparse"),
    "shapes differ": (dict(logvar=GOOD[:2]), ValueError, r"logvar .*\(4, 3\); got \(2, 3\)"),
    "mu broadcasts": (dict(mu=GOOD[:1]), ValueError, r"logvar .* \(1, 3\); got \(4, 3\)"),
    "one axis": (
        dict(mu=GOOD[0], logvar=GOOD[0]), ValueError,
        r"batch_dims must be given .* shape \(3,\): batch_dims=0 for one observation of 3",
    ),
    "no axes": (
        dict(mu=GOOD[0, 0], logvar=GOOD[0, 0]), ValueError, r"batch_dims must be given .* \(\)",
    ),
    "devices differ": (dict(logvar=GOOD.to("meta")), ValueError, "logvar .*device of mu, .*meta"),
    "reduction": (dict(reduction="avg"), ValueError, "reduction must be one of 'none', .*'avg'"),
    "reduction None": (dict(reduction=None), ValueError, "reduction must be one of"),
    "mean_over": (dict(mean_over="rows"), ValueError, "mean_over must be one of .*'rows'"),
    "mean_over unused": (
        dict(mean_over="rows", kl_of_mean=False), ValueError, "mean_over must be one of",
    ),
    "kl_of_mean text": (dict(kl_of_mean="no"), TypeError, "kl_of_mean must be a bool, got str"),
    "generator device": (
        dict(mu=GOOD.to("meta"), logvar=GOOD.to("meta"), generator=torch.Generator()), ValueError,
        "generator must be on the device of mu, meta; got cpu",
    ),
    "batch_dims high": (dict(batch_dims=3), ValueError, r"batch_dims .* \[0, 2\].*\(4, 3\)"),
    "batch_dims low": (dict(batch_dims=-1), ValueError, "batch_dims must be in"),
    "batch_dims float": (dict(batch_dims=1.0), TypeError, "batch_dims must be an int, got float"),
    "batch_dims np.bool_": (dict(batch_dims=np.True_), TypeError, "batch_dims .* got bool"),
    "clamp np.bool_": (dict(clamp=(np.False_, 1)), TypeError, "clamp bounds must be numbers"),
    "batch_dims bool": (dict(batch_dims=True), TypeError, "batch_dims must be an int, got bool"),
    "two noises": (dict(eps=GOOD, seed=1), ValueError, "at most one .* eps and seed"),
    "two sources": (
        dict(generator=torch.Generator(), seed=1), ValueError, "at most one .* generator and seed",
    ),
    "eps shape": (dict(eps=GOOD[:2]), ValueError, r"eps must have the shape of mu"),
    "eps dtype": (dict(eps=GOOD.int()), TypeError, "eps must have one of the dtypes"),
    "seed type": (dict(seed=1.5), TypeError, "seed must be an int, got float"),
    "seed tensor": (dict(seed=torch.tensor(1)), TypeError, "seed must be an int, got Tensor"),
    "seed range": (dict(seed=2**64), ValueError, "seed must be in"),
    "generator": (dict(generator=5), TypeError, "generator must be a torch.Generator, got int"),
    "clamp number": (dict(clamp=3.0), TypeError, r"clamp must be a pair \(lo, hi\)"),
    "clamp triple": (dict(clamp=(1, 2, 3)), TypeError, "clamp must be a pair"),
    "clamp text": (dict(clamp="ab"), TypeError, "clamp must be a pair"),
    "clamp array": (dict(clamp=np.array(1.0)), TypeError, "clamp must be a pair"),
    "seed array": (dict(seed=np.array([3, 4])), TypeError, "seed must be an int, got ndarray"),
    "reduction array": (dict(reduction=np.array(["sum"])), ValueError, "reduction must be one of"),
    "clamp content": (dict(clamp=("a", 1)), TypeError, "clamp bounds must be numbers"),
    "clamp order": (dict(clamp=(1.0, -1.0)), ValueError, "clamp needs lo <= hi"),
    "clamp order, large": (dict(clamp=(1e301, 1e300)), ValueError, "clamp needs lo <= hi"),
    "clamp nan": (dict(clamp=(math.nan, 1.0)), ValueError, "clamp needs lo <= hi"),
    "backend": (dict(backend="cuda"), ValueError, "backend must be one of .*'cuda'"),
    "scale": (dict(scale="sigma"), ValueError, "scale must be one of 'logvar', .*; got 'sigma'"),
    "prior no pair": (dict(prior=GOOD), TypeError, r"prior must be a pair \(mean, .* got Tensor"),
    "prior too large": (dict(prior=(10**400, 0)), ValueError, "prior's mean must be a number that"),
    "scale beside a prior": (dict(scale=["std"], prior=(0, 1)), ValueError, "scale must be one of"),
    "prior of one": (dict(prior=(GOOD,)), TypeError, "prior must be a pair .* got 1 of them"),
    "prior None": (dict(prior=(0.0, None)), TypeError, "prior's scale must be a .*, got NoneType"),
    "prior text": (dict(prior=("a", 0)), TypeError, "prior's mean must be .* a number, got str"),
    "prior dtype": (dict(prior=(GOOD[0].int(), 0)), TypeError, "prior's mean .*torch.int32"),
    "prior shape": (
        dict(prior=(0, GOOD[0, :2])), ValueError,
        r"the prior's scale must have the shape of mu, \(4, 3\); got \(2,\), which does not broad",
    ),
    "prior larger": (dict(prior=(GOOD[None], 0)), ValueError, r"mean .*; got \(1, 4, 3\), which"),
    "prior device": (
        dict(prior=(GOOD[0].to("meta"), 0)), ValueError, "mean must be on the device of mu, .*meta",
    ),
    "prior of samples": (
        dict(prior=(GOOD, 0)), ValueError,
        r"without batch axes, .* shapes \(4, 3\) and \(\) .* \(4, 3\) .*: pass kl_of_mean=False",
    ),
    "prior over all": (
        dict(prior=(GOOD[0], 0), mean_over="all"), ValueError,
        r"mean_over='all' needs a prior of one mean and one scale, got shapes \(3,\) and \(\)",
    ),
}  # fmt: skip


BAD_MOMENTS = {
    "no tensor": (dict(moments=[1.0]), TypeError, r"moments must be a torch\.Tensor, got list"),
    "dtype": (dict(moments=BOTH.long()), TypeError, "moments must have one of the dtypes .*int64"),
    "odd size": (
        dict(moments=BOTH[:, :5]), ValueError,
        r"moments must have an even size along dim=1, .*; got 5 \(shape \(4, 5\)\)",
    ),
    "odd size from the end": (dict(moments=BOTH[:3], dim=-2), ValueError, "even size .*dim=-2.* 3"),
    "scalar": (dict(moments=BOTH[0, 0]), ValueError, "moments must have an axis .*shape"),
    "dim high": (dict(dim=2), ValueError, r"dim must be in \[-2, 1\] .*\(4, 6\)\); got 2"),
    "dim low": (dict(dim=-3), ValueError, r"dim must be in \[-2, 1\]"),
    "dim default": (dict(moments=BOTH[0]), ValueError, r"dim must be in \[-1, 0\] .*; got 1"),
    "dim type": (dict(dim=1.0), TypeError, "dim must be an int, got float"),
    "dim bool": (dict(dim=True), TypeError, "dim must be an int, got bool"),
    "batch_dims": (dict(batch_dims=3), ValueError, r"batch_dims must be in \[0, 2\] .*; got 3"),
    "batch_dims type": (dict(batch_dims="1"), TypeError, "batch_dims must be an int, got str"),
    "eps shape": (
        dict(eps=BOTH), ValueError, r"eps must have the shape of mu, \(4, 3\); got \(4, 6\)",
    ),
    "two noises": (dict(eps=BOTH[:, :3], seed=1), ValueError, "at most one .* eps and seed"),
    "reduction": (dict(reduction="avg"), ValueError, "reduction must be one of"),
    "mean_over": (dict(mean_over="rows"), ValueError, "mean_over must be one of"),
    "kl_of_mean": (dict(kl_of_mean=1), TypeError, "kl_of_mean must be a bool"),
    "clamp": (dict(clamp=(1.0, 0.0)), ValueError, "clamp needs lo <= hi"),
    "backend": (dict(backend="cuda"), ValueError, "backend must be one of"),
}  # fmt: skip


def cases(function, good, bad):
    """(function, its arguments, error, message) of each bad call."""
    for name, (arguments, error, message) in bad.items():
        yield pytest.param(function, {**good, **arguments}, error, message, id=name)


@pytest.mark.parametrize(
    ("function", "arguments", "error", "message"),
    [
        *cases(vaekl.reparameterize_kl, {"mu": GOOD, "logvar": GOOD}, BAD_CALLS),
        *cases(vaekl.reparameterize_kl_moments, {"moments": BOTH}, BAD_MOMENTS),
    ],
)
def test_bad_input(function, arguments, error, message):
    before = torch.get_rng_state()
    with pytest.raises(error, match=message):
        function(**arguments)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["mu", "logvar", "eps"])
def test_masked_and_nested_tensors_are_refused(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "in prototype stage"
        odd = [(torch.masked.masked_tensor(GOOD, GOOD == 0), "without a mask, got MaskedTensor")]
        for layout in (torch.strided, torch.jagged):
            nested = torch.nested.nested_tensor([GOOD, GOOD], layout=layout)
            odd.append((nested, "dense .* got a nested one"))
    for value, message in odd:
        given = {"mu": GOOD, "logvar": GOOD, "eps": GOOD, name: value}
        with pytest.raises(TypeError, match=f"{name} must be a .*{message}"):
            vaekl.reparameterize_kl(given.pop("mu"), given.pop("logvar"), **given)


@pytest.mark.parametrize(
    "function", [vaekl.reparameterize, vaekl.kl_loss, vaekl.kl_of_mean], ids=lambda f: f.__name__
)
def test_every_function_checks(function):
    with pytest.raises(TypeError, match=r"mu must be a torch\.Tensor"):
        function(None, GOOD)
    with pytest.raises(ValueError, match=r"logvar must have the shape"):
        function(GOOD, GOOD[:2])
    with pytest.raises(ValueError, match="backend must be one of"):
        function(GOOD, GOOD, backend="no")
    with pytest.raises(ValueError, match="clamp needs"):
        function(GOOD, GOOD, clamp=(1, 0))
    for option in ("reduction", "mean_over"):
        if option in function.__kwdefaults__:
            with pytest.raises(ValueError, match=f"{option} must be one of"):
                function(GOOD, GOOD, **{option: None})
