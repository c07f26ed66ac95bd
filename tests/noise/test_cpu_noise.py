"""The cpu kernels' noise of words and counters that a test's batches do not reach."""

import numpy as np
import pytest
import torch
from numba import njit
from vaekl.kernels.cpu import philox as kernel

from vaekl.reference import philox4x32
from vaekl.testing import EPS_BUDGET

# 0 and 1/2 from both sides, where ln changes its interval, and the ends of a quarter turn.
EXTREME = np.array(
    [0, 1, 2**32 - 1, 2**32 - 2, 2**31, 2**31 - 1, 2**31 + 1, 2**30, 3 * 2**30,
     0xB504F333, 0xB504F334, 0xFC000000, 0xFBFFFFFF], dtype=np.uint32
)  # fmt: skip


@njit
def pairs(radius_words, angle_words, cosines, sines):
    kernel.pairs(radius_words, angle_words, cosines, sines)


@njit
def philox(seed, offset, first, w0, w1, w2, w3):
    kernel.philox(kernel.Key(seed, offset, 0, 0), first, (w0, w1, w2, w3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normals_of_extreme_words(dtype):
    random = np.random.default_rng(0).integers(0, 2**32, (2, 100_000), dtype=np.uint32)
    radius_words = np.concatenate([np.repeat(EXTREME, len(EXTREME)), random[0]])
    angle_words = np.concatenate([np.tile(EXTREME, len(EXTREME)), random[1]])
    cosines, sines = np.empty((2, len(radius_words)), str(dtype).removeprefix("torch."))
    pairs(radius_words.view(np.int32), angle_words.view(np.int32), cosines, sines)
    radius = np.sqrt(-2 * np.log((radius_words + 0.5) / 2**32))
    angle = 2 * np.pi * (angle_words / 2**32)
    assert np.max(np.abs(cosines - radius * np.cos(angle))) <= EPS_BUDGET[dtype]
    assert np.max(np.abs(sines - radius * np.sin(angle))) <= EPS_BUDGET[dtype]


@pytest.mark.parametrize(
    ("seed", "offset", "first"),
    [(7, 2**62 + 2**34 + 8, 0), (-1, 8 - 2**62, 5), (2**40 + 7, 0, 2**34 + 2), (7, 4, 2**32 - 2)],
)
def test_all_64_bits_of_a_counter(seed, offset, first):
    words = np.empty((4, 4), np.int32)
    philox(seed, offset, first, *words)
    counters = []
    for group in range(first, first + 4):
        numbers = (offset % 2**64 >> 2, group)
        counters.append([half for n in numbers for half in (n & 0xFFFFFFFF, n >> 32)])
    key = (seed & 0xFFFFFFFF, seed % 2**64 >> 32)
    expected = philox4x32(np.array(counters, dtype=np.uint32), key)
    assert np.array_equal(words.T.view(np.uint32), expected)
