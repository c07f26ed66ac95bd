"""The contract of docs/noise.md: known answers, every backend against the oracle, statistics."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from vaekl.kernels.philox import normal_tile, pair

import vaekl
from storages import PACKED, PAIR
from vaekl import _noise, _plans
from vaekl._spec import Key, Source
from vaekl.backends import layout as geometry
from vaekl.reference import SEED_OFFSET, normal, philox4x32, to_numpy
from vaekl.testing import EPS_BUDGET, make_inputs

SEEDS = [0, 1, -1, 2**63 + 5, 0x0123_4567_89AB_CDEF]
DTYPES = [torch.float32, torch.float64]
FUSED = {"enable_fp_fusion": True}  # as the backend launches; Triton 3.9 warns where it is not said
#: eps [2, 3] of seeds: words of Philox4x32-10 at counter (0, 2^29, group, 0), by Box-Muller.
KNOWN_NOISE = {
    0: [
        -0.240986173138,
        -1.884174041264,
        -0.650280629120,
        -0.798279289258,
        -0.759152991288,
        0.694296304290,
    ],
    -1: [
        -0.605808956367,
        -0.510080037256,
        1.098414233248,
        0.543021622150,
        0.699508892333,
        1.718989571803,
    ],
    2**40 + 3: [
        -0.670934714198,
        0.839212839470,
        1.310556209725,
        1.154435677297,
        0.208335077763,
        0.034151762077,
    ],
}


def drawn(shape, *, backend, dtype=torch.float32, device="cpu", **noise):
    """eps itself: z for mu = logvar = 0."""
    zero = torch.zeros(shape, dtype=dtype, device=device)
    return vaekl.reparameterize(zero, zero, backend=backend, **noise)


@triton.jit
def tile_kernel(
    p_out, seed: tl.int64, offset: tl.int64, first_row, D, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """normal_tile as the kernels call it, for keys and rows that no launcher would reach."""
    o_row = first_row + tl.arange(0, ROWS)
    if WIDE:
        o_row = o_row.to(tl.int64)
    b_eps = normal_tile(seed, offset, o_row, 0, D, 1, DTYPE, ROWS, COLS)
    o_out = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    tl.store(p_out + o_out, b_eps)


def tile(seed, offset, first_row, rows, cols, device, dtype=torch.float32, wide=False):
    out = torch.empty(rows, cols, dtype=dtype, device=device)
    kind = tl.float64 if dtype == torch.float64 else tl.float32
    tile_kernel[(1,)](out, seed, offset, first_row, cols, kind, rows, cols, wide, **FUSED)
    return to_numpy(out)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter, key, words):
    """Random123's test vectors (Salmon et al. 2011, kat_vectors)."""
    assert tuple(philox4x32(np.array(counter, dtype=np.uint32), key)) == words


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_seed_gives_the_oracles_noise(seed, dtype, backend, config, device):
    eps = drawn((6, 13), backend=backend, dtype=dtype, device=device, seed=seed)
    assert np.max(np.abs(to_numpy(eps) - normal(seed, SEED_OFFSET, 6, 13))) <= EPS_BUDGET[dtype]


def test_known_answers_of_seeds(backend, device):
    """What seed= means, as numbers: the same on every device and in every release."""
    for seed, answers in KNOWN_NOISE.items():
        eps = drawn((2, 3), backend=backend, dtype=torch.float64, device=device, seed=seed)
        np.testing.assert_allclose(to_numpy(eps).ravel(), answers, rtol=0, atol=2e-12)


def test_seeds_share_no_words_with_torchs_generators(backend, device):
    """torch's CUDA generator counts (offset / 4, thread) from 0 under the key seed, as Philox4x32
    in curand does: nothing drawn after manual_seed(s) may come back as noise of seed=s."""
    eps = to_numpy(drawn((64, 64), backend=backend, dtype=torch.float64, device=device, seed=42))
    for offset in (0, 4, 8, 400):
        of_torch = normal(42, offset, 64, 64)
        assert abs(np.corrcoef(eps.ravel(), of_torch.ravel())[0, 1]) < 5 / 64
        assert abs(np.corrcoef(eps.ravel() ** 2, of_torch.ravel() ** 2)[0, 1]) < 5 / 64
    cpu = _noise.draw_key(torch.device("cpu"), Source(torch.Generator().manual_seed(42)))
    for _, offset, _ in (cpu, _noise.draw_key(torch.device("cuda", 0), Source(seed=42))):
        assert offset % 2**64 == SEED_OFFSET == 2**63


class DeviceGenerator:
    """A CUDA generator's counters."""

    def __init__(self):
        self.offset = 8

    def initial_seed(self):
        return 2**63 + 1

    def get_offset(self):
        return self.offset

    def set_offset(self, offset):
        self.offset = offset


def test_a_device_generator_gives_its_key_and_moves_on(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    generator, device = DeviceGenerator(), torch.device("cuda", 0)
    keys = [_noise.draw_key(device, Source(generator)) for _ in range(3)]
    assert keys == [(1 - 2**63, offset, None) for offset in (8, 12, 16)]
    monkeypatch.setattr(torch.cuda, "default_generators", [generator])
    assert _noise.draw_key(device, Source()) == (1 - 2**63, 20, None)


class SharedGenerator(DeviceGenerator):
    """As torch 2.14's: after a look at the offset a kernel of another thread draws from there."""

    def __init__(self):
        super().__init__()
        self.others = []

    def get_offset(self):
        self.others.append(self.offset)
        return self.offset

    def philox_state(self, increment):
        words = self.initial_seed() - 2**64, self.offset, 0
        self.offset += increment
        return tuple(torch.tensor([word]) for word in words)


def test_a_key_is_drawn_in_one_step_where_torch_has_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    generator, device = SharedGenerator(), torch.device("cuda", 0)
    keys = [_noise.draw_key(device, Source(generator)) for _ in range(3)]
    assert keys == [(1 - 2**63, offset, None) for offset in (8, 12, 16)]
    assert generator.offset == 20
    assert not {offset for _, offset, _ in keys} & set(generator.others)


@pytest.mark.parametrize("offset", [4, 2**33, 2**62 + 2**34 + 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_word_of_the_counter(offset, dtype, device):
    """Offsets and rows that need their high words, in the kernel and in eager's twin."""
    expected = normal(7, offset, 4, 8)
    assert np.max(np.abs(tile(7, offset, 0, 4, 8, device, dtype) - expected)) <= EPS_BUDGET[dtype]
    words = torch.tensor([7, offset], device=device)
    twin = _noise.philox_normal(Key(0, 0, words), (4, 8), dtype, torch.device(device))
    assert np.max(np.abs(to_numpy(twin) - expected)) <= EPS_BUDGET[dtype]


def test_the_offset_is_unsigned(device):
    """An int64 with its highest bit set: the kernel and eager's twin count alike."""
    offset = -(2**62) + 8
    words = torch.tensor([7, offset], device=device)
    twin = _noise.philox_normal(Key(0, 0, words), (4, 8), torch.float64, torch.device(device))
    kernel = tile(7, offset, 0, 4, 8, device, torch.float64)
    assert np.max(np.abs(to_numpy(twin) - kernel)) <= EPS_BUDGET[torch.float64]


def test_groups_past_32_bits(device):
    """Row 2^33 of an event of 8: the group index has a high word."""
    row = 2**33 + 1
    group = np.array([2 * row, 2 * row + 1], dtype=np.uint64)
    counter = np.zeros((2, 4), dtype=np.uint32)
    counter[:, 2] = group & np.uint64(0xFFFFFFFF)
    counter[:, 3] = group >> np.uint64(32)
    words = philox4x32(counter, (7, 0)).astype(np.float64)
    radius = np.sqrt(-2 * np.log((words[:, ::2] + 0.5) / 2**32))
    angle = 2 * np.pi * words[:, 1::2] / 2**32
    expected = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1).reshape(8)
    actual = tile(7, 0, row, 1, 8, device, wide=True)[0]
    assert np.max(np.abs(actual - expected)) <= EPS_BUDGET[torch.float32]


def test_block_sizes_do_not_matter(device):
    shape = (9, 22)
    whole = drawn(shape, backend="triton", device=device, seed=3)
    for config in (
        geometry.Config(tile=16, max_cols=4, small=0, programs=6),
        geometry.Config(tile=64, max_cols=32, small=0, programs=64),
        geometry.Config(threads=32),
    ):
        with _plans.use_config(config):
            assert torch.equal(drawn(shape, backend="triton", device=device, seed=3), whole)


def test_strides_do_not_matter(backend, device):
    shape = (4, 3, 2, 5)
    whole = drawn(shape, backend=backend, device=device, seed=3)
    zero = torch.zeros(shape, device=device).to(memory_format=torch.channels_last)
    assert torch.equal(vaekl.reparameterize(zero, zero, seed=3, backend=backend), whole)
    flat = drawn((4, 30), backend=backend, device=device, seed=3)
    assert torch.equal(flat.view(shape), whole)


def test_slices_of_rows_can_be_drawn_apart(backend, device):
    whole = drawn((8, 10), backend=backend, device=device, seed=3)
    assert torch.equal(drawn((3, 10), backend=backend, device=device, seed=3), whole[:3])
    if backend == "triton":
        rows = tile(3, 0, 4, 4, 16, device)
        assert np.max(np.abs(rows - normal(3, 0, 8, 16)[4:])) <= EPS_BUDGET[torch.float32]


#: Backend and shape; 10^6 draws for each test, and 10^8 at length where a program is fast.
SAMPLES = [
    pytest.param(("triton", 2**10, 2**10), id="triton"),
    pytest.param(("cpu", 2**10, 2**10), id="cpu"),
    pytest.param(("cpu", 25000, 4096), id="cpu-long", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module", params=SAMPLES)
def draws(request):
    """Two samples of a kernel's noise, of two seeds; one program under Triton's interpreter."""
    backend, rows, cols = request.param
    if backend == "cpu":
        pytest.importorskip("numba")
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    one = geometry.Config(tile=2**20, max_cols=2**10, small=2**21)
    with _plans.use_config(one if triton.knobs.runtime.interpret else geometry.Config()):
        zero = torch.zeros((), device=device).expand(rows, cols)
        return [
            to_numpy(vaekl.reparameterize(zero, zero, seed=s, backend=backend)) for s in (21, 22)
        ]


def test_kernel_equals_oracle_over_a_million_draws(draws):
    rows = 2**20 // draws[0].shape[1]
    error = np.abs(draws[0][:rows] - normal(21, SEED_OFFSET, rows, draws[0].shape[1]))
    assert np.max(error) <= EPS_BUDGET[torch.float32]


def test_moments(draws):
    """The first four, each within 5 standard errors."""
    for eps in draws:
        n = eps.size
        assert abs(eps.mean()) < 5 / np.sqrt(n)
        assert abs(np.mean(eps**2) - 1) < 5 * np.sqrt(2 / n)
        assert abs(np.mean(eps**3)) < 5 * np.sqrt(15 / n)
        assert abs(np.mean(eps**4) - 3) < 5 * np.sqrt(96 / n)


def test_distribution(draws):
    """Kolmogorov-Smirnov over all draws and for each lane; the tail beyond 4 sigma."""
    stats = pytest.importorskip("scipy.stats")
    for eps in draws:
        assert stats.kstest(eps.ravel(), "norm").pvalue > 1e-4
        for lane in range(4):
            assert stats.kstest(eps[:, lane::4].ravel(), "norm").pvalue > 1e-4
        tail = np.sum(np.abs(eps) > 4)
        assert stats.binomtest(int(tail), eps.size, 2 * stats.norm.sf(4)).pvalue > 1e-4


def test_no_correlation(draws):
    """Between lanes, neighbouring columns, neighbouring rows, squares of a pair, and two calls."""
    a, b = draws
    pairs = [(a[:, i::4], a[:, j::4]) for i in range(4) for j in range(i)]
    pairs += [
        (a[:, 0::4] ** 2 - 1, a[:, 1::4] ** 2 - 1),
        (a[:, 2::4] ** 2 - 1, a[:, 3::4] ** 2 - 1),
    ]
    pairs += [(a[:, :-1], a[:, 1:]), (a[:, :-4], a[:, 4:]), (a[:-1], a[1:]), (a, b)]
    for x, y in pairs:
        limit = 5 / np.sqrt(x.size)
        assert abs(np.corrcoef(x.ravel(), y.ravel())[0, 1]) < limit


def test_all_bits_reach_the_tail():
    """Word 0 gives 6.66 sigma; a 24-bit uniform would stop at 5.8. Word 2^32 - 1 is not log 0."""
    words = np.array([0, 2**32 - 1, 2**31, 0xFC000000, 0xFBFFFFFF], dtype=np.uint32)
    radius = np.sqrt(-2 * np.log((words + 0.5) / 2.0**32))
    assert radius[0] > 6.6
    assert np.all(np.isfinite(radius))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out = torch.empty(8, dtype=torch.float32, device=device)
    padded = torch.zeros(8, dtype=torch.int64)
    padded[:5] = torch.from_numpy(words.astype(np.int64))
    padded = torch.where(padded >= 2**31, padded - 2**32, padded).to(device, torch.int32)
    radius_kernel[(1,)](out, padded, **FUSED)
    assert np.max(np.abs(to_numpy(out[:5]) - radius)) <= EPS_BUDGET[torch.float32]


@triton.jit
def radius_kernel(p_out, p_words):
    """The pair at angle 0, whose cosine lane is the radius."""
    o = tl.arange(0, 8)
    b_word = tl.load(p_words + o).to(tl.uint32, bitcast=True)
    b_cos, _ = pair(b_word, tl.zeros_like(b_word), tl.float32)
    tl.store(p_out + o, b_cos)


def test_manual_seed_reproduces_and_calls_differ(backend, device):
    torch.manual_seed(5)
    first, second = (drawn((3, 4), backend=backend, device=device) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(drawn((3, 4), backend=backend, device=device), first)
    assert torch.equal(drawn((3, 4), backend=backend, device=device), second)


def test_generator_is_used_and_nothing_else(backend, device):
    generator = torch.Generator(device).manual_seed(5)
    state = torch.get_rng_state() if device == "cpu" else torch.cuda.get_rng_state()
    first, second = (
        drawn((3, 4), backend=backend, device=device, generator=generator) for _ in range(2)
    )
    assert not torch.equal(first, second)
    after = torch.get_rng_state() if device == "cpu" else torch.cuda.get_rng_state()
    assert torch.equal(after, state)
    generator.manual_seed(5)
    assert torch.equal(drawn((3, 4), backend=backend, device=device, generator=generator), first)


def test_moments_draw_what_two_tensors_draw(backend, device):
    pair = make_inputs((5, 6), device=device)
    for make in (lambda: torch.Generator(device).manual_seed(4), lambda: None):
        draws = []
        for storage in (PAIR, PACKED):
            torch.manual_seed(4)
            tensors = storage.store(*pair)
            draws.append(storage.call(*tensors, generator=make(), backend=backend).z)
        assert torch.equal(*draws)


def test_a_generator_of_the_cpu_gives_a_seed(backend, device):
    if backend == "eager" or device != "cpu":
        pytest.skip("eager draws by torch.randn; a GPU's generator gives its own key")
    generator = torch.Generator().manual_seed(5)
    word = torch.empty((), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    generator.manual_seed(5)
    eps = drawn((3, 4), backend=backend, generator=generator)
    assert torch.equal(eps, drawn((3, 4), backend=backend, seed=int(word)))


def test_seed_and_eps_touch_no_generator(backend, device):
    zero = torch.zeros(3, 4, device=device)
    before = torch.get_rng_state() if device == "cpu" else torch.cuda.get_rng_state()
    drawn((3, 4), backend=backend, device=device, seed=1)
    vaekl.reparameterize_kl(zero, zero, eps=zero, backend=backend)
    vaekl.kl_loss(zero, zero, backend=backend)
    after = torch.get_rng_state() if device == "cpu" else torch.cuda.get_rng_state()
    assert torch.equal(before, after)


def test_backward_uses_the_noise_of_forward(backend, many_programs, device):
    """With the default generator: dz/dlogvar = std eps / 2 = (z - mu) / 2."""
    mu = torch.randn(5, 11, dtype=torch.float64, device=device)
    logvar = torch.randn(5, 11, dtype=torch.float64, device=device, requires_grad=True)
    first = vaekl.reparameterize(mu, logvar, backend=backend)
    vaekl.reparameterize(mu, logvar, backend=backend)  # moves the generator on
    first.sum().backward()
    torch.testing.assert_close(logvar.grad, 0.5 * (first - mu).detach(), rtol=1e-12, atol=1e-12)
