"""Threads, memory and what orders them, in kernels of a few lines."""

import re

import numpy as np
import pytest

from ptx import PtxError
from ptx.snippets import run

u32, u64 = np.uint32, np.uint64
ONE_WORD = "mad.wide.u32 %rd9, %r0, 4, %rd0;\n"  # each thread's own in the first array


def words(count):
    """Zeros that start with a sector."""
    raw = np.zeros(count + 8, u32)
    return raw[-(raw.ctypes.data // 4) % 8 :][:count]


def report(*said):
    """An error that says these, in this order."""
    return pytest.raises(PtxError, match=".*".join(map(re.escape, said)))


def test_threads_part_and_meet_again():
    """Lanes from 20 on take a loop of as many rounds as their number; then all cross a barrier."""
    out = np.zeros(64, u32)
    run(ONE_WORD + """
        mov.b32 %r1, 0;
        setp.lt.u32 %p1, %r0, 20;
        @%p1 bra $L__DONE;
    $L__LOOP:
        add.s32 %r1, %r1, 1;
        setp.lt.u32 %p2, %r1, %r0;
        @%p2 bra $L__LOOP;
    $L__DONE:
        bar.sync 0;
        @!%p1 st.global.b32 [%rd9], %r1;
    """, out, threads=64)  # fmt: skip
    assert out.tolist() == [0] * 20 + list(range(20, 64))


def test_a_barrier_passed_by():
    with report("snippet: threads of program 0 wait at a barrier that others have passed by"):
        run("""setp.lt.u32 %p1, %r0, 5;
        @%p1 bra $L__END;
        bar.sync 0;
    $L__END:""")


@pytest.mark.parametrize("mode", ["bfly", "idx", "up", "down"])
def test_shuffles(mode):
    out, lane = np.zeros(64, u32), np.arange(64)
    clamp = 0 if mode == "up" else 31
    code = f"shfl.sync.{mode}.b32 %r1, %r0, 3, {clamp}, -1;\nst.global.b32 [%rd9], %r1;"
    run(ONE_WORD + code, out, threads=64)
    inside = lane % 32
    expected = {
        "bfly": lane ^ 3,
        "idx": lane - inside + 3,
        "up": np.where(inside >= 3, lane - 3, lane),
        "down": np.where(inside < 29, lane + 3, lane),
    }[mode]
    assert out.tolist() == expected.tolist()
    with report("a warp comes here without some of its threads", "shfl"):
        run("setp.lt.u32 %p1, %r0, 5;\n@%p1 shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1;")


def test_sum_of_a_warp():
    out, lane = np.zeros(64, u32), np.arange(64)
    code = "sub.s32 %r1, %r0, 40;\nredux.sync.add.s32 %r2, %r1, -1;\nst.global.b32 [%rd9], %r2;"
    run(ONE_WORD + code, out, threads=64)
    sums = (lane - 40).reshape(2, 32).sum(1)
    assert out.astype(np.int32).tolist() == np.repeat(sums, 32).tolist()
    with report("redux.sync of less than a warp"):
        run("redux.sync.add.s32 %r1, %r0, 255;")
    with report("a warp comes here without some of its threads", "redux"):
        run("setp.lt.u32 %p1, %r0, 5;\n@%p1 redux.sync.add.s32 %r1, %r0, -1;")


def test_a_lane_out_of_bounds():
    out = np.zeros(31, u32)
    with report("snippet: out of bounds: 4 bytes at byte 124 of array 0, which has 124",
                "`st.global.b32 [%rd9], %r0` (line"):  # fmt: skip
        run(ONE_WORD + "st.global.b32 [%rd9], %r0;", out)
    with report("out of bounds: 4 bytes at byte 124 of array 0"):
        run(ONE_WORD + "ld.global.b32 %r1, [%rd9];", out)
    with report("out of bounds"):
        run("ld.global.b32 %r1, [%rd0 + -4];", out)
    with report("out of bounds: shared memory up to byte 128 of 124"):
        run("shl.b32 %r1, %r0, 2;\nst.shared.b32 [%r1], %r0;", shared=124)
    run(ONE_WORD + "setp.lt.u32 %p1, %r0, 31;\n@%p1 st.global.b32 [%rd9], %r0;", out)
    assert out.tolist() == list(range(31))


def test_a_misaligned_access():
    out = np.zeros(129, u32)
    start = 0 if out.ctypes.data % 16 == 0 else (16 - out.ctypes.data % 16) // 4
    aligned = out[start:][:128]
    code = "mad.wide.u32 %rd9, %r0, 16, %rd0;\nst.global.v4.b32 [%rd9], {%r0, %r0, %r0, %r0};"
    run(code, aligned)
    assert aligned.tolist() == np.repeat(np.arange(32), 4).tolist()
    with report("misaligned: 16 bytes at 4 past a multiple of 16", "st.global.v4.b32"):
        run(code.replace("[%rd9]", "[%rd9 + 4]"), aligned)
    with report("misaligned: 4 bytes at 2 past a multiple of 4", "ld.shared"):
        run("ld.shared.b32 %r1, [global_smem+2];", shared=128)


WRITE = "st.shared.b32 [%r1], %r0;\n"
READ = "xor.b32 %r2, %r1, 128;\nld.shared.b32 %r3, [%r2];\n"  # another warp's
BARRIER = "bar.sync 0;\n"


def test_shared_memory_between_two_barriers():
    out = np.zeros(64, u32)
    start, end = ONE_WORD + "shl.b32 %r1, %r0, 2;\n", "st.global.b32 [%rd9], %r3;"
    run(start + WRITE + BARRIER + READ + end, out, threads=64, shared=256)
    assert out.tolist() == (np.arange(64) ^ 32).tolist()
    with report("race: thread 0 of program 0 comes to bytes written by thread 32", "ld.shared"):
        run(start + WRITE + READ + end, out, threads=64, shared=256)
    with report("race", "comes to bytes read by thread", "st.shared"):
        run(start + WRITE + BARRIER + READ + WRITE, out, threads=64, shared=256)
    with report("race: threads write different values to the same bytes"):
        run("st.shared.b32 [global_smem], %r0;", shared=256)


def test_bytes_that_several_threads_read_are_not_written_without_a_barrier():
    """Even by the one that read them last."""
    code = "ld.shared.b32 %r1, [global_smem];\nsetp.eq.u32 %p1, %r0, 31;\n"
    with report("comes to bytes read by several threads"):
        run(code + "@%p1 st.shared.b32 [global_smem], %r0;", shared=4)
    run(code + "bar.sync 0;\n@%p1 st.shared.b32 [global_smem], %r0;", shared=4)


ARRIVE = """
    setp.eq.u32 %p1, %r0, 0;
    mov.b32 %r5, 0;
    @%p1 atom.global.gpu.{order}.add.u32 %r5, [%rd1], 1;
    @%p1 st.shared.b32 [global_smem], %r5;
    bar.sync 0;
    ld.shared.b32 %r6, [global_smem];
    setp.ne.u32 %p2, %r6, 6;
    @%p2 bra $L__END;
"""
PARTIAL = """
    mov.u32 %r1, %ctaid.x;
    mad.lo.s32 %r2, %r1, 32, %r0;
    mad.wide.u32 %rd8, %r2, 4, %rd0;
    st.global.b32 [%rd8], %r2;
"""
SUM = """
    mov.b32 %r7, 0;
    mov.b32 %r8, 0;
$L__LOOP:
    mad.lo.s32 %r3, %r8, 32, 31;
    sub.s32 %r3, %r3, %r0;
    mad.wide.u32 %rd8, %r3, 4, %rd0;
    ld.global.b32 %r4, [%rd8];
    add.s32 %r7, %r7, %r4;
    add.s32 %r8, %r8, 1;
    setp.lt.u32 %p3, %r8, 7;
    @%p3 bra $L__LOOP;
    mad.wide.u32 %rd8, %r0, 4, %rd2;
    st.global.b32 [%rd8], %r7;
$L__END:
"""


def last_program(code, seed=0):
    """Seven programs write their parts; the last to arrive adds them. Its counts and sums."""
    parts, counter, sums = words(7 * 32), words(1), words(32)
    counts = run(code, parts, counter, sums, programs=7, shared=4, seed=seed)
    return counts, sums, counter


def test_the_last_program_sees_what_the_others_released():
    code = PARTIAL + BARRIER + ARRIVE.format(order="acq_rel") + SUM
    last = set()
    for seed in range(8):
        counts, sums, counter = last_program(code, seed)
        assert counter[0] == 7
        assert sums.tolist() == [7 * (31 - i) + 32 * 21 for i in range(32)]
        last.add(counts.last)
    assert len(last) > 2  # another one each time


@pytest.mark.parametrize(
    ("barrier", "order"),
    [("", "acq_rel"), (BARRIER, "relaxed"), (BARRIER, "acquire"), (BARRIER, "release")],
)
def test_what_was_not_released_or_acquired_is_a_race(barrier, order):
    for seed in range(8):
        with report("race: thread ", " comes to bytes written by thread ", "ld.global.b32"):
            last_program(PARTIAL + barrier + ARRIVE.format(order=order) + SUM, seed)


def test_two_programs_write_the_same():
    with report("race: thread 0 of program ", " write to the same bytes", "st.global"):
        run(ONE_WORD + "st.global.b32 [%rd9], %r0;", np.zeros(32, u32),
            programs=2)  # fmt: skip


def test_an_endless_loop(monkeypatch):
    monkeypatch.setattr("ptx.schedule.MOST_BLOCKS", 100)
    with report("snippet does not end"):
        run("$L__LOOP:\nbra $L__LOOP;")


def test_counts_of_a_launch():
    """The last program waits for its atomic's loads: one step a round, as each round adds."""
    counts, _, _ = last_program(PARTIAL + BARRIER + ARRIVE.format(order="acq_rel") + SUM)
    others = np.delete(np.arange(7), counts.last)
    assert counts.load_steps[counts.last] == 7
    assert counts.load_steps[others].tolist() == [0] * 6
    assert len(set(counts.instructions[others])) == 1
    assert counts.instructions[counts.last] == counts.instructions[others[0]] + 2 + 7 * 8 + 2
    assert counts.sectors_per_request(loads=True) == counts.sectors_per_request(loads=False) == 4


def test_loads_that_do_not_wait_for_each_other_are_one_step():
    data = np.arange(64, dtype=u64)
    loads = "ld.global.b32 %r1, [%rd0];\nld.global.b32 %r2, [%rd0 + 8];\nadd.s32 %r3, %r1, %r2;\n"
    assert run(loads, data).load_steps.tolist() == [1]
    assert run(loads + "add.s32 %r4, %r2, %r2;", data).load_steps.tolist() == [1]
    apart = loads.replace("%r1, %r2;", "%r1, %r1;") + "add.s32 %r4, %r2, %r2;"
    assert run(apart, data).load_steps.tolist() == [1]
    assert run(loads + loads.replace("%rd0", "%rd1"), data, data.copy()).load_steps.tolist() == [2]
    chain = "ld.global.b64 %rd8, [%rd0];\nadd.s64 %rd8, %rd0, %rd8;\nld.global.b64 %rd9, [%rd8];\n"
    assert run(chain + "mov.b64 %rd7, %rd9;", data).load_steps.tolist() == [2]


@pytest.mark.parametrize(("stride", "sectors"), [(4, 4), (8, 8), (32, 32), (64, 32), (0, 1)])
def test_sectors_of_a_request(stride, sectors):
    code = f"mad.wide.u32 %rd9, %r0, {stride}, %rd0;\nld.global.b32 %r1, [%rd9];"
    assert run(code, words(600)).sectors_per_request(loads=True) == sectors
