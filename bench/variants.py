"""The calls whose kernels codegen.py compiles, and how to make the launchers compile them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vaekl import _plans
from vaekl._spec import Needs, Operands, Outputs, Source, Spec
from vaekl.backends import layout as geometry
from vaekl.backends import triton, triton_launch, triton_log_prob

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
# By what the launcher makes of them: programs along rows and columns.
SHAPES = {
    "many": (4096, 512),
    "one": (64, 20),
    "rows": (65536, 64),
    "cols": (4, 65536),
    # Whose rows begin at 4 elements, not at 16, and a few rows that lie beside each other.
    "d20": (65536, 20),
    "d10": (65536, 10),
    "d33": (65536, 33),
    "d700": (4096, 700),
}


class Variant(NamedTuple):
    """A forward call, and the backward of a choice of its outputs."""

    dtype: str
    shape: str = "many"
    reduction: str | None = "batchmean"
    mean_over: str | None = "batch"
    sample: bool = True
    given: bool = False  # eps given
    clamp: bool = False
    scale: str = "logvar"
    prior: str | None = None  # "sample", "event"
    samples: str | None = None  # what rows draw: "ids", "keys"
    log_prob: str | None = None  # log densities in place of KLs: "total", "path"
    layout: str = "contiguous"  # "channels_last", "unaligned", "wide"
    upstream: tuple[bool, bool, bool] = (True, True, True)
    needs: tuple[bool, bool] = (True, True)

    @property
    def name(self) -> str:
        """Readable, and unique."""
        flags = [name for name in ("given", "clamp") if getattr(self, name)]
        flags += [f"scale={self.scale}"] if self.scale != "logvar" else []
        flags += [f"prior={self.prior}"] if self.prior else []
        flags += [f"samples={self.samples}"] if self.samples else []
        flags += [f"log_prob={self.log_prob}"] if self.log_prob else []
        flags += [self.layout] if self.layout != "contiguous" else []
        outputs = [f"kl={self.reduction}"] if self.reduction else []
        outputs += [f"of_mean={self.mean_over}"] if self.mean_over else []
        outputs += ["z"] if self.sample else []
        used = "".join("01"[u] for u in (*self.upstream, *self.needs))
        flags += [f"used={used}"] if used != "11111" else []
        return " ".join([self.dtype, self.shape, *outputs, *flags])


def log_prob_variant(
    dtype: str, shape: str = "many", log_prob: str = "total", **options: Any
) -> Variant:
    """A sample with its log densities."""
    return Variant(dtype, shape, None, None, log_prob=log_prob, **options)


class StatisticsVariant(NamedTuple):
    """The column statistics of diagnose; all in float64."""

    dtype: str
    shape: str = "many"
    layout: str = "contiguous"

    @property
    def name(self) -> str:
        """Readable, and unique."""
        flags = [self.layout] if self.layout != "contiguous" else []
        return " ".join([self.dtype, self.shape, "statistics", *flags])


AnyVariant = Variant | StatisticsVariant


def subset() -> list[AnyVariant]:
    """Some that between them reach every branch of the kernels."""
    return [
        Variant("fp32"),
        Variant("bf16"),
        Variant("fp32", mean_over=None),
        Variant("bf16", mean_over=None),
        Variant("fp32", "one"),
        Variant("fp32", "d20"),
        Variant("bf16", "d10"),
        Variant("fp64", "d33"),
        Variant("bf16", "d700"),
        Variant("fp32", "rows", reduction="none", mean_over="all"),
        Variant("fp32", "cols", reduction="none", clamp=True),
        Variant("fp32", scale="std"),
        Variant("bf16", scale="var", clamp=True),
        Variant("fp32", mean_over=None, prior="sample"),
        Variant("fp32", prior="event"),
        Variant("bf16", reduction="per_dim"),
        Variant("fp32", "d20", reduction="per_dim", mean_over=None, prior="event"),
        Variant("fp32", "d20", scale="std", prior="event"),
        Variant("fp32", mean_over=None, samples="ids"),
        Variant("bf16", "d20", "none", None, samples="keys"),
        log_prob_variant("fp32"),
        log_prob_variant("bf16", "cols", prior="sample", given=True),
        log_prob_variant("fp32", "d20", log_prob="path", prior="event"),
        Variant("fp64"),
        Variant("fp32", given=True),
        Variant("fp16", sample=False, reduction="none", mean_over=None),
        Variant("fp32", layout="channels_last"),
        Variant("bf16", layout="unaligned"),
        Variant("fp32", layout="wide"),
        StatisticsVariant("fp32"),
        StatisticsVariant("bf16", "one"),
        StatisticsVariant("fp64", layout="channels_last"),
        StatisticsVariant("fp32", layout="wide"),
    ]


def matrix() -> list[AnyVariant]:
    """dtypes x shapes x outputs, and each remaining flag on the main dtypes."""
    chosen = dict.fromkeys(subset())
    outputs = list(itertools.product((None, "none", "batchmean"), (None, "batch", "all")))
    for dtype, shape, (reduction, mean_over) in itertools.product(DTYPES, ("many", "one"), outputs):
        if dtype == "fp16" and shape == "one":
            continue  # differs from bf16 in conversions alone
        chosen[Variant(dtype, shape, reduction, mean_over)] = None
    for dtype in ("fp32", "bf16"):
        for shape in ("d10", "d20", "d33", "d700"):
            chosen[Variant(dtype, shape)] = None
        for shape, mean_over in (
            ("many", None),
            ("d10", "batch"),
            ("one", "batch"),
            ("cols", "all"),
        ):
            chosen[Variant(dtype, shape, "per_dim", mean_over)] = None
        for shape in ("rows", "cols"):
            for reduction, mean_over in (("none", "batch"), ("batchmean", "all")):
                chosen[Variant(dtype, shape, reduction, mean_over)] = None
        for reduction, mean_over in (("none", None), ("batchmean", None), (None, "batch")):
            chosen[Variant(dtype, "many", reduction, mean_over, sample=False)] = None
        for flag in ({"given": True}, {"clamp": True}, {"given": True, "clamp": True}):
            chosen[Variant(dtype, **flag)] = None
        for scale, clamp in itertools.product(("log_std", "std", "var"), (False, True)):
            chosen[Variant(dtype, scale=scale, clamp=clamp)] = None
        for prior, scale in itertools.product(("sample", "event"), ("logvar", "std", "var")):
            mean_over = "batch" if prior == "event" else None
            chosen[Variant(dtype, mean_over=mean_over, scale=scale, prior=prior)] = None
        for shape, log_prob in itertools.product(("many", "one", "cols"), ("total", "path")):
            chosen[log_prob_variant(dtype, shape, log_prob)] = None
        for scale, prior in itertools.product(("logvar", "std", "var"), ("sample", "event")):
            chosen[log_prob_variant(dtype, scale=scale, prior=prior, clamp=True)] = None
        for layout in ("channels_last", "unaligned", "wide"):
            chosen[log_prob_variant(dtype, layout=layout)] = None
        chosen[Variant(dtype, "one", prior="event")] = None
        for shape, samples in (("one", "ids"), ("many", "keys"), ("cols", "ids")):
            chosen[Variant(dtype, shape, samples=samples)] = None
        chosen[Variant(dtype, "rows", "none", "all", prior="event")] = None
        chosen[Variant(dtype, prior="event", clamp=True, layout="channels_last")] = None
        for layout in ("channels_last", "unaligned", "wide"):
            chosen[Variant(dtype, layout=layout)] = None
        for used in itertools.product((True, False), repeat=3):
            if any(used):
                chosen[Variant(dtype, upstream=used)] = None
        for needs in ((True, False), (False, True)):
            chosen[Variant(dtype, needs=needs)] = None
    for dtype, shape in itertools.product(DTYPES, SHAPES):
        chosen[StatisticsVariant(dtype, shape)] = None
    return list(chosen)


def _inputs(variant: AnyVariant) -> list[Tensor]:
    """mu, logvar, eps, dz."""
    shape, dtype = SHAPES[variant.shape], DTYPES[variant.dtype]
    if variant.layout == "channels_last":
        shape = (64, 32, 16, 32)
    tensors = [torch.zeros(shape, dtype=dtype) for _ in range(4)]
    if variant.layout == "channels_last":
        tensors = [t.to(memory_format=torch.channels_last) for t in tensors]
    if variant.layout == "unaligned":
        tensors = [torch.zeros(t.numel() + 1, dtype=dtype)[1:].view(shape) for t in tensors]
    return tensors


def launch(variant: AnyVariant) -> Iterator[tuple[str, Any, geometry.Grid]]:
    """(kernel name, compiled kernel, grid) of the launches that this call takes."""
    kernels = {
        "forward": triton.forward_kernel,
        "backward": triton.backward_kernel,
        "statistics": triton.statistics_kernel,
        "log_prob": triton_log_prob.log_prob_forward_kernel,
        "log_prob_backward": triton_log_prob.log_prob_backward_kernel,
    }
    for kernel in kernels.values():
        kernel.device_caches.clear()
    triton_launch.warp_size.cache_clear()
    _plans.forget()
    narrow = geometry.NARROW_OFFSETS
    geometry.NARROW_OFFSETS = 0 if variant.layout == "wide" else narrow
    geometry.view.cache_clear()
    mu, logvar, eps, dz = _inputs(variant)
    config = triton.usual_config(mu.dtype)
    try:
        if isinstance(variant, Variant):
            _call(variant, mu, logvar, eps, dz)
        else:
            triton.statistics(mu, logvar, 1)
            config = triton.statistics_config()
    finally:
        geometry.NARROW_OFFSETS = narrow
        geometry.view.cache_clear()
    grid = geometry.grid(mu.shape[0], mu[0].numel(), config)
    for name, kernel in kernels.items():
        for compiled in kernel.device_caches[0][0].values() if kernel.device_caches else ():
            yield name, compiled, grid


def _call(variant: Variant, mu: Tensor, logvar: Tensor, eps: Tensor, dz: Tensor) -> None:
    form = variant.scale, (-30.0, 20.0) if variant.clamp else None
    terms = variant.sample, variant.reduction, variant.mean_over
    spec = Spec(
        *terms, 1, *form, "triton", variant.given, prior=variant.prior, samples=variant.samples,
        log_prob=variant.log_prob,
    )  # fmt: skip
    x = Operands(mu, logvar, eps if variant.given else None)
    if variant.prior is not None:
        of_prior = mu[0] if variant.prior == "event" else mu
        x = x._replace(prior_mean=of_prior, prior_scale=of_prior)
    source = Source(seed=1)
    if variant.samples is not None:
        ids = torch.arange(mu.shape[0])
        samples = ids if variant.samples == "ids" else torch.stack([ids, ids], 1)
        source = Source(None, 1, samples, variant.samples)
    (z, kl, kl_of_mean), saved = _plans.forward(spec, x, source)
    upstream = Outputs(*(
        gradient if used and output is not None else None
        for output, gradient, used in zip((z, kl, kl_of_mean), (dz, kl, kl_of_mean),
                                          variant.upstream)
    ))  # fmt: skip
    needs = Needs(*variant.needs, variant.given, *[variant.prior is not None] * 2)
    if any(gradient is not None for gradient in upstream):
        _plans.backward(spec, x, saved, upstream, needs)
