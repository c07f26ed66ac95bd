"""What can be read off the machine code of the kernels, without a GPU.

The launcher's own choices are compiled for each target (bench/codegen.py), once for all tests. The
default run takes a subset that reaches every branch of the kernels, for one target of each maker;
`-m slow` takes the whole matrix for all targets.
"""

import importlib
import json
import math
import os
import re
import subprocess
import sys
from importlib.metadata import version

import pytest

from paths import BENCH

KERNELS = {"forward", "backward", "log_prob", "log_prob_backward", "statistics"}
CEILINGS = json.loads((BENCH / "codegen_ceilings.json").read_text())
TARGETS = {"subset": ["sm_90", "gfx942"], "all": ["sm_80", "sm_90", "sm_100", "gfx942"]}

MAIN_PATH = r"(fp32|bf16|fp16) (many|d20|d700) kl=batchmean( of_mean=\w+)? z( clamp)?"


def compile_rows(folder, targets, *options):
    """The rows of bench/codegen.py, in a process without the interpreter."""
    out = folder / "codegen.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, BENCH / "codegen.py", "--targets", *targets, "--out", out, *options],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Exception ignored" not in done.stderr, done.stderr[-3000:]
    print(done.stdout)
    return json.loads(out.read_text())["rows"]


@pytest.fixture(scope="module", params=["subset", pytest.param("all", marks=pytest.mark.slow)])
def rows(request, tmp_path_factory):
    options = ["--all"] if request.param == "all" else []
    targets = TARGETS[request.param]
    return compile_rows(tmp_path_factory.mktemp("codegen"), targets, *options)


@pytest.fixture
def targets(rows, request):
    """Those that the rows must be of."""
    return TARGETS[request.node.callspec.params["rows"]]


def failing(rows, condition):
    return [f"{r['target']} {r['kernel']} {r['variant']}" for r in rows if not condition(r)]


def nvidia(rows):
    return [r for r in rows if r["target"].startswith("sm_")]


def draws_noise(row):
    """Is noise drawn: z wanted and eps not given; in backward of KLs, also used for dlogvar?"""
    words = row["variant"].split()
    if "z" not in words or "given" in words:
        return False
    used = re.search(r"used=(\d)\d\d\d(\d)", row["variant"])
    return row["kernel"] != "backward" or used is None or used.groups() == ("1", "1")


def test_every_target_and_kernel(rows, targets):
    assert {r["target"] for r in rows} == set(targets)
    for target in targets:
        kernels = {r["kernel"] for r in rows if r["target"] == target}
        assert kernels == KERNELS


def programs(row, more=0):
    """So many the 65536 registers of a multiprocessor hold, which are allocated by 8."""
    return 65536 // (row["threads"] * (math.ceil(row["registers"] / 8) * 8 + more))


def is_held_for_occupancy(row):
    """Two values at most are read again for each block: in registers they would cost a program."""
    return row["stack"] <= 8 and row["local_accesses"] <= 4 and programs(row, 8) < programs(row)


def test_no_spills(rows):
    if version("triton").startswith("3.6."):  # its addresses of channels_last fill the registers
        rows = [row for row in rows if "channels_last" not in row["variant"]]
    spilled = [r for r in rows if r["stack"] != 0 or r["local_accesses"] != 0]
    assert not [r for r in spilled if r["target"].startswith("gfx")]
    assert not failing(spilled, is_held_for_occupancy)


def main_path(rows):
    """Large, contiguous, aligned, 2 or 4 bytes an element, D a multiple of 4, all outputs and
    gradients wanted.
    """
    return [r for r in rows if re.fullmatch(MAIN_PATH, r["variant"])]


def test_accesses_of_four_elements_on_the_main_path(rows):
    """Every load and store of the tensors; the main loop of NVIDIA kernels has no other. So many a
    thread draws: nothing has to change threads, for which it would wait at a barrier.
    """
    chosen = main_path(rows)
    assert chosen
    for row in chosen:
        forward = row["kernel"] == "forward"
        tensors_in, tensors_out = (2, 1) if forward else (3, 2)
        width = "wide" if row["variant"].startswith("fp32") else "half_wide"
        loads, stores = row[f"{width}_loads"], row[f"{width}_stores"]
        each = row["elements_per_thread"] / 4
        label = (row["target"], row["kernel"], row["variant"])
        if row["target"].startswith("sm_"):
            assert loads == row["loads"] == tensors_in * each, label
            assert stores == row["stores"] == tensors_out * each, label
            assert row["barriers_in_loop"] == 0, label
        else:
            assert loads >= tensors_in * each, label
            assert stores >= tensors_out * each, label


def test_sixteen_bytes_of_half_precision_where_nothing_is_drawn(rows):
    chosen = [r for r in nvidia(rows) if re.fullmatch(r"(bf16|fp16) many kl=\w+", r["variant"])]
    assert chosen
    for row in chosen:
        tensors_in, tensors_out = 2, 0 if row["kernel"] == "forward" else 2
        each = row["elements_per_thread"] / 8
        assert row["wide_loads"] == tensors_in * each, row
        assert row["wide_stores"] == tensors_out * each, row


def test_barrier_before_every_atomic(rows):
    """Without it, and on AMD each wave's wait for its stores, the last program could read partials
    that are not yet written.
    """
    assert not failing(rows, lambda r: r["barrier_before_atomics"])
    several = [r for r in rows if r["kernel"] == "forward" and " many " in r["variant"]]
    reduced = [r for r in several if "kl=batchmean" in r["variant"] or "of_mean" in r["variant"]]
    assert reduced
    reduced += [r for r in rows if re.search(" (many|rows) statistics", r["variant"])]
    parts_of_rows = [r for r in rows if r["kernel"] == "log_prob" and " cols " in r["variant"]]
    assert parts_of_rows
    reduced += parts_of_rows
    assert not failing(reduced, lambda r: r["atomics"] >= 1)
    # Backward has sums where samples share a prior.
    back = [r for r in rows if r["kernel"] in ("backward", "log_prob_backward")]
    sums = [r for r in back if "prior=event" in r["variant"]]
    assert {r["kernel"] for r in sums} == {"backward", "log_prob_backward"}
    alone = [r for r in rows if " one " in r["variant"] or r in back]
    assert not failing([r for r in alone if r not in sums], lambda r: r["atomics"] == 0)
    assert not failing(
        [r for r in sums if " one " not in r["variant"]], lambda r: r["atomics"] >= 1
    )


def test_memory_order_of_the_last_program(rows):
    """The counter is read and written with acquire and release, and partials are read past L1."""
    for row in nvidia(rows):
        label = (row["target"], row["kernel"], row["variant"])
        assert row["ordered_atomics"] == row["all_atomics"] == row["atomics"], label
        assert (row["uncached_loads"] > 0) == (row["atomics"] > 0), label


def test_wide_variants_count_programs_in_int64(rows):
    """Rows and columns past 2^31 start at a 64-bit product, not at a widened 32-bit one."""
    wide = [row for row in rows if " wide" in row["variant"]]
    assert wide
    assert not failing(wide, lambda r: r["narrow_starts"] == 0)
    assert failing([r for r in rows if r not in wide], lambda r: r["narrow_starts"] == 0)


def test_one_philox_call_for_four_elements(rows):
    """Ten multiplies of each kind a group; a few of the first round are shared by all groups.

    (Where each row has a key, the halves of one are masked, and LLVM writes other products.)
    """
    for row in nvidia(r for r in rows if "samples=keys" not in r["variant"]):
        groups = row["elements_per_thread"] / 4
        label = (row["target"], row["kernel"], row["variant"])
        if draws_noise(row):
            for count in row["philox_multiplies"]:
                assert 7 * groups <= count <= 10 * groups, label
        else:
            assert row["philox_multiplies"] == [0, 0], label


def test_no_slow_path_in_float32(rows):
    """The range reduction of libdevice's sine would branch or call for each pair of normals.

    The main loop has its own exit and jump back (one or two branches), and nothing else. A root or
    a division by a scale, rounded correctly, jumps aside for numbers that are hardly normal.
    """
    chosen = [r for r in nvidia(rows) if not r["variant"].startswith("fp64")]
    chosen = [r for r in chosen if r["kernel"] != "statistics"]  # in float64 throughout
    assert not failing(chosen, lambda r: r["calls"] == 0)
    chosen = [r for r in chosen if not re.search("scale=(std|var)|=path", r["variant"])]
    assert not failing(chosen, lambda r: r["branches_in_loop"] <= 2)


def test_divisions_are_rounded_correctly(rows):
    """Two ulp of a division would be half of what a KL may be off in float32."""
    assert not failing(nvidia(rows), lambda r: r["inexact_divisions"] == 0)


@pytest.mark.skipif(
    version("triton") != CEILINGS["triton"],
    reason=f"ceilings of triton {CEILINGS['triton']}, this is {version('triton')}",
)
def test_registers_and_instructions_stay_under_their_ceilings(rows, targets):
    expected = [key for key in CEILINGS["ceilings"] if key.split()[0] in targets]
    checked = 0
    for row in rows:
        ceiling = CEILINGS["ceilings"].get(f"{row['target']} {row['kernel']} {row['variant']}")
        if ceiling is None:
            continue
        checked += 1
        for fact, limit in ceiling.items():
            assert row[fact] <= limit, (row["target"], row["kernel"], row["variant"], fact)
    assert checked == len(expected) > 0


@pytest.fixture
def disassembly(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("disassembly")


def test_the_main_loop_is_the_first(disassembly):
    """Its jumps to the start of a round belong to it; longer loops of the last program do not."""
    code = ["MOV", "LDG", "BRA 0x10", "STG", "BRA 0x10", "MOV", "LDG.STRONG", "BSSY", "FADD",
            "FADD", "FADD", "BRA 0x50", "EXIT", "BRA 0xd0"]  # fmt: skip
    addressed = [(16 * i, text) for i, text in enumerate(code)]
    assert disassembly._loop(addressed) == code[1:5]


def test_the_gate_sees_a_missing_barrier(disassembly):
    """The check itself, on code with and without the barrier."""
    nvidia, amd = disassembly.BARRIER, disassembly.AMD_BARRIER
    seen = disassembly._barrier_before_atomics
    assert seen(["STG.E", "BAR.SYNC", "ATOMG.E.ADD"], nvidia)
    assert not seen(["BAR.SYNC", "STG.E", "ATOMG.E.ADD"], nvidia)
    assert not seen(["ATOMG.E.ADD"], nvidia)
    store, atomic = "buffer_store_dword v2, v0, s[28:31], 0 offen", "global_atomic_add v1, v1, v2"
    done, after = "s_waitcnt vmcnt(0) lgkmcnt(0)", ["buffer_wbl2 sc1", "s_waitcnt vmcnt(0)", atomic]
    assert seen([store, done, "s_barrier", *after], amd)
    assert not seen([store, "s_barrier", *after], amd)
    assert not seen([store, "s_waitcnt lgkmcnt(0)", "s_barrier", *after], amd)
    assert not seen([done, store, "s_barrier", *after], amd)
    assert not seen([store, done, *after], amd)
