"""The Triton backend: tensors to kernel arguments, one launch each way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from vaekl.kernels.backward import backward_kernel
from vaekl.kernels.forward import forward_kernel

from . import _layout
from ._eager import Backward, Forward
from ._noise import draw_key
from ._options import Options, compute_dtype, kl_denominator, sample_dtype

_TRITON_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}
_NO_STRIDES = (0, 0, 0)
# FMA contraction is part of the error budget; Triton's default for it changes in 3.10.
_LAUNCH_OPTIONS = {"enable_fp_fusion": True}


class _Counters:
    """Arrival counters, zero between launches: one buffer per (device, stream).

    A captured graph keeps a slot of its own for life, since it may replay on any stream.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.device, int], Tensor] = {}
        self._captured: list[Tensor] = []

    def get(self, device: torch.device, count: int) -> Tensor:
        stream = 0
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                self._captured.append(torch.zeros(count, dtype=torch.int32, device=device))
                return self._captured[-1]
            stream = torch.cuda.current_stream(device).cuda_stream
        buffer = self._buffers.get((device, stream))
        if buffer is None or buffer.numel() < count:
            buffer = torch.zeros(max(count, 1024), dtype=torch.int32, device=device)
            self._buffers[device, stream] = buffer
        return buffer

    def forget(self) -> None:
        """After a launch that failed half way the counts are not to be trusted."""
        self._buffers.clear()


_counters = _Counters()


def _launch(kernel: Any, device: torch.device, grid: _layout.Grid, args: dict[str, Any]) -> None:
    blocks = {"BLOCK_ROWS": grid.block_rows, "BLOCK_COLS": grid.block_cols}
    config = _layout.current_config()
    try:
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                kernel[(grid.tiles, grid.ranges)](
                    **args, **blocks, num_warps=config.num_warps, **_LAUNCH_OPTIONS
                )
        else:
            kernel[(grid.tiles, grid.ranges)](
                **args, **blocks, num_warps=config.num_warps, **_LAUNCH_OPTIONS
            )
    except BaseException:
        _counters.forget()
        raise


def _strides(tensors: Sequence[Tensor | None]) -> tuple[tuple[int, ...], ...]:
    return tuple(t.stride() for t in tensors if t is not None)


def _arranged(
    first: Tensor, others: list[Tensor | None], batch_dims: int
) -> tuple[Tensor, list[Tensor | None]]:
    """The tensors, each copied only if three strides cannot describe it beside those before it."""
    shape = tuple(first.shape)
    model = torch.empty_like(first)
    if _layout.view(shape, batch_dims, _strides([first, model])) is None:
        model = first = first.contiguous()
    kept: list[Tensor | None] = [first]
    for tensor in others:
        if tensor is not None:
            if _layout.view(shape, batch_dims, _strides([model, *kept, tensor])) is None:
                tensor = torch.empty_like(model, dtype=tensor.dtype).copy_(tensor)
        kept.append(tensor)
    return first, kept[1:]


def _stride_args(
    names: tuple[str, ...], tensors: Sequence[Tensor | None], view: _layout.View
) -> dict[str, int]:
    strides = iter(view.strides)
    args = {}
    for name, tensor in zip(names, tensors):
        row, outer, inner = _NO_STRIDES if tensor is None else next(strides)
        args.update({f"{name}_row": row, f"{name}_outer": outer, f"{name}_inner": inner})
    return args


def _common_args(
    view: _layout.View, grid: _layout.Grid, dtype: torch.dtype, options: Options
) -> dict[str, Any]:
    """What both kernels take, in the words of ``kernels/forward.py``."""
    lo, hi = options.clamp or (0.0, 0.0)
    return {
        "lo": lo,
        "hi": hi,
        "B": view.batch,
        "D": view.event,
        "inner": view.inner,
        "rows_per_range": grid.rows_per_range,
        "kl_denominator": kl_denominator(options.reduction, view.batch, view.event),
        "PER_ROW": options.reduction == "none",
        "MEAN_OVER": options.mean_over or "none",
        "CLAMP": options.clamp is not None,
        "SPLIT_EVENT": view.split,
        "WIDE": view.wide,
        "DTYPE": _TRITON_DTYPES[dtype],
    }


def _scratch_size(view: _layout.View, grid: _layout.Grid, options: Options) -> int:
    """Elements of scratch, as ``kernels/forward.py`` lays it out."""
    size = 3 * grid.tiles * (grid.ranges + 1)
    if options.mean_over == "batch":
        size += 2 * grid.ranges * view.event
    if options.reduction == "none":
        size += grid.tiles * view.batch
    return size


def forward(
    mu: Tensor,
    logvar: Tensor,
    eps: Tensor | None,
    generator: torch.Generator | None,
    seed: int | None,
    options: Options,
) -> Forward:
    """(z, kl, kl_of_mean, state, means); state is the noise key, int64[2]. None: not wanted."""
    dtype = compute_dtype(mu, logvar, eps)
    z_dtype = sample_dtype(mu, logvar, eps)
    shape, device, batch_dims = tuple(mu.shape), mu.device, options.batch_dims
    z = torch.empty_like(mu, dtype=z_dtype) if options.sample else None
    view = _layout.view(shape, batch_dims, _strides([mu, logvar, eps, z]))
    if view is None:
        mu, (logvar_, eps) = _arranged(mu, [logvar, eps], batch_dims)
        logvar = logvar if logvar_ is None else logvar_
        z = torch.empty_like(mu, dtype=z_dtype) if options.sample else None
        view = _layout.view(shape, batch_dims, _strides([mu, logvar, eps, z]))
        if view is None:
            raise RuntimeError(f"no common layout for shape {shape} after copying")
    grid = _layout.grid(view.batch, view.event, _layout.current_config())

    kl = kl_of_mean = state = means = key = scratch = counters = None
    if options.reduction is not None:
        kl_shape = mu.shape[: options.batch_dims] if options.reduction == "none" else ()
        kl = torch.empty(kl_shape, dtype=dtype, device=device)
    if options.mean_over is not None:
        kl_of_mean = torch.empty((), dtype=dtype, device=device)
        means_shape = (2, view.event) if options.mean_over == "batch" else (2,)
        means = torch.empty(means_shape, dtype=dtype, device=device)
    seed_word = offset = 0
    if options.sample and eps is None:
        state = torch.empty(2, dtype=torch.int64, device=mu.device)
        seed_word, offset, key = draw_key(mu.device, generator, seed)
    if grid.tiles > 1 or grid.ranges > 1:
        scratch = torch.empty(_scratch_size(view, grid, options), dtype=dtype, device=device)
        counters = _counters.get(mu.device, 1 + grid.tiles + grid.ranges)

    args = {
        "p_mu": mu,
        "p_logvar": logvar,
        "p_eps": eps,
        "p_z": z,
        "p_kl": kl,
        "p_kl_of_mean": kl_of_mean,
        "p_means": means,
        "p_state": state,
        "p_key": key if key is not None else state,
        "p_scratch": scratch,
        "p_counters": counters,
        "seed": seed_word,
        "offset": offset,
        "key_on_device": int(key is not None),
        "SPLIT_ROWS": grid.ranges > 1,
        "SPLIT_COLS": grid.tiles > 1,
        **_common_args(view, grid, dtype, options),
        **_stride_args(("mu", "logvar", "eps", "z"), (mu, logvar, eps, z), view),
    }
    _launch(forward_kernel, device, grid, args)
    return z, kl, kl_of_mean, state, means


def backward(
    mu: Tensor,
    logvar: Tensor,
    eps: Tensor | None,
    dz: Tensor | None,
    dkl: Tensor | None,
    dkl_of_mean: Tensor | None,
    state: Tensor | None,
    means: Tensor | None,
    options: Options,
    needs: tuple[bool, bool, bool],
) -> Backward:
    """(dmu, dlogvar, deps), None where not needed."""
    shape, batch_dims = tuple(mu.shape), options.batch_dims
    dtypes = (mu.dtype, logvar.dtype, mu.dtype if eps is None else eps.dtype)
    needs = (needs[0], needs[1], needs[2] and dz is not None)

    def gradients(*layouts: Tensor | None) -> list[Tensor | None]:
        return [
            torch.empty_like(layout, dtype=dtype) if need and layout is not None else None
            for need, layout, dtype in zip(needs, layouts, dtypes)
        ]

    dtype = compute_dtype(mu, logvar, eps)
    outputs = gradients(mu, logvar, eps)
    view = _layout.view(shape, batch_dims, _strides([mu, logvar, eps, dz, *outputs]))
    if view is None:
        mu, (logvar_, eps, dz) = _arranged(mu, [logvar, eps, dz], batch_dims)
        logvar = logvar if logvar_ is None else logvar_
        outputs = gradients(mu, mu, mu)
        view = _layout.view(shape, batch_dims, _strides([mu, logvar, eps, dz, *outputs]))
        if view is None:
            raise RuntimeError(f"no common layout for shape {shape} after copying")
    dkl_row = 0
    if dkl is not None and options.reduction == "none":
        rows = _layout.view(tuple(dkl.shape), batch_dims, (dkl.stride(),))
        if rows is None:
            dkl = dkl.contiguous()
        dkl_row = 1 if rows is None else rows.strides[0][0]
    grid = _layout.grid(view.batch, view.event, _layout.current_config())
    args = {
        "p_mu": mu,
        "p_logvar": logvar,
        "p_eps": eps,
        "p_dz": dz,
        "p_dkl": dkl,
        "p_dkl_of_mean": dkl_of_mean,
        "p_state": state,
        "p_means": means,
        "p_dmu": outputs[0],
        "p_dlogvar": outputs[1],
        "p_deps": outputs[2],
        "dkl_row": dkl_row,
        **_common_args(view, grid, dtype, options),
        **_stride_args(
            ("mu", "logvar", "eps", "dz", "dmu", "dlogvar", "deps"),
            (mu, logvar, eps, dz, *outputs),
            view,
        ),
    }
    _launch(backward_kernel, mu.device, grid, args)
    return outputs[0], outputs[1], outputs[2]
