"""Whole steps beside the oracle, under the budgets of vaekl.testing, and beside eager."""

import numpy as np
import torch

import vaekl
from storages import PAIR
from vaekl.reference import SEED_OFFSET, Oracle, normal, to_numpy, torch_reparameterize_kl
from vaekl.testing import (
    EPS_BUDGET,
    KL_BUDGET,
    gradient_bounds,
    kl_of_mean_bound,
    make_inputs,
    step,
    unit,
    worst,
)

SEED = 0x1234_5678_9ABC
NUMBER = torch.tensor(0.3)


def scale_of(name, logvar):
    """A logvar in a form, in its dtype."""
    wide = logvar.double()
    values = {"logvar": wide, "log_std": wide / 2, "std": (wide / 2).exp(), "var": wide.exp()}
    return values[name].to(logvar.dtype)


def check_beside_eager(shape, upstream, device, *, memory="contiguous", **options):
    """Values and gradients of the triton backend, of noise that is the same; `upstream` says of
    which outputs.
    """
    mu, logvar = make_inputs(shape, device=device, layout=memory)
    if options.pop("number", False):
        logvar = NUMBER.to(device)
    if options.pop("given", False):
        options["eps"] = torch.randn(shape, device=device)
    else:
        options["seed"] = -3
    of_z, of_kl, of_mean = upstream
    of_rows = shape[:1] if options.get("reduction") == "none" else ()
    upstream = [
        torch.randn(shape, device=device) if of_z else None,
        torch.randn(of_rows, device=device) if of_kl else None,
        torch.tensor(1.3, device=device) if of_mean else None,
    ]
    if not options.get("kl_of_mean", True):
        upstream.pop()
    found, expected = (
        step(
            lambda m, v, b=backend: [
                t for t in vaekl.reparameterize_kl(m, v, backend=b, **options) if t is not None
            ],
            (mu, logvar),
            upstream,
        )
        for backend in ("triton", "eager")
    )
    for a, b in zip(found.outputs, expected.outputs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=3e-6)
    for a, b in zip(found.gradients, expected.gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


def compute_dtype(*tensors):
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def rows(shape, batch_dims):
    return int(np.prod(shape[:batch_dims])), int(np.prod(shape[batch_dims:]))


def check(
    tensors, *, backend, storage=PAIR, eps=None, needs=None, upstream=None, kl_of_mean=True,
    **options,
):  # fmt: skip
    """One forward and backward with random upstream gradients; every output within its budget.

    Returns the gradients of the tensors.
    """
    noise = {} if eps is not None else {"seed": SEED}
    every = {"backend": backend, "kl_of_mean": kl_of_mean, **noise, **options}
    inputs = tensors if eps is None else (*tensors, eps)
    out, upstream, gradients = step(
        lambda *t: storage.call(*t, **every), inputs, upstream, needs=needs
    )
    mu, logvar = (t.detach() for t in storage.halves(*tensors))
    drawn = None
    if eps is None:
        drawn = normal(SEED, SEED_OFFSET, *rows(mu.shape, options.get("batch_dims", 1)))
        drawn = drawn.reshape(mu.shape)
    oracle = Oracle(mu, logvar, eps if eps is not None else drawn, **options)
    dtype = compute_dtype(mu, logvar, eps)

    assert out.kl.dtype == dtype
    assert out.kl.shape == oracle.kl.shape
    assert worst(out.kl, oracle.kl, KL_BUDGET[dtype] * oracle.kl) <= 1
    if kl_of_mean:
        assert out.kl_of_mean.dtype == dtype
        assert worst(out.kl_of_mean, oracle.kl_of_mean, kl_of_mean_bound(oracle, dtype)) <= 1
    else:
        assert out.kl_of_mean is None
    check_z(out.z, mu, logvar, eps, oracle, dtype)
    if storage is not PAIR:
        assert torch.equal(out.z, PAIR.call(mu, logvar, eps, **every).z)
    needs = needs or [True] * len(inputs)
    assert out.kl.requires_grad == any(needs[: len(tensors)])

    exact = oracle.gradients(*upstream)
    for i, (gradient, tensor) in enumerate(zip(gradients, inputs)):
        if not needs[i]:
            continue
        bounds = gradient_bounds(oracle, dtype, tensor.dtype, *upstream, drawn=eps is None)
        expected, bound = ((*storage.gradients(of), of.get("deps"))[i] for of in (exact, bounds))
        assert gradient.dtype == tensor.dtype
        assert worst(gradient, expected, bound) <= 1, i
    return gradients[: len(tensors)]


def check_z(z, mu, logvar, eps, oracle, dtype):
    """Error at most that of plain torch in the same dtype, plus one ulp of the output dtype."""
    plain_eps = eps if eps is not None else torch.as_tensor(oracle.eps).to(z)
    with torch.no_grad():
        plain = torch_reparameterize_kl(
            mu.flatten(),
            logvar.flatten(),
            plain_eps.flatten(),
            batch_dims=0,
            clamp=oracle.clamp,
            scale=oracle.scale,
        )[0].view(mu.shape)
    assert z.dtype == plain.dtype
    size = np.abs(oracle.mu) + np.abs(oracle.z - oracle.mu)
    ulp = 2 * unit(z.dtype) * size
    extra = 0.0
    if eps is None:
        extra = EPS_BUDGET[dtype] * np.abs((oracle.z - oracle.mu) / oracle.eps)
        plain_error = 0.0
    else:
        plain_error = np.max(np.abs(to_numpy(plain) - oracle.z) / ulp)
    assert worst(z, oracle.z, (plain_error + 1) * ulp + extra) <= 1
