"""Launches of ``vaekl.kernels.log_prob`` and its backward."""

from __future__ import annotations

import torch

from vaekl._spec import (
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
from vaekl.kernels.finish import row_parts, scratch_parts
from vaekl.kernels.forms import FORMS
from vaekl.kernels.log_prob import log_prob_forward_kernel
from vaekl.kernels.log_prob_backward import log_prob_backward_kernel

from . import layout
from . import triton_arguments as arguments
from .memory import allocator
from .protocol import Backward, Forward
from .strided import Arrangement, GradientMemory, dense
from .triton_launch import Launch, grid_of, is_elsewhere, new_key, usual_config
from .workspace import workspaces

# Which tensors of a kernel may lie anywhere, as of the other kernels.
_FORWARD_ANYWHERE = (0, 1, 2, 3, 4, 10)  # mu, scale, eps, prior, samples
_BACKWARD_ANYWHERE = (0, 1, 2, 3, 4, 5, 8, 9)  # those, dz, and what was saved


def forward(spec: Spec, arrangement: Arrangement, x: Operands) -> Forward:
    """A plan for tensors like these."""
    dtype, form, view = compute_dtype(*x), FORMS[spec.form], arrangement.view
    sums = layout.Sums(of_columns=False, of_rows=True)
    grid = grid_of(view, usual_config(dtype), x.mu.device, sums)
    z_dtype = sample_dtype(*x[:3])
    unit = arguments.unit(view, [*arguments.dtypes(*x), z_dtype], x.eps is None)
    fixed = [
        *arguments.of_view(view, unit, spec),
        grid.rows_per_range,
        view.period,
        *arguments.of_strides(arrangement, unit, without=2 if spec.prior is None else 0),
        grid.tiles > 1,
        row_parts(grid.tiles),
        *form[:4],
        spec.clamp is not None,
        spec.prior == "event",
        spec.samples == "keys",
        view.period > 0,
        *arguments.of_flags(view, unit, dtype),
    ]
    launch = Launch(log_prob_forward_kernel, grid, grid.tiles, fixed)
    new_z, densities = allocator(x.mu, z_dtype), dense(kl_shape(spec, x.mu.shape))
    size = 2 * view.batch * grid.tiles if grid.tiles > 1 else 0

    def run(x: Operands, source: Source) -> tuple[Outputs, Saved]:
        device = x.mu.device
        if is_elsewhere(x.mu):
            with torch.cuda.device(device):
                return run(x, source)
        z, key, scratch, counters = new_z(x.mu), None, None, None
        seed, offset, on_device = 0, 0, None
        if x.eps is None:
            seed, offset, on_device, key = new_key(device, source)
        log_q, log_p = (
            torch.empty_strided(*densities, dtype=dtype, device=device) for _ in range(2)
        )
        if size:
            scratch, counters = workspaces.get(device, dtype, size, grid.ranges)
        device_key = key if on_device is None else on_device
        tensors = (*x, z, log_q, log_p, key, device_key, source.samples, scratch, counters)
        launch(tensors, _FORWARD_ANYWHERE, seed, offset, int(on_device is not None))
        return Outputs(z, log_q, log_p), Saved(key)

    return run


def backward(
    spec: Spec, arrangement: Arrangement, x: Operands, upstream: Outputs, needs: Needs
) -> Backward:
    """A plan for tensors like these."""
    dtype, view = compute_dtype(*x), arrangement.view
    has_sums = spec.prior == "event" and (needs.prior_mean or needs.prior_scale)
    sums = layout.SUMS_OF_COLUMNS if has_sums else layout.NO_SUMS
    grid = grid_of(view, usual_config(dtype), x.mu.device, sums)
    is_split = has_sums and grid.ranges > 1
    scratch_of = scratch_parts(grid.tiles, grid.ranges, 2 * view.width, 0)
    unit = arguments.unit(view, arguments.dtypes(*x, upstream.z), x.eps is None)
    fixed = [
        *arguments.of_view(view, unit, spec),
        grid.rows_per_range,
        view.period,
        arrangement.dkl_row,
        arrangement.dsecond_row,
        *(scratch_of[:2] if is_split else (None, None)),
        *arguments.of_strides(arrangement, unit, without=4 if spec.prior is None else 0),
        spec.log_prob == "path",
        *FORMS[spec.form],
        spec.clamp is not None,
        spec.prior == "event",
        spec.samples == "keys",
        view.period > 0,
        is_split,
        *arguments.of_flags(view, unit, dtype),
    ]
    launch = Launch(log_prob_backward_kernel, grid, grid.tiles, fixed)
    new_gradients = GradientMemory(spec, x, needs, arrangement.like_mu)

    def run(x: Operands, saved: Saved, upstream: Outputs, into: Into | None) -> Gradients:
        device = x.mu.device
        if is_elsewhere(x.mu):
            with torch.cuda.device(device):
                return run(x, saved, upstream, into)
        gradients = new_gradients(x, into)
        scratch = counters = None
        if is_split:
            counters_of = grid.tiles * scratch_of.lines
            scratch, counters = workspaces.get(device, dtype, scratch_of.size, counters_of)
        tensors = (*x, *upstream, saved.key, saved.samples, *gradients, scratch, counters)
        launch(tensors, _BACKWARD_ANYWHERE)
        return gradients

    return run
