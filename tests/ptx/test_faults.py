"""Kernels of the project, broken on purpose: each fault is an error that says what and where.

Runs in a process of its own, without Triton's interpreter, and in one more for each fault.
"""

import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

from paths import ROOT

RACE = (
    r"forward_kernel: race: thread \d+ of program \d+ comes to bytes written by thread \d+ of "
    r"program \d+, and nothing orders the two, in `.*ld\.global.*reduction\.py:\d+"
)
# From 3.9 on Triton puts a barrier there itself.
OF_TRITON = tuple(map(int, version("triton").split(".")[:2])) >= (3, 9)

#: File of the kernels, or the PTX; what is replaced there, by what; then what the error says.
FAULTS = {
    "none": ("reduction.py", "", "", ""),
    "no barrier before the atomic": (
        "reduction.py", "    tl.debug_barrier()\n", "", "" if OF_TRITON else RACE,
    ),
    "no barrier before the compiled atomic": (
        "PTX", r"bar\.sync\s+0;(?=(?:[^@]|@\[)*@%p\d+ atom)", "", RACE,
    ),
    "relaxed": (
        "reduction.py", 'sem="acq_rel"', 'sem="relaxed"',
        RACE,
    ),
    "not released": (
        "reduction.py", 'sem="acq_rel"', 'sem="acquire"',
        RACE,
    ),
    "not acquired": (
        "reduction.py", 'sem="acq_rel"', 'sem="release"',
        RACE,
    ),
    "a column too many": (
        "forward.py", "m_col = o_col < width", "m_col = o_col <= width",
        r"forward_kernel: out of bounds: 4 bytes at byte 588 of p_mu, which has 588, in "
        r"`@%p\d+ ld\.global.*forward\.py:\d+",
    ),
    "a row too many": (
        "backward.py", "m_row = o_row < B", "m_row = o_row <= B",
        r"backward_kernel: out of bounds: 4 bytes at byte \d+ of p_\w+, which has \d+, in "
        r"`@%p\d+ ld\.global.*backward\.py:\d+",
    ),
    "a pointer that is not as aligned as it was compiled for": (
        "forward.py", "", "",
        r"forward_kernel: misaligned: 16 bytes at 4 past a multiple of 16, in "
        r"`.*ld\.global\.v4.*forward\.py:\d+",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def reports():
    """What the launches said, by fault."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = [str(ROOT / "tests"), os.environ.get("PYTHONPATH")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_reported(fault, reports):
    said = FAULTS[fault][-1]
    assert re.fullmatch(f"{said}.*" if said else "", reports[fault]), reports[fault]


def report(fault, pipe):
    """The error of a step with kernels that have this fault."""
    name, before, after, _ = FAULTS[fault]
    if name == "PTX":
        from ptx import launcher

        parse = launcher.parse
        launcher.parse = lambda text: parse(re.sub(before, after, text))
        pipe.send(_step(False))
        return
    with tempfile.TemporaryDirectory() as folder:
        kernels = Path(shutil.copytree(ROOT / "kernels", Path(folder, "kernels")))
        text = (kernels / name).read_text()
        assert before in text
        (kernels / name).write_text(text.replace(before, after))
        spec = importlib.util.spec_from_file_location(
            "vaekl.kernels", kernels / "__init__.py", submodule_search_locations=[str(kernels)]
        )
        sys.modules["vaekl.kernels"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        pipe.send(_step("aligned" in fault))


def _step(misaligned):
    import torch

    import ptx
    from vaekl import _plans, _validate, reparameterize_kl
    from vaekl.backends import triton
    from vaekl.testing import CONFIGS, make_inputs, step

    _validate._interpreting = lambda: True  # CPU tensors may go to the Triton path
    mu, logvar = make_inputs((8, 64)) if misaligned else make_inputs((7, 21))
    options = {"reduction": "none", "seed": 1, "backend": "triton"}
    try:
        with _plans.use_config(CONFIGS["default" if misaligned else "many"]):
            step(lambda *t: reparameterize_kl(*t, **options), (mu, logvar))
            if misaligned:
                triton._FORWARD_ANYWHERE = ()  # nothing is asked of where tensors lie
                wide = torch.zeros(mu.numel() + 1)
                reparameterize_kl(wide[1:].view(mu.shape).copy_(mu), logvar, **options)
    except ptx.PtxError as error:
        return str(error)
    return ""


def main():
    from ptx import launcher

    launcher.use("sm_90")
    found = {}
    fork = multiprocessing.get_context("fork")  # torch and triton are imported once
    for fault in FAULTS:
        receiver, sender = fork.Pipe(duplex=False)
        process = fork.Process(target=report, args=(fault, sender))
        process.start()
        sender.close()
        found[fault] = receiver.recv()
        process.join()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
