"""The self-test behind ``vaekl check``: every backend against the oracle, on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from . import _environment, _validate, backends
from .diagnostics import diagnose
from .functional import reparameterize_kl
from .reference import SEED_OFFSET, Oracle, diagnostics, normal, to_numpy
from .testing import (
    EPS_BUDGET,
    KL_BUDGET,
    gradient_bounds,
    kl_of_mean_bound,
    make_inputs,
    step,
    unit,
    worst,
)

SEED = 20130812
SPEED_SHAPE = (4096, 512)
#: Largest relative error of what diagnose gives; it computes in float64.
DIAGNOSE_BUDGET = 1e-12

Progress = Callable[[str], None]


class Case(NamedTuple):
    """A call to check."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    reduction: str = "batchmean"
    mean_over: str = "batch"
    layout: str = "contiguous"
    scale: float = 1.0
    has_prior: bool = False  # one for all samples
    has_ids: bool = False  # of the samples, in another order

    def __str__(self) -> str:
        options = [str(list(self.shape)), str(self.dtype).removeprefix("torch.")]
        options += [self.reduction, f"over {self.mean_over}"]
        options += [self.layout] if self.layout != "contiguous" else []
        options += [f"scale {self.scale:g}"] if self.scale != 1 else []
        options += ["to a prior"] if self.has_prior else []
        options += ["with sample_ids"] if self.has_ids else []
        return " ".join(options)


CASES = (
    Case((64, 20)),
    Case((7, 33), reduction="none", mean_over="all"),
    Case((16, 12), torch.bfloat16),
    Case((9, 10), torch.float64, reduction="sum"),
    Case((2, 4, 3, 8), layout="channels_last"),
    Case((33, 10), reduction="none", scale=1e-4),  # a posterior that has collapsed
    Case((33, 10), has_prior=True),
    Case((33, 10), has_ids=True),
)
#: Several programs along rows and columns; minutes under Triton's interpreter.
LARGE_CASES = (
    Case((1000, 700)),
    Case((130, 3000), torch.bfloat16, reduction="none"),
    Case((1000, 700), has_prior=True),
)


@dataclass
class CaseResult:
    """What a case came to. Errors are shares of what is allowed; above 1 is wrong."""

    case: str
    errors: dict[str, float] = field(default_factory=dict)
    kl_error: float | None = None  # largest relative error of a KL
    problem: str | None = None


@dataclass
class BackendResult:
    """What a backend came to; `reason` where it cannot run here."""

    name: str
    device: str | None = None
    reason: str | None = None
    interpreted: bool = False
    cases: list[CaseResult] = field(default_factory=list)
    milliseconds: float | None = None  # forward + backward of SPEED_SHAPE

    @property
    def status(self) -> str:
        """ "ok", "wrong" or "not available"."""
        if self.reason is not None:
            return "not available"
        return "wrong" if any(case.problem for case in self.cases) else "ok"

    @property
    def worst(self) -> float:
        """The largest error, as a share of what is allowed."""
        return max((e for case in self.cases for e in case.errors.values()), default=0.0)

    @property
    def kl_error(self) -> float:
        """The largest relative error of a KL."""
        return max((c.kl_error for c in self.cases if c.kl_error is not None), default=0.0)


def where(backend: str) -> BackendResult:
    """The device that a backend runs on here, or why it cannot."""
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.init()  # Triton's driver is started only then
    device = "cpu" if backend == "cpu" or not has_gpu else "cuda"
    interpreted = backend == "triton" and device == "cpu" and _validate._interpreting()
    try:
        _validate.resolve_backend(backend, torch.device(device))
    except ModuleNotFoundError as error:
        return BackendResult(backend, reason=str(error).removeprefix(f"backend='{backend}' "))
    except ValueError:
        return BackendResult(backend, reason="no CUDA or ROCm device that torch can use")
    return BackendResult(backend, device, interpreted=interpreted)


def check_case(case: Case, backend: str, device: str) -> CaseResult:
    """Forward, backward with random upstream gradients, and diagnose, against the oracle."""
    result = CaseResult(str(case))
    try:
        result.errors, result.kl_error = _errors(case, backend, device)
    except Exception as error:  # whatever a broken installation raises belongs in the report
        result.problem = _told(error)
        return result
    over = [f"{name} by {error:.3g} times" for name, error in result.errors.items() if error > 1]
    if over:
        result.problem = "error above what is allowed: " + ", ".join(over)
    return result


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _errors(case: Case, backend: str, device: str) -> tuple[dict[str, float], float]:
    mu, logvar = make_inputs(
        case.shape, dtype=case.dtype, scale=case.scale, layout=case.layout, device=device
    )
    options: dict[str, Any] = {"reduction": case.reduction, "mean_over": case.mean_over}
    prior: Any = ()
    if case.has_prior:
        prior = make_inputs(case.shape[1:], dtype=case.dtype, device=device, seed=1)
    batch = case.shape[0]
    ids = torch.arange(batch, device=device).flip(0) if case.has_ids else None
    out, upstream, found = step(
        lambda m, v, *p: reparameterize_kl(
            m, v, prior=p or None, seed=SEED, sample_ids=ids, backend=backend, **options
        ),
        (mu, logvar, *prior),
    )

    rows = None if ids is None else to_numpy(ids).astype(np.int64)
    eps = normal(SEED, SEED_OFFSET, batch, mu.numel() // batch, rows).reshape(case.shape)
    oracle = Oracle(to_numpy(mu), to_numpy(logvar), eps, prior=prior or None, **options)
    dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
    gradients = oracle.gradients(*upstream)
    bounds = gradient_bounds(oracle, dtype, case.dtype, *upstream, drawn=True)
    noise = np.abs(oracle.z - oracle.mu)
    z_bound = 8 * unit(case.dtype) * (np.abs(oracle.mu) + noise)
    z_bound = z_bound + EPS_BUDGET[dtype] * np.abs((oracle.z - oracle.mu) / eps)
    errors = {
        "z": worst(out.z, oracle.z, z_bound),
        "kl": worst(out.kl, oracle.kl, KL_BUDGET[dtype] * oracle.kl),
        "kl_of_mean": worst(out.kl_of_mean, oracle.kl_of_mean, kl_of_mean_bound(oracle, dtype)),
    }
    for name, gradient in zip(("dmu", "dlogvar", "dprior_mean", "dprior_scale"), found):
        errors[name] = worst(gradient, gradients[name], bounds[name])
    report, expected = diagnose(mu, logvar, backend=backend), diagnostics(mu, logvar)
    size = DIAGNOSE_BUDGET * expected["kl_dims"]
    for name in ("kl_dims", "aggregate_kl_dims", "information_dims"):
        errors[f"diagnose {name}"] = worst(
            getattr(report, name).flatten(), expected[name], DIAGNOSE_BUDGET * expected[name] + size
        )
    return errors, worst(out.kl, oracle.kl, oracle.kl)


def seconds(backend: str, device: str) -> float:
    """A quick figure: the median of a few steps, forward and backward, of SPEED_SHAPE float32."""
    mu, logvar = (t.requires_grad_() for t in make_inputs(SPEED_SHAPE, device=device))
    dz, one = torch.randn_like(mu), torch.ones((), device=device)

    def call() -> None:
        out: Any = reparameterize_kl(mu, logvar, backend=backend)
        torch.autograd.grad(tuple(out), (mu, logvar), (dz, one, one))

    times: list[float] = []
    started = time.perf_counter()
    while len(times) < 3 or (len(times) < 50 and time.perf_counter() - started < 1.0):
        before = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - before)
    return statistics.median(times)


def plan() -> list[tuple[BackendResult, tuple[Case, ...]]]:
    """Every backend, and its cases here."""
    found: list[tuple[BackendResult, tuple[Case, ...]]] = []
    for backend in backends.names():
        result = where(backend)
        large = () if result.interpreted else LARGE_CASES
        found.append((result, () if result.reason else CASES + large))
    return found


def run(progress: Progress) -> Iterator[BackendResult]:
    """Each backend's results; `progress(text)` is called before every case and the timing."""
    for result, cases in plan():
        for case in cases:
            progress(f"{result.name}: {case}")
            result.cases.append(check_case(case, result.name, result.device or "cpu"))
        if cases and not result.interpreted:
            progress(f"{result.name}: speed")
            if result.status == "ok":
                try:
                    result.milliseconds = 1e3 * seconds(result.name, result.device or "cpu")
                except Exception as error:  # as in check_case
                    result.cases.append(CaseResult("speed", problem=_told(error)))
        yield result


def steps() -> int:
    """How often `run` reports progress."""
    return sum(len(cases) + (bool(cases) and not r.interpreted) for r, cases in plan())


def as_dict(results: list[BackendResult]) -> dict[str, Any]:
    """Everything, for a bug report: versions, devices, results."""
    backends = [
        {
            **asdict(r),
            "status": r.status,
            "worst_share_of_allowed_error": r.worst,
            "kl_relative_error": r.kl_error,
        }
        for r in results
    ]
    return {
        "ok": all(r.status != "wrong" for r in results),
        "versions": _environment.versions(),
        "devices": _environment.devices(),
        "backends": backends,
    }
