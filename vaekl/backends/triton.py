"""The Triton backend: tensors to kernel arguments, one launch each way.

A plan is all that sizes, strides, dtypes and options decide; it allocates, and launches the kernel
that its first call compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import triton
from torch import Tensor

from vaekl._spec import (
    LOGVAR_RANGE,
    Gradients,
    Into,
    Needs,
    Operands,
    Outputs,
    Saved,
    Source,
    Spec,
    compute_dtype,
    kl_shape,
    sample_dtype,
)
from vaekl.kernels import statistics as columns
from vaekl.kernels.backward import backward_kernel
from vaekl.kernels.finish import column_count, counter_count, row_parts, scratch_parts
from vaekl.kernels.forms import FORMS
from vaekl.kernels.forward import forward_kernel
from vaekl.kernels.reduction import partial_sums
from vaekl.kernels.statistics import SUMS, statistics_kernel

from . import layout
from . import triton_arguments as arguments
from . import triton_log_prob as log_prob
from .memory import allocator
from .protocol import Backward, Forward, interpreting, told
from .strided import (
    Arrangement,
    GradientMemory,
    arrange_backward,
    arrange_forward,
    arrange_inputs,
    arranged,
    backward_of_copies,
    beside,
    dense,
    end_to_end,
    forward_of_copies,
    in_memory_order,
)
from .triton_launch import Launch, grid_of, is_elsewhere, new_key, usual_config
from .workspace import workspaces


def why_not(device: str) -> str | None:
    """Load Triton's driver, for which it compiles C; what is wrong with it."""
    if device != "cuda" or interpreting():
        return None
    try:
        triton.runtime.driver.active.get_current_target()
    except Exception as error:
        return f"needs triton with a driver and a C compiler, and its start raises {told(error)}"
    return None


# Which tensors of a kernel may lie anywhere. For p_dkl and p_dkl_of_mean it compiles nothing else.
_FORWARD_ANYWHERE = (0, 1, 2, 3, 4, 11)  # mu, scale, eps, prior, samples
_BACKWARD_ANYWHERE = (0, 1, 2, 3, 4, 5, 8, 9, 10)  # those, dz, and what was saved
_INTO = (11, 12)  # dmu, dscale


def _in_full_rows(arrangement: Arrangement, has_columns: bool, is_drawn: bool) -> Arrangement:
    """As one sample, or as several in a row, where nothing is asked of rows.

    Columns have to stay apart, and groups of 4 of them for noise.
    """
    config = layout.current_config()
    if not has_columns and not (is_drawn and arrangement.view.event % 4):
        found = end_to_end(arrangement, config)
        if found is not arrangement:
            return found
    return beside(arrangement, config, is_drawn)


def _event_columns(view: layout.View, grid: layout.Grid, has_columns: bool) -> int:
    """EVENT_COLS; what is not added up by column asks only whether there are any."""
    if view.beside == 1:
        return 0
    return triton.next_power_of_2(-(-grid.block_cols // view.beside)) if has_columns else 1


def _column_sums(spec: Spec) -> int:
    """How many sums of each column forward takes."""
    return int(column_count(spec.mean_over, spec.reduction == "per_dim"))


class _ForwardPlan:
    """Forward of tensors like these."""

    def __init__(self, spec: Spec, arrangement: Arrangement, x: Operands) -> None:
        self.dtype, form = compute_dtype(*x), FORMS[spec.form]
        view = arrangement.view
        per_row = spec.reduction == "none"
        has_sums = spec.mean_over is not None or spec.reduction not in (None, "none")
        sums = layout.Sums(of_columns=has_sums, of_rows=per_row)
        grid = grid_of(view, usual_config(self.dtype), x.mu.device, sums)
        column_sums = view.width * _column_sums(spec)
        row_sums = view.batch if per_row else 0
        self.scratch = scratch_parts(grid.walkers, grid.ranges, column_sums, row_sums)
        self.counter_count = counter_count(grid.walkers, grid.ranges)
        z_dtype = sample_dtype(*x[:3])
        unit = arguments.unit(view, [*arguments.dtypes(*x), z_dtype], spec.sample and x.eps is None)
        fixed = [
            *arguments.of_sizes(view, unit, grid, spec, x.mu),
            grid.tiles,
            *self.scratch[:-1],
            *arguments.of_strides(arrangement, unit, without=2 if spec.prior is None else 0),
            per_row,
            spec.reduction == "per_dim",
            spec.mean_over or "none",
            grid.ranges > 1,
            grid.walkers > 1,
            grid.tiles > grid.walkers,
            row_parts(grid.walkers) if per_row else 1,
            form.idle,
            *((None, None) if spec.prior is None else (form.logvar, form.root)),
            form.terms,
            spec.clamp is not None,
            spec.prior == "event",
            spec.samples == "keys",
            _event_columns(view, grid, column_sums > 0),
            *arguments.of_flags(view, unit, self.dtype),
        ]
        self.launch = Launch(forward_kernel, grid, grid.walkers, fixed)
        self.new_z: Callable[[Tensor], Tensor] | None = None
        if spec.sample:
            self.new_z = allocator(x.mu, z_dtype)
        self.kl = self.means = None
        if spec.reduction is not None:
            self.kl = dense(kl_shape(spec, x.mu.shape))
        if spec.mean_over is not None:
            self.means = dense((2, view.event) if spec.mean_over == "batch" else (2,))

    def __call__(self, x: Operands, source: Source) -> tuple[Outputs, Saved]:
        mu, scale, eps, prior_mean, prior_scale = x
        if is_elsewhere(mu):
            with torch.cuda.device(mu.device):
                return self(x, source)
        device, dtype = mu.device, self.dtype
        z = kl = kl_of_mean = key = means = on_device = scratch = counters = None
        seed = offset = 0
        if self.new_z is not None:
            z = self.new_z(mu)
            if eps is None:
                seed, offset, on_device, key = new_key(device, source)
        if self.kl is not None:
            kl = torch.empty_strided(*self.kl, dtype=dtype, device=device)
        if self.means is not None:
            kl_of_mean = torch.empty_strided((), (), dtype=dtype, device=device)
            means = torch.empty_strided(*self.means, dtype=dtype, device=device)
        size = self.scratch.size
        if size:
            scratch, counters = workspaces.get(device, dtype, size, self.counter_count)
        device_key = key if on_device is None else on_device
        tensors = (
            mu, scale, eps, prior_mean, prior_scale, z, kl, kl_of_mean, means, key, device_key,
            source.samples, scratch, counters,
        )  # fmt: skip
        self.launch(tensors, _FORWARD_ANYWHERE, seed, offset, int(on_device is not None))
        return Outputs(z, kl, kl_of_mean), Saved(key, means)


def forward(spec: Spec, x: Operands) -> Forward:
    """A plan for tensors like these."""
    arrangement = arrange_forward(spec, x)
    if arrangement is None:
        return forward_of_copies(spec, forward)
    arrangement = in_memory_order(arrangement)
    if spec.log_prob is not None:
        return log_prob.forward(spec, arrangement, x)
    if spec.reduction != "none" and spec.samples is None:
        is_drawn = spec.sample and x.eps is None
        arrangement = _in_full_rows(arrangement, _column_sums(spec) > 0, is_drawn)
    return _ForwardPlan(spec, arrangement, x)


def backward(
    spec: Spec, x: Operands, upstream: Outputs, needs: Needs, into: Into | None
) -> Backward:
    """A plan for tensors like these."""
    arrangement = arrange_backward(spec, x, upstream, needs, into)
    if arrangement is None:
        return backward_of_copies(spec, needs, backward)
    arrangement = in_memory_order(arrangement)
    if spec.log_prob is not None:
        return log_prob.backward(spec, arrangement, x, upstream, needs)
    is_drawn = x.eps is None and upstream.z is not None and needs.scale
    has_rows = spec.reduction == "none" and upstream.kl is not None
    has_sums = spec.prior == "event" and (needs.prior_mean or needs.prior_scale)
    if not has_rows and spec.samples is None:
        has_columns = spec.mean_over == "batch" and upstream.kl_of_mean is not None
        of_columns = spec.reduction == "per_dim" and upstream.kl is not None
        has_columns = has_columns or has_sums or of_columns
        arrangement = _in_full_rows(arrangement, has_columns, is_drawn)
    view = arrangement.view
    dtype, form = compute_dtype(*x), FORMS[spec.form]
    sums = layout.SUMS_OF_COLUMNS if has_sums else layout.NO_SUMS
    grid = grid_of(view, usual_config(dtype), x.mu.device, sums)
    is_split = has_sums and grid.ranges > 1
    scratch_of = scratch_parts(grid.tiles, grid.ranges, 2 * view.width, 0)
    counters_of = grid.tiles * scratch_of.lines
    unit = arguments.unit(view, arguments.dtypes(*x, upstream.z), is_drawn)
    fixed = [
        *arguments.of_sizes(view, unit, grid, spec, x.mu),
        arrangement.dkl_row,
        *(scratch_of[:2] if is_split else (None, None)),
        *arguments.of_strides(arrangement, unit, without=4 if spec.prior is None else 0),
        spec.reduction == "none",
        spec.reduction == "per_dim",
        spec.mean_over or "none",
        *form,
        spec.clamp is not None,
        spec.prior == "event",
        spec.samples == "keys",
        is_split,
        _event_columns(view, grid, has_sums),
        *arguments.of_flags(view, unit, dtype),
    ]
    launch = Launch(backward_kernel, grid, grid.tiles, fixed)
    anywhere = _BACKWARD_ANYWHERE + (() if into is None else _INTO)
    new_gradients = GradientMemory(spec, x, needs, arrangement.like_mu)

    def run(x: Operands, saved: Saved, upstream: Outputs, into: Into | None) -> Gradients:
        if is_elsewhere(x.mu):
            with torch.cuda.device(x.mu.device):
                return run(x, saved, upstream, into)
        gradients = new_gradients(x, into)
        scratch = counters = None
        if is_split:
            scratch, counters = workspaces.get(x.mu.device, dtype, scratch_of.size, counters_of)
        key, means, _, samples = saved
        tensors = (*x, *upstream, key, means, samples, *gradients, scratch, counters)
        launch(tensors, anywhere)
        return gradients

    return run


def statistics_config() -> layout.Config:
    """Half a block, of few columns: eight sums in float64 fill the registers sooner, and a group's
    partial sums of 128 columns would fill them all (126 of 128 threads).
    """
    usual = usual_config(torch.float64)
    tile = usual.tile // 2
    return replace(usual, tile=tile, widest=tile, max_cols=min(usual.max_cols, 64), resident=4)


def statistics(mu: Tensor, logvar: Tensor, batch_dims: int) -> Tensor:
    """The rows of ``diagnostics.statistics.ROWS``, float64 [9, D] on mu's device."""
    if is_elsewhere(mu):
        with torch.cuda.device(mu.device):
            return statistics(mu, logvar, batch_dims)
    arrangement = arrange_inputs(mu, logvar, batch_dims)
    if arrangement is None:
        (mu, logvar, *_), _ = arranged(Operands(mu, logvar), None, batch_dims)
        return statistics(mu, logvar, batch_dims)
    view = arrangement.view
    unit = arguments.unit(view, arguments.dtypes(mu, logvar), False)
    grid = grid_of(view, statistics_config(), mu.device, layout.SUMS_OF_COLUMNS)
    fixed = [
        *LOGVAR_RANGE,
        view.batch,
        view.event // unit,
        view.inner // unit,
        grid.rows_per_range,
        partial_sums(grid.ranges),
        *arguments.of_strides(arrangement, unit),
        grid.ranges > 1,
        view.split,
        unit,
        view.wide,
    ]
    out = torch.empty(int(SUMS.value) + 1, view.event, dtype=torch.float64, device=mu.device)
    scratch = counters = None
    size = columns.scratch_size(grid.ranges, view.event)
    if size:
        count = columns.counter_count(grid.tiles, grid.ranges)
        scratch, counters = workspaces.get(mu.device, torch.float64, size, count)
    Launch(statistics_kernel, grid, grid.tiles, fixed)((mu, logvar, out, scratch, counters), (0, 1))
    return out
