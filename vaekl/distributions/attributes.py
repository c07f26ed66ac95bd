"""What a posterior is made of: tensors computed when they are read, and whether they still hold.

diffusers computes all of them at once, and code around it assigns them or writes into them. Here
they cost nothing until then: kernels read ``parameters``, as long as the attributes that a method
goes by have not been touched.
"""

from __future__ import annotations

from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from vaekl._spec import LOGVAR_RANGE
from vaekl.backends.forms import clamped

#: Bounds on logvar, (-30, 20): those of diffusers (and of latent diffusion before it).
CLAMP = LOGVAR_RANGE


_ASSIGNED = ("mean", "logvar", "std", "var")


class _Held(NamedTuple):
    """A tensor that somebody has, as it was then."""

    tensor: Tensor
    is_made: bool  # here; else assigned
    version: int | None
    requires_grad: bool


def _held(tensor: Tensor, is_made: bool = True) -> _Held:
    return _Held(tensor, is_made, _version(tensor), tensor.requires_grad)


def _version(tensor: Tensor) -> int | None:
    """How often it was written to; None where nobody counts, or that cannot be traced."""
    if torch.compiler.is_compiling() or tensor.is_inference():
        return None
    if is_functorch_wrapped_tensor(tensor) or torch._is_functional_tensor(tensor):
        return None
    return tensor._version


class Attributes:
    """Each as in diffusers: apart from the others once it is there, but for mean.

    mean is a view of parameters. logvar, std and var are of the parameters that there were at
    first.
    """

    #: kl and nll are 0. (That std and var are, too, was decided at first.)
    deterministic: bool

    def __init__(self, parameters: Tensor, deterministic: bool) -> None:
        self.deterministic = deterministic
        self._is_zero = bool(deterministic)  # std and var
        self._parameters = self._moments = parameters
        self._held: dict[str, _Held] = {}
        #: logvar, and the version of parameters that it is of.
        self._kept: tuple[Tensor, int | None] | None = None
        self._with_graph = torch.is_grad_enabled()

    @property
    def parameters(self) -> Tensor:
        """mean and logvar, the halves along axis 1: [B, 2 C, ...]."""
        if self._kept is None:  # who has them may write to them, which is to change mean alone
            self._kept = self._made("logvar"), _version(self._moments)
        return self._parameters

    @parameters.setter
    def parameters(self, value: Tensor) -> None:
        self._parameters = _tensor("parameters", value)

    @property
    def mean(self) -> Tensor:
        """[B, C, ...], a view of parameters."""
        return self._read("mean")

    @mean.setter
    def mean(self, value: Tensor) -> None:
        self._assign("mean", value)

    @property
    def logvar(self) -> Tensor:
        """[B, C, ...], clamped to [-30, 20]."""
        return self._read("logvar")

    @logvar.setter
    def logvar(self, value: Tensor) -> None:
        self._assign("logvar", value)

    @property
    def std(self) -> Tensor:
        """exp(logvar / 2), or 0 if deterministic at first."""
        return self._read("std")

    @std.setter
    def std(self, value: Tensor) -> None:
        self._assign("std", value)

    @property
    def var(self) -> Tensor:
        """exp(logvar), or 0 if deterministic at first."""
        return self._read("var")

    @var.setter
    def var(self, value: Tensor) -> None:
        self._assign("var", value)

    def __setattr__(self, name: str, value: Any) -> None:
        # What the setters do, which torch.compile passes by on some versions of torch (2.10).
        if name in _ASSIGNED:
            self._assign(name, value)
        else:
            super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        # A plain dict of tensors: no more to trust for torch.load than the class itself.
        held = {n: held.tensor for n, held in self._held.items() if not self._is_as_made(n)}
        kept = None if self._is_in_parameters() or self._kept is None else (self._kept[0], None)
        own = ("deterministic", "_is_zero", "_parameters", "_moments", "_with_graph")
        return {**{name: getattr(self, name) for name in own}, "_held": held, "_kept": kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        held = {n: _held(t, is_made=False) for n, t in state["_held"].items()}
        for name, value in {**state, "_held": held}.items():
            setattr(self, name, value)

    def _read(self, name: str) -> Tensor:
        held = self._held.get(name)
        if held is None:
            held = self._held[name] = _held(self._made(name))
            if self._is_zero and name in ("std", "var"):  # one tensor in diffusers
                self._held.setdefault("var" if name == "std" else "std", held)
        return held.tensor

    def _assign(self, name: str, value: Tensor) -> None:
        held = self._held.get(name)
        if held is None or held.tensor is not value:  # else: p.std *= 2
            if isinstance(value, Real) and not isinstance(value, bool):
                value = torch.full_like(self._made("mean"), float(value))
            self._held[name] = _held(_tensor(name, value), is_made=False)

    def _made(self, name: str) -> Tensor:
        """A new tensor of what there was at first, with gradients if there were any then."""
        if torch.compiler.is_compiling():
            return self._compute(name)
        # Of an inference tensor nobody counts the writes.
        with torch.inference_mode(False), torch.set_grad_enabled(self._with_graph):
            return self._compute(name)

    def _compute(self, name: str) -> Tensor:
        half = self._moments.shape[1] // 2
        mean, logvar = self._moments.narrow(1, 0, half), self._moments.narrow(1, half, half)
        if name == "mean":
            return mean
        if name != "logvar" and self._is_zero:
            return torch.zeros_like(mean)
        logvar = clamped(logvar, CLAMP) if self._kept is None else self._kept[0].clone()
        if name == "logvar":
            return logvar
        return torch.exp(0.5 * logvar if name == "std" else logvar)

    def _is_as_made(self, *names: str) -> bool:
        """Has nobody changed any of these, nor asked for its gradient?"""
        for name in names:
            held = self._held.get(name)
            if held is None:
                continue
            tensor = held.tensor
            # What is written to mean is in parameters.
            is_written = name != "mean" and (
                held.version is None or held.version != _version(tensor)
            )
            if (
                not held.is_made
                or is_written
                or tensor.requires_grad != held.requires_grad
                or tensor.retains_grad
                or tensor._backward_hooks
            ):
                return False
        return True

    def _is_packed(self, scale: str) -> bool:
        """May mean and std (or logvar) be read from parameters, as kernels do?

        Not where somebody has one of them and may ask for its gradient.
        """
        held = [self._held[name] for name in ("mean", scale) if name in self._held]
        is_asked = torch.is_grad_enabled() and any(each.requires_grad for each in held)
        return not is_asked and self._is_in_parameters()

    def _is_in_parameters(self) -> bool:
        """Is the first logvar still in the tensor that it came in?"""
        if self._kept is None:
            return True
        version = self._kept[1]
        return version is not None and version == _version(self._moments)


def _tensor(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    return value
