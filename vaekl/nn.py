"""Modules over the public functions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, cast, overload

import torch
from torch import Tensor

from . import _validate, functional
from ._spec import (
    Clamp,
    ModuleOptions,
    Operands,
    Prior,
    ReparamKL,
    Terms,
    Values,
    sample_dtype,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._spec import OfMean
else:
    OfMean = TypeVar("OfMean")


class ReparameterizeKL(torch.nn.Module, Generic[OfMean]):
    """:func:`vaekl.reparameterize_kl` as a module; options as there.

    In ``eval()`` z is the mode, mu itself, and no noise is drawn, unless ``sample_in_eval=True``.

    It has no state, so a ``state_dict`` is loaded as ever. A module saved whole is loaded by
    ``torch.load`` where its class is named as one to trust:

    ```python
    torch.save(vaekl.nn.ReparameterizeKL(reduction="mean"), "loss.pt")
    with torch.serialization.safe_globals([vaekl.nn.ReparameterizeKL]):
        loss = torch.load("loss.pt", weights_only=True)
    ```

    Raises:
        TypeError, ValueError: An option of the wrong type or value.
    """

    @overload
    def __init__(
        self: ReparameterizeKL[Tensor],
        *,
        kl_of_mean: Literal[True] = ...,
        sample_in_eval: bool = ...,
        **options: Unpack[ModuleOptions],
    ) -> None: ...
    @overload
    def __init__(
        self: ReparameterizeKL[None],
        *,
        kl_of_mean: Literal[False],
        sample_in_eval: bool = ...,
        **options: Unpack[ModuleOptions],
    ) -> None: ...
    @overload
    def __init__(
        self: ReparameterizeKL[Tensor | None],
        *,
        kl_of_mean: bool,
        sample_in_eval: bool = ...,
        **options: Unpack[ModuleOptions],
    ) -> None: ...
    def __init__(
        self,
        *,
        reduction: str = "batchmean",
        kl_of_mean: bool = True,
        mean_over: str = "batch",
        batch_dims: int | None = None,
        scale: str = "logvar",
        clamp: Clamp = None,
        backend: str = "auto",
        sample_in_eval: bool = False,
    ) -> None:
        super().__init__()
        if batch_dims is not None:
            batch_dims = _validate.integer("batch_dims", batch_dims, 0, 64)
        _validate.clamp_bounds(clamp)
        self.reduction = _validate.choice("reduction", reduction, _validate.REDUCTIONS)
        self.kl_of_mean = _validate.flag("kl_of_mean", kl_of_mean)
        self.mean_over = _validate.choice("mean_over", mean_over, _validate.MEANS_OVER)
        self.batch_dims = batch_dims
        self.scale = _validate.choice("scale", scale, _validate.SCALES)
        # Of Python's numbers, whatever was given: torch.compile takes those for constants.
        self.clamp: Clamp = None
        if clamp is not None:
            lo, hi = (None if end is None else float(end) for end in clamp)
            self.clamp = lo, hi
        self.backend = _validate.backend_name(backend)
        self.sample_in_eval = _validate.flag("sample_in_eval", sample_in_eval)

    def forward(
        self,
        mu: Tensor,
        logvar: Values,
        *unnamed: None,
        prior: Prior = None,
        eps: Values | None = None,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        sample_ids: Tensor | None = None,
    ) -> ReparamKL[OfMean]:
        """(z, kl, kl_of_mean) of :func:`vaekl.reparameterize_kl`; TypeError, ValueError as there.

        ``unnamed``: nothing. (torch's ONNX exporter by tracing gives defaults without names.)
        """
        if any(value is not None for value in unnamed):
            raise TypeError(
                "forward() takes mu and logvar, and prior, eps, generator, seed, sample_ids by "
                f"name only; got {2 + len(unnamed)} arguments without a name"
            )
        sample = self.training or self.sample_in_eval
        given: Any = Operands(mu, logvar, eps)  # type: ignore[arg-type]
        z, kl, of_mean = functional.compute(
            given,
            functional.source_of(generator, seed, sample_ids),
            Terms(sample, self.reduction, self.mean_over if self.kl_of_mean else None),
            self.batch_dims,
            self.scale,
            self.clamp,
            self.backend,
            prior,
        )
        if z is None:
            z = mu.to(sample_dtype(mu, logvar))
        return ReparamKL(z, cast(Tensor, kl), cast("OfMean", of_mean))

    if TYPE_CHECKING:  # torch.nn.Module's gives Any

        def __call__(
            self,
            mu: Tensor,
            logvar: Values,
            *,
            prior: Prior = ...,
            eps: Values | None = ...,
            generator: torch.Generator | None = ...,
            seed: int | None = ...,
            sample_ids: Tensor | None = ...,
        ) -> ReparamKL[OfMean]: ...

    def extra_repr(self) -> str:
        """The options, for print(module)."""
        names = ("reduction", "kl_of_mean", "mean_over", "batch_dims", "scale", "clamp", "backend")
        shown = [f"{name}={getattr(self, name)!r}" for name in (*names, "sample_in_eval")]
        return ", ".join(shown)
