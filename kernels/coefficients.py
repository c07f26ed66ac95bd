"""Polynomial coefficients, highest power first; plain Python, so that every compiler can read them.

Minimax fits (Lawson's iteration on Chebyshev nodes), rounded to float32; the figure after each is
the largest error of the rounded polynomial. ``tests/test_coefficients.py`` measures them again.
"""

from math import factorial

# (e^r - 1 - r) / r^2 on |r| <= 0.5: relative error 5.5e-8
EXP_F32 = (
    0.00019875641737598926,
    0.0013982034288346767,
    0.008333452045917511,
    0.04166579619050026,
    0.1666666567325592,
    0.5,
)
# (e^l - 1 - l) / l^2 on |l| <= 1: Taylor, relative error 2.5e-17
PHI_F64 = tuple(1.0 / factorial(k + 2) for k in range(16, -1, -1))
# -2 log(1 - t) / t on 0 <= t <= 1/16: relative error 5.4e-8
LOG_F32 = (0.5538990497589111, 0.6645095348358154, 1.0000272989273071, 2.0)
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
