"""The numerical tests once more, on what Triton compiles the kernels to for NVIDIA's GPUs.

Each runs pytest in a process of its own, without Triton's interpreter, in which the PTX of every
launch is executed (tests/ptx/): no access may be out of bounds, misaligned, or a race.
"""

import os
import re
import subprocess
import sys

import pytest

from paths import ROOT

#: What tests the triton backend's numbers; the default run takes SUBSET, in less than a minute.
SUITE = ["values", "gradients", "noise", "layouts", "diagnostics", "backends/test_check.py"]
SUBSET = [
    "values/test_values.py::test_reductions",
    "values/test_values.py::test_dtypes",
    "values/test_values.py::test_layouts",
    "values/test_values.py::test_four_axes",
    "values/test_values.py::test_wide_offsets",
    "values/test_values.py::test_clamp",
    "values/test_values.py::test_programs_that_walk_over_columns",
    "values/test_values.py::test_sums_of_several_rounds",
    "values/test_scales.py::test_values_and_gradients",
    "layouts/test_channels_last.py",
    "layouts/test_beside.py::test_small_blocks",
    "noise/test_noise.py::test_seed_gives_the_oracles_noise",
    "noise/test_determinism.py",
    "diagnostics/test_diagnostics.py::test_values",
    "diagnostics/test_diagnostics.py::test_shapes",
]


def run_on_ptx(target, tests, **more):
    """How many of these pass; an error if one does not."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    inherited.pop("TRITON_INTERPRET", None)
    only = ["-q", "-p", "no:cacheprovider", "-k", "not cpu and not eager"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *only, *(ROOT / "tests" / name for name in tests)],
        capture_output=True, text=True, cwd=ROOT,
        env=inherited | {"VAEKL_PTX": target, "CUDA_VISIBLE_DEVICES": ""} | more,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return int(re.search(r"(\d+) passed", done.stdout)[1])


def test_a_subset():
    assert run_on_ptx("sm_90", SUBSET) > 150


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_all(target):
    assert run_on_ptx(target, SUITE) > 850


@pytest.mark.slow
def test_with_the_errors_that_approximate_instructions_may_have():
    """Square roots, logarithms and divisions of float32 that are not rounded correctly."""
    assert run_on_ptx("sm_90", SUITE, VAEKL_PTX_ERRORS="1") > 850
