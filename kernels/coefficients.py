"""Polynomial coefficients, highest power first; plain Python, so that every compiler can read them.

Minimax fits (Lawson's iteration on Chebyshev nodes), rounded to float32; the figure after each is
the largest error of the rounded polynomial, and ``tests/values/test_coefficients.py`` measures it.
"""

from math import factorial, pi

# (e^(r/2) - 1 - r/2) / r^2 on |r| <= 1: relative error 5.5e-8
EXP_F32 = (
    1.552784510749916e-06,
    2.1846928575541824e-05,
    0.0002604203764349222,
    0.002604112261906266,
    0.0208333320915699,
    0.125,
)
# The same in float64: Taylor, relative error 4e-18
EXP_F64 = tuple(0.5 ** (k + 2) / factorial(k + 2) for k in range(14, -1, -1))
# (e^l - 1 - l) / l^2 on |l| <= 1: Taylor, relative error 2.5e-17
PHI_F64 = tuple(1.0 / factorial(k + 2) for k in range(16, -1, -1))
# -2 log(u) for u = (w + 1/2) / 2^32 near 1, as a quadratic in y = w - 2^32 (-2^26 <= y < 0): the
# error of its root is 4.7e-7, half of what lg2.approx leaves where y = -2^26. With 1 - u = t it is
# t (B t + A).
_A, _B = 1.9999481439590454, 1.0131909847259521
LOG_F32 = (_B * 2.0**-64, _B * 2.0**-64 - _A * 2.0**-32, _B * 2.0**-66 - _A * 2.0**-33)
# (log(1 + y) - y + y^2 / 2) / y^3 on sqrt(1/2) <= 1 + y <= sqrt(2), of Cephes' logf: relative
# error 3.6e-9 of log(1 + y)
LN_F32 = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
# log((1 + s) / (1 - s)) / s in s^2, for the same 1 + y = (1 + s) / (1 - s): Taylor, relative error
# 1e-21
LN_F64 = tuple(2.0 / (2 * k + 1) for k in range(12, -1, -1))
# sin(pi x) / x and cos(pi x) in x^2 on |x| <= 0.5: absolute error 1.1e-7 and 8.3e-8
SIN_F32 = (
    0.07765940576791763,
    -0.5982921719551086,
    2.5500776767730713,
    -5.167710304260254,
    3.1415927410125732,
)
COS_F32 = (
    0.2196968048810959,
    -1.3318802118301392,
    4.058412075042725,
    -4.934792995452881,
    0.9999999403953552,
)
# The same in float64: Taylor, truncated below 1e-18
SIN_F64 = tuple((-1) ** k * pi ** (2 * k + 1) / factorial(2 * k + 1) for k in range(11, -1, -1))
COS_F64 = tuple((-1) ** k * pi ** (2 * k) / factorial(2 * k) for k in range(11, -1, -1))
