"""Whole steps of a backend beside those of another."""

import torch

import vaekl
from vaekl.testing import make_inputs, step

NUMBER = torch.tensor(0.3)


def halves(mu, logvar):
    """Of one tensor, so that rows do not follow each other."""
    return torch.cat([mu, logvar], 1).chunk(2, 1)


def check_beside_eager(shape, upstream, device, *, memory="contiguous", **options):
    """Values and gradients of the triton backend, of noise that is the same; `upstream` says of
    which outputs.
    """
    if memory == "halves":
        mu, logvar = halves(*make_inputs(shape, device=device))
    else:
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
