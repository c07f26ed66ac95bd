"""Opcodes at their edges, against exact arithmetic."""

import re
from fractions import Fraction

import numpy as np
import pytest

from ptx import PtxError
from ptx.floats import approximate
from ptx.snippets import compute, run

f32, f64, u16, u32, i32, u64 = (
    np.float32, np.float64, np.uint16, np.uint32, np.int32, np.uint64,
)  # fmt: skip
NAN, INF = f32("nan"), f32("inf")


def rounded(exact, dtype):
    """A fraction to the nearest number, ties to even; Python does it for float64."""
    if dtype is f64 or exact == 0:
        return dtype(float(exact))
    exponent = np.frexp(float(abs(exact)))[1] - 1
    exponent -= abs(exact) < Fraction(2) ** int(exponent)  # that may have rounded up
    ulp = Fraction(2) ** int(max(exponent, -126) - 23)
    return dtype(float(round(exact / ulp) * ulp))


def check_fma(a, b, c, dtype):
    a, b, c = (np.array(x, dtype) for x in (a, b, c))
    name, register = {f32: ("f32", "r"), f64: ("f64", "rd")}[dtype]
    found = compute(f"fma.rn.{name} {{to}}, {{0}}, {{1}}, {{2}};", a, b, c, result=register)
    exact = [x * y + z for x, y, z in (map(Fraction, map(float, row)) for row in zip(a, b, c))]
    expected = np.array([rounded(x, dtype) for x in exact])
    np.testing.assert_array_equal(found.view(dtype), expected)


def test_fma_of_float32_rounds_once():
    """A product a little off half an ulp of the sum, by a bit that float64 does not hold."""
    a, b, c = 2.0**-12 * (1 + 2**-23), 2.0**-12 * (1 - 2**-23), 1 + 2**-23
    check_fma([a, -a, a, -a], [b] * 4, [c, c, -c, -c], f32)
    small = 2.0**-63  # the sum is subnormal
    check_fma([a * small, -a * small], [b * small] * 2, [2.0**-127 + 2.0**-149] * 2, f32)
    check_fma([2.0**-80], [2.0**-69], [2.0**-149], f32)
    check_fma([1 + 2**-12] * 3, [1 + 2**-12] * 3, [2.0**30, -(2.0**30), 1], f32)


def test_fma_of_float32_at_random():
    rng = np.random.default_rng(0)
    for scale in (1, 2.0**-75):
        a, b = (rng.standard_normal(32).astype(f32) * f32(scale) for _ in range(2))
        c = (rng.standard_normal(32) * scale * scale * 2.0 ** rng.integers(-2, 26, 32)).astype(f32)
        check_fma(a, b, c, f32)


def test_fma_of_float64_rounds_once():
    check_fma([1 + 2**-52], [1 - 2**-52], [-1], f64)
    check_fma([2.0**-60, -(2.0**-60)], [1 + 2.0**-52] * 2, [1 + 2.0**-52, 1], f64)
    check_fma([1 + 2.0**-27], [1 + 2.0**-26], [2.0**53 + 2], f64)
    rng = np.random.default_rng(1)
    for scale_a, scale_b in (
        (1, 1),
        (1e-150, 1e-153),
        (1e-300, 1e160),
        (1e302, 1e-20),
        (1e150, 1e150),
    ):
        a, b = rng.standard_normal((2, 32)) * [[scale_a], [scale_b]]
        check_fma(a, b, rng.standard_normal(32) * scale_a * scale_b, f64)
        check_fma(a, b, -a * b, f64)  # what rounding the product left out


def test_fma_of_zeros_and_infinities():
    a, b, c = np.array([[0, 1, -0.0], [1, 0, 1], [-0.0, -0.0, -0.0]], f64)
    found = compute("fma.rn.f64 {to}, {0}, {1}, {2};", a, b, c, result="rd").view(f64)
    assert np.signbit(found).tolist() == [False, False, True]
    found = compute(
        "fma.rn.f32 {to}, {0}, {1}, {2};", *np.array([[INF, INF], [0, 1], [1, -INF]], f32)
    )
    found = found.view(f32)
    assert np.isnan(found).all()


def test_bfloat16_rounds_to_even():
    x = np.array([0x3F80_8000, 0x3F81_8000, 0x3F80_8001, 0x7F7F_FFFF, 0xFF80_0001], u32)
    found = compute("cvt.rn.bf16.f32 {to}, {0};", x.view(f32), result="rs")
    assert found.tolist() == [0x3F80, 0x3F82, 0x3F81, 0x7F80, 0x7FFF]
    high, low = np.array([1, 2], f32), np.array([3, NAN], f32)
    found = compute("cvt.rn.bf16x2.f32 {to}, {0}, {1};", high, low)
    assert found.tolist() == [0x3F80_4040, 0x4000_7FFF]
    assert compute("cvt.f32.bf16 {to}, {0};", np.array([0x3F81], u16)).tolist() == [0x3F81_0000]


def test_a_half_and_a_float32_are_rounded_once():
    half = np.array([0x3F81], u16)  # 1 + 2^-7
    found = compute("fma.rn.f32.bf16 {to}, {0}, {0}, {1};", half, np.array([2.0**-24], f32))
    assert found.view(f32)[0] == f32((1 + 2**-7) ** 2)
    found = compute("add.rn.f32.f16 {to}, {0}, {1};", np.array([0x0001], u16), np.array([1], f32))
    assert found.view(f32)[0] == f32(1 + 2.0**-24)


def test_subnormals():
    """Kept, but by what says ftz."""
    tiny = np.array([2.0**-140, -(2.0**-140), 2.0**-126], f32)
    assert (compute("add.f32 {to}, {0}, {0};", tiny).view(f32) == 2 * tiny).all()
    found = compute("abs.ftz.f32 {to}, {0};", tiny).view(f32)
    assert found.tolist() == [0, 0, 2.0**-126]
    assert compute("sqrt.approx.ftz.f32 {to}, {0};", tiny[:1]).view(f32).tolist() == [0]
    assert compute("lg2.approx.ftz.f32 {to}, {0};", tiny[:1]).view(f32).tolist() == [-INF]


def test_nan_in_comparisons_and_extrema():
    x, y = np.array([1, NAN, NAN, 2], f32), np.array([2, 1, NAN, 1], f32)
    for name, expected in {
        "lt": [1, 0, 0, 0], "ltu": [1, 1, 1, 0], "eq": [0, 0, 0, 0], "equ": [0, 1, 1, 0],
        "ne": [1, 0, 0, 1], "neu": [1, 1, 1, 1], "nan": [0, 1, 1, 0], "num": [1, 0, 0, 1],
    }.items():  # fmt: skip
        code = f"setp.{name}.f32 %p1, {{0}}, {{1}};\nselp.b32 {{to}}, 1, 0, %p1;"
        assert compute(code, x, y).tolist() == expected, name
    halves = np.array([0x7FC0, 0x3F80], u16), np.array([0x3F80, 0x4000], u16)
    code = "setp.lt.bf16 %p1, {0}, {1};\nselp.b32 {to}, 1, 0, %p1;"
    assert compute(code, *halves).tolist() == [0, 1]
    both = (
        np.array([0x3F80_7FC0, 0x4000_3F80], np.uint32),
        np.array([0x4000_3F80, 0x3F80_4000], np.uint32),
    )
    for half, expected in (("%p1", [0, 1]), ("%p2", [1, 0])):
        code = f"setp.lt.bf16x2 %p1|%p2, {{0}}, {{1}};\nselp.b32 {{to}}, 1, 0, {half};"
        assert compute(code, *both).tolist() == expected
    zeros = np.array([0, -0.0], f32)
    assert compute("min.f32 {to}, {0}, {1};", zeros, zeros[::-1]).tolist() == [0x8000_0000] * 2
    assert compute("max.f32 {to}, {0}, {1};", zeros, zeros[::-1]).tolist() == [0, 0]
    assert compute("min.f32 {to}, {0}, {1};", x, y).view(f32).tolist()[:2] == [1, 1]
    assert (
        np.isnan(compute("max.NaN.f32 {to}, {0}, {1};", x, y).view(f32)).tolist()[1:3] == [True] * 2
    )


def test_bytes_are_permuted_and_signs_copied():
    x, y = np.array([0x8391_A2B3], u32), np.array([0x4455_E677], u32)
    for selector, expected in {"0x7531": 0x44E6_83A2, "0x0123": 0xB3A2_9183,
                               "0xfb80": 0x00FF_FFB3, "0xedc4": 0x00FF_0077}.items():  # fmt: skip
        found = compute(f"prmt.b32 {{to}}, {{0}}, {{1}}, {selector};", x, y)
        assert f"{found[0]:08x}" == f"{expected:08x}", selector


@pytest.mark.parametrize("amount", [0, 1, 15, 16, 31, 32, 40, 63, 64, 70, 2**31])
@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_shifts_are_clamped(kind, amount):
    bits, signed = int(kind[1:]), kind[0] == "s"
    register = {16: "rs", 32: "r", 64: "rd"}[bits]
    value = -0x5A5A if signed else (1 << bits) - 0x5A5A
    x = np.array([value], f"{'i' if signed else 'u'}{bits // 8}")
    amounts = np.array([amount], u32)
    modulo = 1 << bits
    found = compute(f"shr.{kind} {{to}}, {{0}}, {{1}};", x, amounts, result=register)
    assert found[0] == (value >> min(amount, 100)) % modulo
    found = compute(f"shl.b{bits} {{to}}, {{0}}, {amount};", x, result=register)
    assert found[0] == (value << min(amount, 100)) % modulo


def test_a_shift_of_two_words():
    low, high = np.array([0x8765_4321], u32), np.array([0xFEDC_BA98], u32)
    for amount, expected in {
        0: 0xFEDC_BA98,
        4: 0xEDCB_A988,
        31: 0x43B2_A190,
        36: 0xEDCB_A988,
    }.items():
        found = compute(f"shf.l.wrap.b32 {{to}}, {{0}}, {{1}}, {amount};", low, high)
        assert f"{found[0]:08x}" == f"{expected:08x}", amount


def test_integers():
    x, y = np.array([-7, 7, 2**31 - 1], i32), np.array([2, -2, 2**31 - 1], i32)
    found = {op: compute(f"{op} {{to}}, {{0}}, {{1}};", x, y).view(i32).tolist()
             for op in ("div.s32", "rem.s32", "mul.lo.s32", "mul.hi.s32")}  # fmt: skip
    assert found == {"div.s32": [-3, -3, 1], "rem.s32": [-1, 1, 0], "mul.lo.s32": [-14, -14, 1],
                     "mul.hi.s32": [-1, -1, 2**30 - 1]}  # fmt: skip
    high = compute("mul.hi.u32 {to}, {0}, {0};", np.array([2**32 - 1], u32))
    assert high.tolist() == [2**32 - 2]
    wide = compute("mul.wide.s32 {to}, {0}, {1};", x, y, result="rd").view(np.int64)
    assert wide.tolist() == [-14, -14, (2**31 - 1) ** 2]
    assert compute("cvt.s64.s32 {to}, {0};", x, result="rd").view(np.int64).tolist() == x.tolist()
    assert compute("cvt.u64.u32 {to}, {0};", x[:1], result="rd").tolist() == [2**32 - 7]
    assert compute("bfe.u32 {to}, {0}, 4, 8;", np.array([0xABCD], u32)).tolist() == [0xBC]
    found = compute("bfe.s32 {to}, {0}, 4, 8;", np.array([0xABCD], u32)).view(i32)
    assert found.tolist() == [-0x44]
    assert compute("bfe.s32 {to}, {0}, 24, 16;", x[:1]).view(i32).tolist() == [-1]


def test_words_are_taken_apart_and_put_together():
    x = np.array([0x0123_4567_89AB_CDEF], u64)
    assert compute("mov.b64 {{{to}, _}}, {0};", x).tolist() == [0x89AB_CDEF]
    code = "{{ .reg .b32 tmp; mov.b64 {{tmp, {to}}}, {0}; }}"
    assert compute(code, x).tolist() == [0x0123_4567]
    pair = np.array([2], u32), np.array([1], u32)
    found = compute("mov.b64 {to}, {{{0}, {1}}};", *pair, result="rd")
    assert found.tolist() == [2**32 + 2]
    packed = np.array([1, 2], f32).view(u64)
    found = compute("fma.rn.f32x2 {to}, {0}, {0}, {0};", packed, result="rd")
    assert found.view(f32).tolist() == [2, 6]


def test_approximations_stay_within_what_is_documented(monkeypatch):
    x = np.linspace(0.01, 30, 32, dtype=f32)
    exact = np.sqrt(x.astype(f64))
    assert (compute("sqrt.approx.ftz.f32 {to}, {0};", x).view(f32) == exact.astype(f32)).all()
    monkeypatch.setattr(approximate, "errors", 0)
    found = compute("sqrt.approx.ftz.f32 {to}, {0};", x).view(f32)
    assert (found != exact.astype(f32)).any()
    assert (np.abs(found - exact) <= exact * (2.0**-23 + 2.0**-24)).all()
    found = compute("lg2.approx.ftz.f32 {to}, {0};", x).view(f32)
    exact = np.log2(x.astype(f64))
    assert (np.abs(found - exact) <= 2.0**-22 * np.maximum(np.abs(exact), 1) * 1.5).all()


@pytest.mark.parametrize("code", ["tanh.approx.f32 %r1, %r2;", "fma.rz.f32 %r1, %r2, %r2, %r2;",
                                  "ld.volatile.global.b32 %r1, [%rd1];", "bar.sync 1;",
                                  "@%p1 bar.sync 0;", "ld.global.b8 %rs1, [%rd1];",
                                  "atom.global.cta.acq_rel.add.u32 %r1, [%rd1], 1;"])  # fmt: skip
def test_an_unknown_instruction_is_an_error(code):
    """Though nothing would execute it."""
    message = f"unknown instruction.*{re.escape(code[:-1])}.*line 13 of the PTX"
    with pytest.raises(PtxError, match=message):
        run(f"bra $L__END;\n{code}\n$L__END:")
