"""The same results composed of plain torch operations, which everything in torch can go through.

For torch.func transforms, forward-mode AD, torch.export, torch.jit.trace and tensor subclasses:
reach, not speed. Every operation here has derivatives of every order, a batching rule and a
decomposition; no operator of vaekl is left in an exported program.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import DispatchKey, _dispatch_tls_local_include_set, _len_torch_dispatch_stack
from torch._C._functorch import TransformType, get_interpreter_stack
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from vaekl.kernels.coefficients import PHI_F64

from . import _eager
from ._noise import device_key, draw_key, philox_normal
from ._options import Options, compute_dtype, sample_dtype, sizes

# Fake and functional tensors are torch.compile's and FakeTensorMode's, which know operators.
_KNOWN = (Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor)


def is_subclass(tensor: Tensor | None) -> bool:
    """A class of its own, whose operations only it knows."""
    return tensor is not None and type(tensor) not in _KNOWN


def is_needed(*tensors: Tensor | None) -> bool:
    """Would a kernel, or an operator around it, be lost on what is going on?"""
    return (
        torch.autograd.forward_ad._current_level >= 0
        or _is_traced()
        or _eager.is_batched(*tensors)
        or any(map(is_subclass, tensors))
    )


def _is_traced() -> bool:
    """Into a program that has to run without vaekl."""
    # The flag: is_exporting() is True in torch.compile before torch 2.12.
    return torch.compiler._is_exporting_flag or torch._C._get_tracing_state() is not None


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


def _noise(
    mu: Tensor,
    batch: int,
    event: int,
    dtype: torch.dtype,
    generator: torch.Generator | None,
    seed: int | None,
    backend: str,
) -> Tensor:
    """eps of the shape of mu: what the backend would draw, wherever there is a key to read."""
    if generator is not None and _is_traced():
        raise ValueError(
            "generator must be None in what is exported or traced: a program cannot hold one; "
            "draw from torch's own generator or give eps"
        )
    if seed is None and generator is None and is_subclass(mu):
        return torch.randn_like(mu, dtype=dtype)  # placed, or wrapped, as mu is
    if backend == "eager" or (seed is None and _is_traced()):
        return _eager.draw_noise(mu, batch, event, dtype, generator, seed).reshape(mu.shape)
    word: int | Tensor
    offset: int | Tensor
    if seed is None and (torch.compiler.is_compiling() or _is_in_vmap() or _is_recorded()):
        key: Tensor | None = device_key(mu.device, generator)
    else:
        word, offset, key = draw_key(mu.device, generator, seed)
    if key is not None:
        word, offset = key[0], key[1]
    return philox_normal(word, offset, batch, event, dtype, mu.device).reshape(mu.shape)


def _is_recorded() -> bool:
    """Then a key that the host reads would be a constant of the program, or has no value yet."""
    return _len_torch_dispatch_stack() > 0 or _dispatch_tls_local_include_set().has(
        DispatchKey.PreDispatch
    )


def _is_in_vmap() -> bool:
    """Then each sample may need noise of its own: no key that the host knows would do."""
    levels = get_interpreter_stack() or ()
    return any(level.key() == TransformType.Vmap for level in levels)


def reparameterize_kl(
    mu: Tensor,
    logvar: Tensor,
    eps: Tensor | None,
    generator: torch.Generator | None,
    seed: int | None,
    options: Options,
    backend: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(z, kl, kl_of_mean), None for what is not wanted."""
    dtype, z_dtype = compute_dtype(mu, logvar, eps), sample_dtype(mu, logvar, eps)
    noise = eps
    if options.sample and eps is None:
        batch, event = sizes(mu.shape, options.batch_dims)
        noise = _noise(mu, batch, event, dtype, generator, seed, backend)
    if options.clamp is not None:
        logvar = _eager.clamped(logvar.to(dtype), options.clamp)
    options = options._replace(clamp=None)
    z, kl, kl_of_mean, _ = _eager.outputs(mu, logvar, noise, dtype, options, phi)
    return None if z is None else z.to(z_dtype), kl, kl_of_mean
