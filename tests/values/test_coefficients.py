"""The polynomials of the kernels are as good as their comments say."""

import math

import numpy as np
from vaekl.kernels import coefficients as c

from vaekl.backends.eager import _PHI_F32


def test_exp():
    r = np.linspace(-1, 1, 4001)
    r = r[np.abs(r) > 1e-3].astype(np.longdouble)
    exact = (np.expm1(r / 2) - r / 2) / r**2
    assert np.max(np.abs(np.polyval(c.EXP_F32, r) / exact - 1)) < 5.5e-8


def test_exp_float64():
    left_out = sum(0.5**k / math.factorial(k) for k in range(17, 40))
    assert left_out / (math.expm1(-0.5) + 0.5) < 4e-18


def test_ln_float64():
    s = (math.sqrt(2) - 1) / (math.sqrt(2) + 1)
    assert sum(2 * s ** (2 * k) / (2 * k + 1) for k in range(13, 40)) / 2 < 1e-21
    assert tuple(2 / k for k in range(25, 0, -2)) == c.LN_F64


def test_eager_phi():
    x = np.linspace(-1, 1, 4001)
    x = x[np.abs(x) > 1e-3].astype(np.longdouble)
    exact = (np.expm1(x) - x) / x**2
    assert np.max(np.abs(np.polyval(_PHI_F32, x) / exact - 1)) < 1e-8


def test_phi():
    assert tuple(1 / math.factorial(k) for k in range(18, 1, -1)) == c.PHI_F64
    left_out = sum(1 / math.factorial(k) for k in range(19, 30))
    assert left_out / (math.exp(-1)) < 2.5e-17


def test_log():
    y = -np.geomspace(1, 2**26, 4001).round()
    radius = np.sqrt(np.polyval(np.float32(c.LOG_F32).astype(float), y))
    assert np.max(np.abs(radius - np.sqrt(-2 * np.log1p((y + 0.5) / 2**32)))) < 4.7e-7


def test_ln():
    y = np.linspace(np.sqrt(0.5) - 1, np.sqrt(2) - 1, 4001)
    log = y - y * y / 2 + y**3 * np.polyval(np.float32(c.LN_F32).astype(float), y)
    far = np.abs(y) > 1e-6
    assert np.max(np.abs(log[far] / np.log1p(y[far]) - 1)) < 3.6e-9


def test_sin_cos():
    x = np.linspace(-0.5, 0.5, 4001)
    assert np.max(np.abs(x * np.polyval(c.SIN_F32, x * x) - np.sin(np.pi * x))) < 1.1e-7
    assert np.max(np.abs(np.polyval(c.COS_F32, x * x) - np.cos(np.pi * x))) < 8.3e-8


def test_sin_cos_float64():
    left_out = [(np.pi / 2) ** n / math.factorial(n) for n in (25, 24)]
    assert left_out[0] < 1e-20
    assert left_out[1] < 1e-18
    x = np.linspace(-0.5, 0.5, 4001)
    assert np.max(np.abs(x * np.polyval(c.SIN_F64, x * x) - np.sin(np.pi * x))) < 1e-15
    assert np.max(np.abs(np.polyval(c.COS_F64, x * x) - np.cos(np.pi * x))) < 1e-15
