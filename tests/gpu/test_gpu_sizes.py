"""Sizes that fit no CPU test: more than 2^31 elements, offsets past 2^31, noise by the 10^8."""

import math

import numpy as np
import pytest
import torch

import vaekl
from vaekl.backends import layout as geometry
from vaekl.reference import SEED_OFFSET, normal, philox4x32, to_numpy
from vaekl.testing import EPS_BUDGET, KL_BUDGET, make_inputs, unit, worst

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]
SEED = 0x1234_5678_9ABC
F32, BF16 = torch.float32, torch.bfloat16


def need_memory(count):
    """Skip where fewer bytes than `count` are free."""
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    if free < count:
        pytest.skip(f"needs {count / 2**30:.0f} GiB of device memory, {free / 2**30:.0f} are free")


def noise_at(seed, rows, cols, event):
    """The oracle's eps at rows x cols of a batch of any size, as ``reference.normal`` has it."""
    group = rows[:, None] * -(-event // 4) + cols[None, :] // 4
    counter = np.zeros((*group.shape, 4), dtype=np.uint32)
    counter[..., 2] = group & 0xFFFFFFFF
    counter[..., 3] = group >> 32
    words = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32)).astype(np.float64)
    first = np.where(cols % 4 < 2, 0, 2) + np.zeros_like(group)
    radius_word = np.take_along_axis(words, first[..., None], -1)[..., 0]
    angle_word = np.take_along_axis(words, first[..., None] + 1, -1)[..., 0]
    radius = np.sqrt(-2 * np.log((radius_word + 0.5) / 2**32))
    angle = 2 * np.pi * angle_word / 2**32
    return radius * np.where(cols % 2 == 0, np.cos(angle), np.sin(angle))


def exact_sums(mu, logvar):
    """(sum of all KLs, column means of mu, of logvar) in float64, a few rows at a time."""
    batch, event = mu.shape
    total = torch.zeros((), dtype=torch.float64, device=mu.device)
    sums = torch.zeros(2, event, dtype=torch.float64, device=mu.device)
    for start in range(0, batch, step := max(1, 2**25 // event)):
        m, v = (t[start : start + step].double() for t in (mu, logvar))
        total += 0.5 * (m * m + torch.expm1(v) - v).sum()
        sums += torch.stack([m.sum(0), v.sum(0)])
    return total.item(), *(to_numpy(s) / batch for s in sums)


def around_the_edges(batch, event):
    """Rows and columns to look at: the first, the last, and where flat offsets pass 2^31."""
    row, col = divmod(2**31, event)
    rows = {0, 1, row - 1, row, row + 1, batch - 2, batch - 1}
    cols = {c + d for c in (0, event // 2, col, event) for d in range(-40, 41)}
    return (
        np.array(sorted(r for r in rows if 0 <= r < batch)),
        np.array(sorted(c for c in cols if 0 <= c < event)),
    )


def check_large(shape, device):
    """Forward and backward in bfloat16: both KLs as a whole, tensors where it is interesting."""
    batch, event = shape
    # The second axis of a CUDA grid ends at 65535; row ranges are capped far below it.
    assert geometry.grid(batch, event, geometry.current_config()).ranges < 65536
    mu = torch.randn(shape, dtype=BF16, device=device).add_(0.5)
    logvar = torch.randn(shape, dtype=BF16, device=device).mul_(0.5)
    total, mean_mu, mean_logvar = exact_sums(mu, logvar)
    mu.requires_grad_()
    logvar.requires_grad_()
    z, kl, kl_of_mean = vaekl.reparameterize_kl(mu, logvar, seed=SEED, backend="triton")
    dz = torch.randn(shape, dtype=BF16, device=device)
    g = torch.full((), float(batch), device=device)  # so that 1 / B leaves terms that show
    dmu, dlogvar = torch.autograd.grad((z, kl, kl_of_mean), (mu, logvar), (dz, g, g))

    # Sums of 10^9 terms in float32: some units more than a row's.
    assert kl.item() == pytest.approx(total / batch, rel=4 * KL_BUDGET[F32])
    exact = np.sum(0.5 * (mean_mu**2 + np.expm1(mean_logvar) - mean_logvar))
    slope = np.sum(np.abs(mean_mu) + 0.5 * np.abs(np.expm1(mean_logvar)))
    assert abs(kl_of_mean.item() - exact) <= KL_BUDGET[F32] * exact + 8 * unit(F32) * slope

    rows, cols = around_the_edges(batch, event)
    pick = torch.as_tensor(cols, device=device)
    m, v, z, dz, dmu, dlogvar = (
        to_numpy(torch.stack([t[int(r)][pick] for r in rows]))
        for t in (mu.detach(), logvar.detach(), z.detach(), dz, dmu, dlogvar)
    )
    std, eps = np.exp(0.5 * v), noise_at(SEED, rows, cols, event)
    assert worst(z, m + std * eps, 2 * unit(BF16) * (abs(m) + abs(std * eps)) + 2e-6 * std) <= 1
    terms = [dz, m, np.broadcast_to(mean_mu[cols], m.shape)]
    assert worst(dmu, sum(terms), bound(terms)) <= 1
    terms = [0.5 * dz * std * eps, 0.5 * np.expm1(v)]
    terms.append(np.broadcast_to(0.5 * np.expm1(mean_logvar[cols]), m.shape))
    drawn = 0.5 * abs(dz) * std * EPS_BUDGET[F32]
    assert worst(dlogvar, sum(terms), bound(terms) + drawn) <= 1


def bound(terms):
    """As vaekl.testing.gradient_bounds: 8 units on every term, one ulp of what is stored."""
    return 8 * unit(F32) * (1 + sum(map(abs, terms))) + 2 * unit(BF16) * abs(sum(terms))


@pytest.mark.parametrize("shape", [(2**22 + 5, 520), (65, 2**25 + 8)], ids=["tall", "wide"])
def test_more_than_2_31_elements(shape, device):
    assert math.prod(shape) > 2**31
    need_memory(6 * 2 * math.prod(shape) + 4 * 2**30)
    check_large(shape, device)


def test_strides_past_2_31(device):
    """Few elements, far apart: the same bits as from a contiguous copy."""
    need_memory(2 * 2**31 + 2**30)
    values, logvar = make_inputs((3, 70), dtype=BF16, device=device)
    storage = torch.zeros(2**31 + 2**20, dtype=BF16, device=device)
    far = storage.as_strided((3, 70), (2**30 + 2**18, 1)).copy_(values)
    results = []
    for mu in (far, values):
        leaves = [mu.requires_grad_(), logvar.detach().requires_grad_()]
        out = vaekl.reparameterize_kl(*leaves, seed=SEED, backend="triton")
        gradients = torch.autograd.grad(out.z.sum() + out.kl + out.kl_of_mean, leaves)
        results.append((*out, *gradients))
    for a, b in zip(*results):
        assert torch.isfinite(a).all()
        assert torch.equal(a, b)


def drawn(rows, cols, dtype, seed, device):
    """eps itself: z for mu = logvar = 0."""
    zero = torch.zeros((), dtype=dtype, device=device).expand(rows, cols)
    return vaekl.reparameterize(zero, zero, seed=seed, backend="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ten_million_draws_equal_the_oracles(dtype, device):
    """Ten seeds of a million; the device's own log, sine and cosine, all lanes, no sampling."""
    for seed in range(10):
        error = to_numpy(drawn(1000, 1000, dtype, SEED + seed, device))
        error -= normal(SEED + seed, SEED_OFFSET, 1000, 1000)
        assert np.max(np.abs(error)) <= EPS_BUDGET[dtype]


def test_a_hundred_million_draws_are_normal(device):
    """Moments within 5 standard errors, Kolmogorov-Smirnov at p = 1e-4, the tails' size."""
    eps = drawn(10**4, 10**4, torch.float32, SEED, device)
    n = eps.numel()
    powers, bins = torch.zeros(4, dtype=torch.float64), torch.zeros(2**16, dtype=torch.int64)
    tail = 0
    for chunk in eps.flatten().chunk(10):
        chunk = chunk.double()
        powers += torch.stack([(chunk**k).sum() for k in (1, 2, 3, 4)]).cpu()
        rank = (torch.special.ndtr(chunk) * 2**16).long().clamp_(max=2**16 - 1)
        bins += torch.bincount(rank, minlength=2**16).cpu()
        tail += int((chunk.abs() > 5).sum())
    for power, moment, variance in zip(powers / n, (0, 1, 0, 3), (1, 2, 15, 96)):
        assert abs(power - moment) < 5 * math.sqrt(variance / n)
    # P(sqrt(n) D > 2.2) = 1.2e-4; D is taken at the bins' edges.
    edges = np.arange(1, 2**16 + 1) / 2**16
    assert np.max(np.abs(np.cumsum(bins.numpy()) / n - edges)) < 2.2 / math.sqrt(n)
    expected = n * math.erfc(5 / math.sqrt(2))
    assert abs(tail - expected) < 5 * math.sqrt(expected)
