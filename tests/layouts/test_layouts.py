"""docs/layouts.md line by line: what is read in place, and results of everything it lists."""

import pytest
import torch

import vaekl
from paths import DOCS
from vaekl.reference import SEED_OFFSET, Oracle, normal
from vaekl.testing import KL_BUDGET, gradient_bounds, large_operators, step, worst

PAGE = DOCS / "layouts.md"
ROWS = [
    [cell.strip().strip("`") for cell in line.strip("| ").split(" | ")]
    for line in PAGE.read_text().replace("| |", "|  |").splitlines()
    if line.startswith("| ") and "`" in line
]
NAMES = [row[0] for row in ROWS]
COPIES = {"copy_", "clone", "contiguous", "cat", "zeros", "zero_", "slice_backward"}


@pytest.fixture(params=["triton", "cpu"])
def kernels(request):
    """The backends that the page speaks of."""
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("tensors of these tests are on a GPU")
    return request.param


def channels_last(t):
    form = torch.channels_last if t.dim() == 4 else torch.channels_last_3d
    return t.to(memory_format=form)


def tensors_of(example, device):
    """(mu, logvar), or (moments,)."""
    torch.manual_seed(0)
    names = {"channels_last": channels_last}
    names["randn"] = lambda *shape: torch.randn(*shape, device=device)
    exec(example, names)
    return [names["m"]] if "m" in names else [names["mu"], names["logvar"]]


def run(tensors, upstream=None, **options):
    """Forward and back, without the KL of the means."""
    function = vaekl.reparameterize_kl_moments if len(tensors) == 1 else vaekl.reparameterize_kl
    return step(lambda *t: function(*t, kl_of_mean=False, **options), tensors, upstream)


def test_the_page_has_rows():
    assert len(ROWS) > 20
    assert {row[3] for row in ROWS} == {"in place", "copied"}


@pytest.mark.parametrize(
    ("example", "options", "read"), [r[1:] for r in ROWS], ids=[r[0] for r in ROWS]
)
def test_copies(example, options, read, kernels, device, launches_thrown_away):
    """The profiler's operators on tensors of the inputs' size, forward and backward."""
    tensors = tensors_of(example, device)
    half = tensors[0].numel() // (2 if len(tensors) == 1 else 1)
    options = eval(f"dict({options})")
    z, kl, _ = run(tensors, backend=kernels, **options).outputs
    upstream = (torch.ones_like(z), torch.ones_like(kl), None)
    call = lambda: run(tensors, upstream, backend=kernels, **options)  # noqa: E731
    found = {name for name, _ in large_operators(call, half)}
    assert bool(found & COPIES) == (read == "copied"), found


@pytest.mark.parametrize(("example", "options"), [row[1:3] for row in ROWS], ids=NAMES)
def test_values(example, options, backend, device):
    """KL, z and gradients of every line against the oracle."""
    tensors = tensors_of(example, device)
    options = eval(f"dict({options})")
    dim, batch_dims = options.get("dim", 1), options.get("batch_dims", 1)
    out, upstream, gradients = run(tensors, seed=5, reduction="none", backend=backend, **options)
    pair = tensors if len(tensors) == 2 else tensors[0].chunk(2, dim)
    shape = pair[0].shape
    rows = shape[:batch_dims].numel()
    eps = normal(5, SEED_OFFSET, rows, shape.numel() // rows).reshape(shape)
    oracle = Oracle(*pair, eps, reduction="none", batch_dims=batch_dims)
    assert worst(out.kl, oracle.kl, KL_BUDGET[torch.float32] * oracle.kl) <= 1
    torch.testing.assert_close(
        out.z.detach().cpu(), torch.from_numpy(oracle.z).float(), rtol=1e-5, atol=1e-5
    )
    expected = oracle.gradients(*upstream)
    bounds = gradient_bounds(oracle, torch.float32, torch.float32, *upstream, drawn=True)
    parts = gradients if len(tensors) == 2 else gradients[0].chunk(2, dim)
    for part, name in zip(parts, ("dmu", "dlogvar")):
        assert worst(part, expected[name], bounds[name]) <= 1, name


def test_gradient_of_one_logvar_channel(backend, device):
    """LTX: expand's gradient is the sum over the channels that share it."""
    mu = torch.randn(2, 8, 3, 4, 4, device=device)
    one = torch.randn(2, 1, 3, 4, 4, device=device)
    options = {"seed": 5, "kl_of_mean": False, "backend": backend}
    _, upstream, (gradient,) = step(
        lambda v: vaekl.reparameterize_kl(mu, v.expand_as(mu), **options), [one]
    )
    eps = normal(5, SEED_OFFSET, 2, mu.numel() // 2).reshape(mu.shape)
    oracle = Oracle(mu, one.expand_as(mu), eps)
    exact = oracle.gradients(*upstream)["dlogvar"].sum(1, keepdims=True)
    bounds = gradient_bounds(oracle, torch.float32, torch.float32, *upstream, drawn=True)
    assert worst(gradient, exact, 2 * bounds["dlogvar"].sum(1, keepdims=True)) <= 1


UPSTREAM = {
    "channels last": lambda shape: channels_last(torch.randn(shape)),
    "expanded": lambda shape: torch.randn(shape[0], 1, *shape[2:]).expand(shape),
    "one number": lambda shape: torch.randn(()).expand(shape),
    "sliced": lambda shape: torch.randn(shape[0], 3 * shape[1], *shape[2:])[
        :, shape[1] : -shape[1]
    ],
    "width before channels": lambda shape: torch.randn(
        shape[0], shape[3], shape[1], shape[2]
    ).permute(0, 2, 3, 1),
    "width first": lambda shape: torch.randn(shape[0], *shape[:0:-1]).permute(0, 3, 2, 1),
}


@pytest.mark.parametrize("form", [form for form in UPSTREAM if form != "width first"])
@pytest.mark.parametrize("packed", [True, False])
def test_upstream_gradients_in_place(form, packed, kernels, device, launches_thrown_away):
    """dz as it comes from other layers: no copy of it, packed or not.

    Beside mu, "width first" has three axes that do not merge: it is copied, as the page says.
    """
    moments = torch.randn(2, 8, 6, 6, device=device)
    tensors = [moments] if packed else moments.chunk(2, 1)
    dz = UPSTREAM[form]((2, 4, 6, 6)).to(device)
    assert form == "sliced" or not dz.is_contiguous()

    call = lambda: run(tensors, (dz, None, None), backend=kernels)  # noqa: E731
    call()
    found = {name for name, _ in large_operators(call, dz.numel())}
    assert not found & COPIES, found


@pytest.mark.parametrize("form", list(UPSTREAM))
def test_upstream_gradients_are_read_right(form, backend, device):
    moments = torch.randn(2, 8, 6, 6, device=device)
    dz = UPSTREAM[form]((2, 4, 6, 6)).to(device)
    (gradient,) = run([moments], (dz, None, None), seed=5, backend=backend).gradients
    oracle = Oracle(*moments.chunk(2, 1), normal(5, SEED_OFFSET, 2, 144).reshape(2, 4, 6, 6))
    expected = oracle.gradients(dz)
    bounds = gradient_bounds(oracle, torch.float32, torch.float32, dz, drawn=True)
    for part, name in zip(gradient.chunk(2, 1), ("dmu", "dlogvar")):
        assert worst(part, expected[name], bounds[name]) <= 1, name
