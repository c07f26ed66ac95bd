"""The noise contract, in NumPy.

Philox4x32-10: Salmon et al. 2011 ("Parallel random numbers: as easy as 1, 2, 3"); Box & Muller
1958.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .arrays import Array

#: Of the key (seed, SEED_OFFSET) that ``seed=`` stands for. No generator of torch gets so far, so
#: that no noise of a seed is among the words that torch draws after ``manual_seed``.
SEED_OFFSET = 2**63


def philox4x32(counter: Array, key: tuple[int, int]) -> Array:
    """Philox4x32-10. counter: uint32 [..., 4]; key: two 32-bit words. Returns uint32 [..., 4]."""
    mask = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    c0, c1, c2, c3 = (np.asarray(counter)[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = key
    for _ in range(10):
        p0 = np.uint64(0xD2511F53) * c0
        p1 = np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (
            (p1 >> shift) ^ c1 ^ np.uint64(k0),
            p1 & mask,
            (p0 >> shift) ^ c3 ^ np.uint64(k1),
            p0 & mask,
        )
        k0 = (k0 + 0x9E3779B9) & 0xFFFFFFFF
        k1 = (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def normal(seed: int, offset: int, batch: int, event: int, sample_ids: Any = None) -> Array:
    """The noise contract: eps [batch, event] of the key (seed, offset), float64.

    Element [b, j] is lane j % 4 of group b * ceil(event / 4) + j // 4. The counter of a group is
    (offset / 4, group) as two 64-bit numbers, low word first; the key is the 64-bit seed. With
    sample_ids, integers of `batch` elements, row b has the noise of the row sample_ids[b].
    """
    groups = (event + 3) // 4
    rows = np.arange(batch) if sample_ids is None else np.reshape(sample_ids, batch)
    group = (rows[:, None] * groups + np.arange(groups)).reshape(-1).astype(np.uint64)
    counter = np.empty((batch * groups, 4), dtype=np.uint32)
    counter[:, 0] = (offset // 4) & 0xFFFFFFFF
    counter[:, 1] = (offset // 4) >> 32
    counter[:, 2] = group & np.uint64(0xFFFFFFFF)
    counter[:, 3] = group >> np.uint64(32)
    words = philox4x32(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)).astype(np.float64)
    lanes = np.empty_like(words)
    for pair in (0, 2):
        radius = np.sqrt(-2.0 * np.log((words[:, pair] + 0.5) / 2.0**32))
        angle = 2.0 * np.pi * words[:, pair + 1] / 2.0**32
        lanes[:, pair] = radius * np.cos(angle)
        lanes[:, pair + 1] = radius * np.sin(angle)
    return lanes.reshape(batch, groups * 4)[:, :event]
