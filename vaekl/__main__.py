"""The command line: ``vaekl check``, also ``python -m vaekl check``."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from . import __version__, _check, _environment

_EPILOG = """\
vaekl check exits with status 1 if a backend gives wrong results. To report a problem, add the
output of: vaekl check --json"""


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="vaekl",
        description="The VAE's sample and both KL terms for PyTorch, fused and exact.",
        epilog=_EPILOG,
        formatter_class=raw,
    )
    parser.add_argument("--version", action="version", version=f"vaekl {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    check = commands.add_parser(
        "check",
        help="test every backend on this machine against the float64 oracle",
        description="Print versions and devices, and test every backend that can run here: "
        "results and gradients against the float64 oracle, and a quick timing.",
        epilog=_EPILOG,
        formatter_class=raw,
    )
    check.add_argument("--json", action="store_true", help="print JSON, for bug reports")
    return parser


@contextmanager
def _progress(total: int) -> Iterator[_check.Progress]:
    """On stderr: a bar on a terminal (with rich), else a line for each step."""
    if importlib.util.find_spec("rich") is not None and sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task, begun = bar.add_task("", total=total), 0

            def advance(what: str) -> None:
                nonlocal begun
                bar.update(task, description=what, completed=begun)
                begun += 1

            yield advance
    else:
        yield lambda what: print(f"checking {what}", file=sys.stderr, flush=True)


def _lines(results: list[_check.BackendResult]) -> Iterator[str]:
    """The report in words."""
    yield "versions"
    for name, version in _environment.versions().items():
        yield f"  {name:<10} {version or 'not installed'}"
    yield "devices"
    for facts in _environment.devices():
        more = ", ".join(f"{key} {value}" for key, value in list(facts.items())[2:])
        yield f"  {facts['device']:<10} {facts['name']} ({more})"
    shape = "x".join(map(str, _check.SPEED_SHAPE))
    yield f"backends     (speed: forward + backward of {shape} float32)"
    for r in results:
        if r.reason is not None:
            yield f"  {r.name:<10} {r.status}: {r.reason}"
            continue
        place = f"{r.device}, interpreted" if r.interpreted else r.device
        line = f"  {r.name:<10} {r.status:<6} on {place}: {len(r.cases)} cases"
        line += f", KL within {r.kl_error:.1e}, worst error {r.worst:.0%} of the allowed"
        yield line + (f", {r.milliseconds:.3g} ms" if r.milliseconds is not None else "")
        for case in r.cases:
            if case.problem:
                yield f"    {case.case}: {case.problem}"


def _plain(value: Any) -> Any:
    """JSON has no inf and no NaN."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 2
    with _progress(_check.steps()) as progress:
        results = list(_check.run(progress))
    wrong = [r.name for r in results if r.status == "wrong"]
    if options.json:
        print(json.dumps(_plain(_check.as_dict(results)), indent=1))
    else:
        print("\n".join(_lines(results)))
        print(f"wrong: {', '.join(wrong)}" if wrong else "all backends that can run here are right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
