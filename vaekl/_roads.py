"""Which of three roads a call takes.

- "direct": plain tensors and nothing else going on; straight to the backend.
- "operator": torch.compile, modes, captures, fake and meta tensors; what torch records is one
  operator, itself differentiable.
- "composed": torch.func, forward-mode AD, torch.export, torch.jit.trace, subclasses; plain torch
  operations, which all of these see into.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch._C import (
    DispatchKey,
    DispatchKeySet,
    _dispatch_keys,
    _dispatch_tls_local_include_set,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch._C._functorch import (
    TransformType,
    get_interpreter_stack,
    is_functorch_wrapped_tensor,
    is_legacy_batchedtensor,
)
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.overrides import _get_current_function_mode_stack

Road = Literal["direct", "operator", "composed"]

_PLAIN = (Tensor, torch.nn.Parameter)
# Fake and functional tensors are torch.compile's and FakeTensorMode's, which know operators.
_KNOWN = (*_PLAIN, FakeTensor, FunctionalTensor)
#: What the dispatcher adds to every tensor's keys on a thread where nothing is going on. Dispatch
#: modes, transforms, tracers and captures of every kind add a key of their own.
_ORDINARY = DispatchKeySet(DispatchKey.BackendSelect) | DispatchKeySet(DispatchKey.ADInplaceOrView)
_MODES = ~_ORDINARY.raw_repr()
_plain_keys: set[int] = set()


def road(*tensors: Tensor | None) -> Road:
    """Of a call on these tensors."""
    if is_direct(*tensors):
        return "direct"
    if (
        forward_ad._current_level >= 0
        or is_traced()
        or is_batched(*tensors)
        or any(map(is_subclass, tensors))
    ):
        return "composed"
    return "operator"


def is_direct(*tensors: Tensor | None) -> bool:
    """Would the operator do nothing but call its implementation? (Of what is no tensor: no.)

    Then calling that directly saves most of the host time of a small batch.
    """
    if (
        is_compiling()  # first: Dynamo cannot trace all of what follows
        or _dispatch_tls_local_include_set().raw_repr() & _MODES
        or (_len_torch_function_stack() and _has_function_mode())
        or forward_ad._current_level >= 0
    ):
        return False
    for tensor in tensors:
        if tensor is not None and (
            type(tensor) not in _PLAIN
            or (
                _dispatch_keys(tensor).raw_repr() not in _plain_keys and not _has_plain_keys(tensor)
            )
        ):
            return False
    return True


def _has_function_mode() -> bool:
    """One that wants to see what is called, not torch.set_default_device's."""
    from torch.utils._device import DeviceContext  # loaded where there is one

    return any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())


def _has_plain_keys(tensor: Tensor) -> bool:
    """Nothing in the dispatcher's keys but a device, autograd and autocast; kept for next time."""
    is_plain = not (
        tensor.layout is not torch.strided
        or tensor.is_nested
        or tensor.is_meta
        or tensor.is_neg()  # -x as a view of x, which the dispatcher resolves
        or tensor._is_zerotensor()
        or torch._is_functional_tensor(tensor)
        or is_functorch_wrapped_tensor(tensor)  # and left over from a transform that has ended
        or is_legacy_batchedtensor(tensor)  # of is_grads_batched, which shows in nothing else
    )
    if is_plain:
        _plain_keys.add(_dispatch_keys(tensor).raw_repr())
    return is_plain


def is_subclass(tensor: Tensor | None) -> bool:
    """A class of its own, whose operations only it knows."""
    return tensor is not None and type(tensor) not in _KNOWN


def is_traced() -> bool:
    """Is the call recorded into a program that has to run without vaekl?"""
    # The flag: is_exporting() is True in torch.compile before torch 2.12.
    return torch.compiler._is_exporting_flag or torch._C._get_tracing_state() is not None


def is_batched(*tensors: Tensor | None) -> bool:
    """Can one be a batched tensor: of torch.func, or of is_grads_batched of torch.autograd.grad?"""
    if torch._C._are_functorch_transforms_active():
        return True
    if is_compiling():  # cannot trace what follows
        return False
    return any(tensor is not None and is_legacy_batchedtensor(tensor) for tensor in tensors)


def is_in_vmap() -> bool:
    """Then each sample may need noise of its own, and its key has to be a batched tensor."""
    levels = get_interpreter_stack() or ()
    return any(level.key() == TransformType.Vmap for level in levels)


def is_recorded() -> bool:
    """Is a program recorded? A key that the host read would be a constant of it, or no value."""
    return _len_torch_dispatch_stack() > 0 or _dispatch_tls_local_include_set().has(
        DispatchKey.PreDispatch
    )
