"""What the figures depend on beside the code: the machine, the versions, the commit."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from vaekl._environment import cpu_name, version


def _commit() -> str | None:
    """What is checked out; "-dirty" if any of it but results has been changed since."""
    commit = _output("git", "rev-parse", "--short=12", "HEAD")
    changed = ("git", "status", "--porcelain", "--untracked-files=no", "--", ":(top)")
    pages = ("bench/results", "README.md", "docs/speed.md")
    results = (f":(top,exclude){path}" for path in pages)
    return f"{commit}-dirty" if commit and _output(*changed, *results) else commit


def _output(*command: str) -> str | None:
    """What a command prints, None where it fails or is not there."""
    root = Path(__file__).parent
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip() or None


def describe(device: str, commit: str | None = None) -> dict[str, Any]:
    """Facts for the head of a results file; commit where there is no git to ask."""
    facts: dict[str, Any] = {"kind": device, "cpu": cpu_name(), "cpus": os.cpu_count()}
    facts["name"] = facts["cpu"]
    if device == "cuda":
        query = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        facts["name"] = torch.cuda.get_device_name()
        facts["driver"] = query.splitlines()[0] if query else None
        facts["cuda"] = torch.version.cuda or torch.version.hip
    facts["load"] = round(os.getloadavg()[0], 2)
    facts["threads"] = torch.get_num_threads()
    facts["versions"] = {"python": platform.python_version(), "torch": torch.__version__}
    facts["versions"] |= {name: version(name) for name in ("triton", "vaekl", "diffusers")}
    facts["commit"] = commit or _commit()
    facts["date"] = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return facts


def slug(facts: dict[str, Any]) -> str:
    """The stem of the results' files: ``cpu``, or the name of the GPU."""
    if facts["kind"] == "cpu":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", facts["name"].lower()).strip("-")
