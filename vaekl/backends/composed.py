"""The same results composed of plain torch operations, which everything in torch can go through.

For torch.func transforms, forward-mode AD, torch.export, torch.jit.trace and tensor subclasses:
reach, not speed. Every operation here has derivatives of every order, a batching rule and a
decomposition; no operator of vaekl is left in an exported program.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vaekl._noise import device_key, draw_key, philox_normal
from vaekl._roads import is_in_vmap, is_recorded, is_subclass, is_traced
from vaekl._spec import Key, Operands, Outputs, Source, Spec, compute_dtype, sample_dtype, sizes
from vaekl.kernels.coefficients import PHI_F64

from . import densities, eager, formulas, keeps_noise
from .forms import clamped_logvar


def phi(logvar: Tensor) -> Tensor:
    """exp(l) - 1 - l without cancellation, differentiable any number of times.

    A derivative of the Taylor series is one too, so it loses no digits near 0. The series does not
    see large arguments: its inf would turn a gradient of 0 into NaN. For those no expm1 is needed,
    of which torch's exporter by tracing knows nothing.
    """
    is_small = logvar.abs() <= 1.0
    small = torch.where(is_small, logvar, 0.0)
    series = torch.zeros_like(small)
    for coefficient in PHI_F64:
        series = series * small + coefficient
    return torch.where(is_small, small * small * series, torch.exp(logvar) - 1.0 - logvar)


def _noise(spec: Spec, x: Operands, source: Source) -> Tensor:
    """eps of the shape of mu: what the backend would draw, wherever there is a key to read."""
    generator, seed, samples, kind = source
    mu, dtype = x.mu, compute_dtype(*x)
    if generator is not None and is_traced():
        raise ValueError(
            "generator must be None in what is exported or traced: a program cannot hold one; "
            "draw from torch's own generator or give eps"
        )
    if seed is None and generator is None and is_subclass(mu):
        return torch.randn_like(mu, dtype=dtype)  # placed, or wrapped, as mu is
    if keeps_noise(spec.backend) or (seed is None and is_traced()):
        return eager.draw_noise(spec, x, source).reshape(mu.shape)
    if seed is None and (torch.compiler.is_compiling() or is_in_vmap() or is_recorded()):
        key = Key(0, 0, device_key(mu.device, generator))
    else:
        key = draw_key(mu.device, source)
    shape = sizes(mu.shape, spec.batch_dims)
    return philox_normal(key, shape, dtype, mu.device, samples, kind).reshape(mu.shape)


def forward(spec: Spec, x: Operands, source: Source) -> Outputs:
    """The outputs."""
    dtype = compute_dtype(*x)
    given = x
    if spec.sample and x.eps is None:
        given = x._replace(eps=_noise(spec, x, source))
    if spec.log_prob is not None:
        outputs = densities.outputs(spec, given, dtype, is_composed=True)
    else:
        outputs, _ = formulas.outputs(
            spec, given, dtype, lambda logvars: [phi(v) for v in logvars], clamped_logvar
        )
    if outputs.z is None:
        return outputs
    return outputs._replace(z=outputs.z.to(sample_dtype(*x[:3])))
