"""Measure every provider on every case, most important first.

    python bench/run.py --out bench/results

Results go to ``--out`` as they come: ``cpu.json`` or one named after the GPU, and plots beside it.
A provider is checked before it is timed; one with wrong results is listed and not timed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import environment
import screen
import timing
import torch
from cases import MODES, Case, select
from correctness import fault
from providers import PROVIDERS, Provider, Step

#: A check runs on the whole case up to so many elements, else on fewer samples.
CHECKED_ELEMENTS = 2**20
#: Tensors of mu's size that a case may hold at once, generously.
HELD_TENSORS = 32
#: Seconds for timing one mode of one case by all providers; GPUs are steadier.
BUDGET = {"cpu": 1.5, "cuda": 0.5}
QUICK_BUDGET = 0.1


class Run:
    """The results so far and the time that is left."""

    def __init__(self, device: str, out: Path, budget: float, seconds: float, commit: str | None):
        self.device, self.budget = device, budget
        self.deadline = time.monotonic() + seconds
        facts = environment.describe(device, commit)
        self.path = out / f"{environment.slug(facts)}.json"
        self.results: dict[str, Any] = {
            "device": facts,
            "copy_bytes_per_second": timing.copy_bandwidth(device, budget),
            "complete": False,
            "wrong": [],
            "rows": [],
        }

    @property
    def time_is_up(self) -> bool:
        return time.monotonic() >= self.deadline

    def write(self) -> None:
        """All that is known, in one step: a reader never sees half a file."""
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.results, indent=1, ensure_ascii=False) + "\n")
        part.replace(self.path)

    def right_steps(self, case: Case, both: bool, providers: list[Provider]) -> list[Step]:
        """The steps of the providers that give right results."""
        batch = max(1, min(case.shape[0], CHECKED_ELEMENTS * case.shape[0] // case.elements))
        inputs, few = case.inputs(self.device), case.inputs(self.device, batch)
        steps = []
        for provider in providers:
            if self.time_is_up or not provider.takes(case.shape):
                continue
            try:
                function = provider.build()
                problem = fault(Step(provider, function, *few, both, dkl=float(batch)))
                step = Step(provider, function, *inputs, both)
            except Exception as error:  # of any other code's making: reported like a wrong result
                problem = told(error)
            if problem is None:
                steps.append(step)
            else:
                self.wrong(provider.name, case, both, problem)
        return steps

    def wrong(self, provider: str, case: Case, both: bool, problem: str) -> None:
        """List what gave wrong results or none."""
        entry = {"provider": provider, "case": case.name, "both": both, "problem": problem}
        self.results["wrong"].append(entry)

    def measure(self, case: Case, both: bool, providers: list[Provider]) -> None:
        """Rows for all providers and modes of a case."""
        steps = self.right_steps(case, both, providers)
        for mode in MODES:
            calls = {s.name: s.forward if mode == "forward" else s.forward_backward for s in steps}
            if self.time_is_up or not calls:
                return
            samples = timing.interleaved(calls, self.device, self.budget)
            for step in steps:
                row = {
                    "case": case.name,
                    "use": case.use,
                    "shape": case.shape,
                    "growth": case.growth,
                    "elements": case.elements,
                    "floor_bytes": case.floor_bytes(mode),
                    "both": both,
                    "mode": mode,
                    "provider": step.name,
                    **self.figures(step, mode, calls[step.name], samples[step.name]),
                }
                self.results["rows"].append(row)
            self.write()

    def figures(
        self, step: Step, mode: str, call: Callable[[], object], samples: list[float]
    ) -> dict[str, Any]:
        """All that is measured of one provider, mode and case."""
        quartiles = statistics.quantiles(samples, n=4)
        figures: dict[str, Any] = {
            "seconds": statistics.median(samples),
            "quartiles": [quartiles[0], quartiles[2]],
            "samples": len(samples),
        }
        if self.device == "cuda":
            figures["device_seconds"] = timing.device_seconds(call)
            try:
                figures["graph_seconds"] = timing.graph_seconds(call)
            except RuntimeError as error:  # a capture that fails: a finding, not the end of the run
                figures |= {"graph_seconds": None, "graph_error": told(error)}
            figures["launches"] = timing.launches(call)
            figures["peak_bytes"] = timing.peak_bytes(call)
        if mode == "forward+backward":
            figures["saved_bytes"] = timing.saved_bytes(step.forward, step.inputs)
        return figures


def told(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def fits(case: Case, device: str) -> bool:
    """Whether plain torch, which keeps the most, has the device memory for it."""
    if device == "cpu":
        return True
    return HELD_TENSORS * case.elements * case.dtype.itemsize < torch.cuda.mem_get_info()[0]


def show(results: dict[str, Any]) -> None:
    """Median times, speed-up over plain torch, and the share of the copy bandwidth."""
    copy = results["copy_bytes_per_second"]
    headings = ["case", "KLs", "provider"]
    headings += [heading for mode in MODES for heading in (f"{mode}\nms", "\nx", "\nshare")]
    groups: dict[tuple[str, bool, str], dict[str, dict[str, Any]]] = {}
    for row in results["rows"]:
        key = (row["case"], row["both"], row["provider"])
        groups.setdefault(key, {})[row["mode"]] = row
    rows: list[list[str] | None] = []
    last = None
    for (case, both, provider), modes in groups.items():
        if last not in (None, (case, both)):
            rows.append(None)
        last = (case, both)
        cells = []
        for mode in MODES:
            row = modes.get(mode)
            base = groups.get((case, both, "plain"), {}).get(mode)
            if row is None:
                cells += ["", "", ""]
                continue
            speedup = f"{base['seconds'] / row['seconds']:.2f}" if base else ""
            share = row["floor_bytes"] / row.get("device_seconds", row["seconds"]) / copy
            cells += [f"{row['seconds'] * 1e3:.3f}", speedup, f"{share:.0%}"]
        rows.append([case, "both" if both else "one", provider, *cells])
    screen.table(
        "Median times, times as fast as plain torch, share of the copy bandwidth",
        headings,
        rows,
        words=3,
        caption=f"{results['device']['name']}, copy {copy / 1e9:.1f} GB/s",
    )


def arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [provider.name for provider in PROVIDERS]
    parser.add_argument("--out", type=Path, required=True, help="folder for JSON and plots")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--quick", action="store_true", help="a few cases, few samples")
    parser.add_argument("--seconds", type=float, default=600, help="time limit (600)")
    parser.add_argument("--providers", nargs="+", choices=names, default=names, metavar="NAME",
                        help=f"of {', '.join(names)}")  # fmt: skip
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="of the table's first column")
    parser.add_argument("--commit", help="what is measured, where git cannot say")
    args = parser.parse_args()
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA or ROCm device")
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def main() -> int:
    """Measure and report; 1 if a provider was wrong."""
    args = arguments()
    # Inductor's, of code in torch itself; not about anything measured here.
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
    chosen = [p for p in PROVIDERS if p.name in args.providers]
    providers = [p for p in chosen if p.missing(args.device) is None]
    for provider in chosen:
        if provider not in providers:
            print(f"not measured: {provider.missing(args.device)}")
    budget = QUICK_BUDGET if args.quick else BUDGET[args.device]
    run = Run(args.device, args.out, budget, args.seconds, args.commit)
    facts = run.results["device"]
    if facts["load"] > 0.5 * facts["cpus"]:
        print(f"the machine is busy (load {facts['load']}): expect noise")
    cases = [case for case in select(args.device, args.quick) if fits(case, args.device)]
    cases = [case for case in cases if args.cases is None or case.name in args.cases]
    # What is shown first: both KLs of every case.
    work = [(case, both) for both in (True, False) for case in cases if both in case.both]
    for case, both in screen.track(work, "cases", len(work)):
        if run.time_is_up:
            break
        try:
            run.measure(case, both, providers)
        except Exception as error:  # the other cases may still be measured
            run.wrong("timing", case, both, told(error))
    run.results["complete"] = not run.time_is_up
    run.write()
    show(run.results)
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: they need matplotlib")
    else:
        import plots

        for path in plots.draw(run.results, run.path):
            print(f"wrote {path}")
    print(f"wrote {run.path}")
    if not run.results["complete"]:
        print(f"stopped at the time limit of {args.seconds:g} s")
    for wrong in run.results["wrong"]:
        kls = "both KLs" if wrong["both"] else "one KL"
        print(f"WRONG: {wrong['provider']}, {wrong['case']}, {kls}: {wrong['problem']}")
    return 1 if run.results["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
