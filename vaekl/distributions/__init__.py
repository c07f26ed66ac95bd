"""The classes of other libraries, with vaekl's samples and KLs.

:class:`Normal` is torch.distributions'; :class:`DiagonalGaussianDistribution` is the posterior that
diffusers' autoencoders return, and :func:`patch_diffusers` puts it into an installed diffusers.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vaekl import _validate, functional
from vaekl._spec import Source, Terms

from .attributes import CLAMP, Attributes
from .draws import Generators, drawn, given
from .normal import Normal

__all__ = ["DiagonalGaussianDistribution", "DiffusersPatch", "Normal", "patch_diffusers"]


class DiagonalGaussianDistribution(Attributes):
    """N(mean, e^logvar) of an encoder's output, as ``diffusers``' class of this name.

    Same constructor, attributes and methods; beside them ``kl(dims=)`` and :meth:`sample_and_kl`.
    What differs: KLs and nll are float32 for half precision inputs (an SD-sized KL of 130,000 nats
    is inf in float16) and keep their digits near 0; noise comes from vaekl; mean, logvar, std and
    var are computed when read.

    All of them may be assigned, and written to in place, and mean nothing to each other: a sample
    is ``mean + std * eps``, kl() and nll() are of mean, var and logvar, as they are then. (mean is
    a view of parameters; logvar, std and var are what parameters says when the first of them is
    read. Writes that torch does not count, through ``.data`` or NumPy, are not seen.) Untouched,
    all are read from parameters in one launch; touched, they take plain torch operations.

    kl() and nll() sum over all axes but the first. diffusers sums over [1, 2, 3], which on a 5-D
    video tensor [B, C, T, H, W] leaves [B, W]: averaged, a KL too small by the factor W.
    ``dims=[1, 2, 3]`` gives those sums.

    Args:
        parameters: mean and logvar, the halves along axis 1: [B, 2 C, ...]; float16, bfloat16,
            float32 or float64. logvar is clamped to [-30, 20].
        deterministic: std and var are 0, samples are the mean, kl and nll are 0 (of shape [1]).

    Raises:
        TypeError: parameters is no tensor of such a dtype.
        ValueError: An odd size along axis 1, or no axis 1.
    """

    #: Axes that kl() and nll() sum over unless told; None: all but the first.
    default_dims: tuple[int, ...] | None = None

    def __init__(self, parameters: Tensor, deterministic: bool = False) -> None:
        if isinstance(parameters, Tensor) and parameters.dim() < 2:
            raise ValueError(
                "parameters must have an axis 1, which holds mean and logvar; got shape "
                f"{tuple(parameters.shape)}"
            )
        _validate.moments(parameters, 1, name="parameters")
        super().__init__(parameters, deterministic)

    def sample(self, generator: Generators = None) -> Tensor:
        """``mean + std * eps``, [B, C, ...], of the dtype of parameters.

        Args:
            generator: One for all samples, or a list of one per sample: sample b is then what a
                batch of that sample alone gets from generator b, in one launch if all generators
                are of one device (but on the eager backend, or where a program is captured). A
                generator of the CPU serves tensors of any device, with the same noise on CUDA as
                on the CPU. Default: torch's own of the device.

        Raises:
            TypeError, ValueError: Not a generator, one of another device, or a list of another
                length than the batch (or 1).
        """
        return self._draw(generator, None)[0]

    def sample_and_kl(self, generator: Generators = None) -> tuple[Tensor, Tensor]:
        """``(sample(generator), kl())`` in one launch, and one backward: the sample [B, C, ...] and
        its KL to N(0, I) in nats, [B], summed over all axes but the first. Errors as in sample."""
        if self.deterministic or not self._is_as_made("mean", "logvar", "std", "var"):
            return self.sample(generator), self.kl(dims=range(1, self.mean.dim()))
        z, kl = self._draw(generator, "none")
        return z, kl if kl is not None else self.kl(dims=range(1, self.mean.dim()))

    def _draw(self, generator: Generators, reduction: str | None) -> tuple[Tensor, Tensor | None]:
        """A sample, and its KLs if asked for and as cheap."""
        is_as_made = self._is_as_made("mean", "std")
        if is_as_made and self._is_zero:
            return self.mean.clone(), None
        if is_as_made and self._is_packed("std"):
            return drawn(self._moments, generator, reduction)
        mean, std = self.mean, self.std
        wide = _wide(self._parameters).dtype
        # Of mean 0 and std 1, samples are the noise that they have.
        noise = torch.zeros((), dtype=wide, device=mean.device)
        noise = noise.expand(*mean.shape[:1], 2 * math.prod(mean.shape[1:]))
        eps = drawn(noise, generator, None)[0].reshape(mean.shape)
        dtype = torch.promote_types(mean.dtype, std.dtype)
        dtype = torch.promote_types(dtype, self._parameters.dtype)
        return (_wide(mean) + _wide(std) * eps).to(dtype), None

    def kl(
        self, other: DiagonalGaussianDistribution | None = None, dims: Sequence[int] | None = None
    ) -> Tensor:
        """KL in nats to N(0, I), or to another such distribution of the same shape.

        ``½ Σ (mean² + var − 1 − logvar)`` (Kingma & Welling 2013, appendix B), and with another
        ``½ Σ ((mean − mean')² / var' + var / var' − 1 − logvar + logvar')``.

        Args:
            other: An object with mean and logvar; diffusers' own class will do. If it is
                ``deterministic``, the KL is inf (NaN where the means agree), as there.
            dims: Axes to sum over. Default: all but the first, so [B].

        Returns:
            One KL for each index of the other axes; float32, float64 for float64.

        Raises:
            TypeError: other is no such object.
            ValueError: dims are no axes of mean, or shapes differ.
        """
        if self.deterministic:
            return self._zero()
        axes = self._axes(dims)
        is_one, is_whole = self._is_one(), axes == tuple(range(1, self._moments.dim()))
        if is_one and is_whole and other is None:
            if self._is_as_made("mean") and self._is_packed("logvar"):
                packed = functional.Packed(self._moments, 1)
                terms = Terms(reduction="none")
                kls = functional.compute_moments(
                    packed, Source(), terms, None, "logvar", CLAMP, "auto"
                )
                return given(kls[1])
        mean, logvar, prior = self.mean, self.logvar, None
        if other is not None:
            if not (hasattr(other, "mean") and hasattr(other, "logvar")):
                raise TypeError(
                    "other must have a distribution's mean and logvar, got " + type(other).__name__
                )
            _same_shape("other.mean", other.mean, mean)
            if not is_one or not _is_of_one(other):
                return self._kl_of_parts(other, axes)
            mean, theirs, logvar, width = map(_wide, (mean, other.mean, logvar, other.logvar))
            if _is_zero(other):  # infinitely many deviations away
                mean, logvar = (mean - theirs) * torch.inf, logvar - width
            else:
                prior = theirs, width
        elif not is_one or not _validate.alike(mean.shape, logvar.shape):
            return self._kl_of_parts(None, axes)
        kept = [axis for axis in range(mean.dim()) if axis not in axes]
        order = (*kept, *axes)
        if prior is not None:
            prior = prior[0].permute(order), prior[1].permute(order)
        return functional.kl_loss(
            mean.permute(order), logvar.permute(order), prior=prior, batch_dims=len(kept),
            reduction="none",
        )  # fmt: skip

    def _is_one(self) -> bool:
        """Are var and logvar those of one distribution?"""
        return not self._is_zero and self._is_as_made("logvar", "var")

    def _kl_of_parts(self, other: Any, axes: tuple[int, ...]) -> Tensor:
        """The formula of :meth:`kl` in mean, var and logvar, whatever they are."""
        mean, var, logvar = map(_wide, (self.mean, self.var, self.logvar))
        if other is None:
            return 0.5 * (mean.square() + var - 1.0 - logvar).sum(axes)
        theirs, their_var, their_logvar = map(_wide, (other.mean, other.var, other.logvar))
        squares = (mean - theirs).square() / their_var
        return 0.5 * (squares + var / their_var - 1.0 - logvar + their_logvar).sum(axes)

    def nll(self, sample: Tensor, dims: Sequence[int] | None = None) -> Tensor:
        """``½ Σ (ln 2π + logvar + (sample − mean)² / var)`` in nats: minus the log density.

        Plain torch operations. Args, result and errors as of :meth:`kl`; sample has mean's shape.
        """
        if self.deterministic:
            return self._zero()
        axes = self._axes(dims)
        _same_shape("sample", sample, self.mean)
        squares = (_wide(sample) - _wide(self.mean)).square()
        if self._is_one():
            logvar = _wide(self._made("logvar"))
            squares = squares * torch.exp(-logvar)
        else:
            logvar = _wide(self.logvar)
            squares = squares / _wide(self.var)
        return 0.5 * (math.log(2 * math.pi) + logvar + squares).sum(axes)

    def mode(self) -> Tensor:
        """The mean."""
        return self.mean

    def _zero(self) -> Tensor:
        return torch.zeros(1, device=self._parameters.device)

    def _axes(self, dims: Sequence[int] | int | None) -> tuple[int, ...]:
        """dims counted from the front; none at all is every axis, as in torch.sum."""
        rank = (self._moments if self._is_as_made("mean") else self.mean).dim()
        if dims is None:
            dims = self.default_dims if self.default_dims is not None else range(1, rank)
        axes = [dims] if isinstance(dims, int | np.integer) else list(dims)
        if not all(isinstance(a, int | np.integer) and -rank <= a < rank for a in axes):
            raise ValueError(
                f"dims must be axes of mean, which has shape {tuple(self.mean.shape)}; got {axes}"
            )
        counted = sorted({int(axis) % rank for axis in axes}) or list(range(rank))
        if len(counted) < len(axes):
            raise ValueError(f"dims must name each axis once; got {axes}")
        return tuple(counted)


def _is_of_one(other: Any) -> bool:
    """Are its logvar and var what they were at first? Nobody knows of another class."""
    return not isinstance(other, Attributes) or other._is_as_made("logvar", "var")


def _is_zero(other: Any) -> bool:
    """Had it no width from the first?"""
    if isinstance(other, Attributes):
        return other._is_zero
    return bool(getattr(other, "deterministic", False))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _same_shape(name: str, value: Tensor, mean: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if not _validate.alike(value.shape, mean.shape):
        raise ValueError(
            f"{name} must have the shape of mean, {tuple(mean.shape)}; got {tuple(value.shape)}"
        )


class _InDiffusers(DiagonalGaussianDistribution):
    """With the axes of diffusers: a patch changes no number beyond rounding."""

    default_dims = (1, 2, 3)
    #: diffusers' own class, while this one is in its place.
    stands_for: type | None = None


class DiffusersPatch:
    """What :func:`patch_diffusers` did. Leaving its ``with`` block or :meth:`undo` undoes it."""

    def __init__(self, found: type) -> None:
        self._original: type | None = None
        #: Names of the modules that held the class.
        self.modules: tuple[str, ...] = ()
        self._ours = _InDiffusers  # this vaekl's, even if it is imported again
        if found is not _InDiffusers:
            # Of a vaekl imported before this one, its class gives way too.
            self._original = getattr(found, "stands_for", None) or found
            self._ours.stands_for = self._original
            self.modules = _swap(found, self._ours)

    def undo(self) -> None:
        """Put diffusers' own class back, in modules imported since as well. Twice is harmless."""
        original, self._original = self._original, None
        if original is not None:
            _swap(self._ours, original)

    def __enter__(self) -> DiffusersPatch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.undo()


def patch_diffusers() -> DiffusersPatch:
    """Let an installed diffusers use vaekl's :class:`DiagonalGaussianDistribution`.

    ::

        vaekl.patch_diffusers()          # from now on
        with vaekl.patch_diffusers():    # or for a while
            posterior = autoencoder.encode(images).latent_dist

    Swaps the class in every module that has imported it, diffusers' or yours, and where it is
    defined, so that modules imported later get it too. Noise then comes from vaekl; all else is
    equal, up to rounding and float32 KLs of half precision: kl() and nll() keep diffusers' axes
    [1, 2, 3] there. Distributions made before keep their class. While a patch is in place, another
    one changes nothing, and undoes nothing.

    Raises:
        ModuleNotFoundError: diffusers is not installed.
    """
    try:
        home: Any = importlib.import_module("diffusers.models.autoencoders.vae")
    except ModuleNotFoundError as error:
        if error.name != "diffusers":
            raise
        raise ModuleNotFoundError(
            "patch_diffusers needs diffusers: pip install diffusers", name="diffusers"
        ) from error
    return DiffusersPatch(home.DiagonalGaussianDistribution)


def _swap(old: type, new: type) -> tuple[str, ...]:
    """Replace a class in every module but this one; the names of those that had it."""
    changed = []
    for module_name, module in list(sys.modules.items()):
        if module_name == __name__ or not isinstance(getattr(module, "__dict__", None), dict):
            continue
        names = [name for name, value in list(vars(module).items()) if value is old]
        for name in names:
            setattr(module, name, new)
        changed += [module_name] if names else []
    return tuple(changed)
