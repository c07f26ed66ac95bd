"""What a loss passes through unnoticed: copies, devices, fakes, subclasses, hooks, anomaly mode."""

import contextlib
import copy
import io
import pickle
import warnings

import pytest
import torch
from torch._subclasses import FakeTensorMode

import vaekl
from vaekl.testing import make_inputs


def leaves(shape, device, dtype=torch.float32):
    return [t.requires_grad_() for t in make_inputs(shape, dtype=dtype, device=device)]


def total(out):
    return out.z.float().sin().sum() + 2 * out.kl.sum() + 3 * out.kl_of_mean


# --- copies -----------------------------------------------------------------------------------


def test_a_module_inside_a_model_is_copied_and_saved(backend, device):
    options = {"reduction": "sum", "clamp": (-2.0, None), "mean_over": "all", "batch_dims": 1}
    model = torch.nn.Sequential(vaekl.nn.ReparameterizeKL(backend=backend, **options)).eval()
    assert not model.state_dict()
    assert not list(model.parameters())
    model.load_state_dict({}, strict=True)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    mu, logvar = make_inputs((4, 6), device=device)
    expected = model[0](mu, logvar)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
        model.to(torch.float64).to(device),
    ):
        assert not other.training
        out = other[0](mu, logvar)
        assert all(torch.equal(a, b) for a, b in zip(out, expected))
        assert torch.equal(other.train()[0](mu, logvar, seed=1).kl, expected.kl)


def test_results_are_a_named_tuple_of_torch(backend, device):
    """pytree, pickle and copy take them apart and put them together again."""
    mu, logvar = make_inputs((4, 6), device=device)
    out = vaekl.reparameterize_kl(mu, logvar, backend=backend)
    doubled = torch.utils._pytree.tree_map(lambda t: 2 * t, out)
    assert type(doubled) is vaekl.ReparamKL
    assert torch.equal(doubled.z, 2 * out.z)
    for other in (copy.deepcopy(out), pickle.loads(pickle.dumps(out))):
        assert type(other) is vaekl.ReparamKL
        assert all(torch.equal(a, b) for a, b in zip(out, other))


# --- devices, fakes, subclasses ---------------------------------------------------------------


def test_default_device(backend, device):
    """Another default device: nothing is made there, in either direction or under a transform."""
    mu, logvar = leaves((4, 6), device)
    expected = vaekl.reparameterize_kl(mu, logvar, seed=3, backend=backend)
    slopes = torch.autograd.grad(total(expected), (mu, logvar))
    torch.set_default_device("meta")
    try:
        out = vaekl.reparameterize_kl(mu, logvar, seed=3, backend=backend)
        again = torch.autograd.grad(total(out), (mu, logvar))
        scalar = lambda m: total(vaekl.reparameterize_kl(m, logvar, seed=3, backend=backend))  # noqa: E731
        composed = torch.func.grad(scalar)(mu.detach())
    finally:
        torch.set_default_device(None)
    for a, b in zip((*out, *again), (*expected, *slopes)):
        assert torch.equal(a, b)
    torch.testing.assert_close(composed, slopes[0])


@pytest.mark.parametrize("reduction", ["none", "batchmean"])
def test_fake_tensors(reduction, backend, device):
    """Shapes, dtypes and strides without computing, backward included."""
    real = make_inputs((2, 3, 4), dtype=torch.bfloat16, logvar_dtype=torch.float32, device=device)
    found = []
    for mode in (None, FakeTensorMode()):
        tensors = real
        if mode is not None:
            tensors = [mode.from_tensor(t) for t in real]
        mu, logvar = (t.detach().requires_grad_() for t in tensors)
        out = vaekl.reparameterize_kl(mu, logvar, reduction=reduction, backend=backend)
        slopes = torch.autograd.grad(total(out), (mu, logvar))
        found.append([(t.shape, t.dtype, t.stride(), t.device) for t in (*out, *slopes)])
        if mode is not None:
            with mode:
                inside = vaekl.kl_loss(torch.empty(4, 6), torch.empty(4, 6))
            assert inside.shape == ()
            assert type(inside) is type(out.z)
    assert found[0] == found[1]


class Plain(torch.Tensor):
    """A subclass that only has a name."""

    @classmethod
    def of(cls, tensor):
        return tensor.as_subclass(cls)


class Wrapper(torch.Tensor):
    """A subclass around a tensor which sees every operation."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=inner.device
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        assert function.namespace in ("aten", "prim"), function
        unwrap = lambda t: t.inner if isinstance(t, cls) else t  # noqa: E731
        args, kwargs = torch.utils._pytree.tree_map(unwrap, (args, kwargs or {}))
        wrap = lambda t: cls(t) if isinstance(t, torch.Tensor) else t  # noqa: E731
        return torch.utils._pytree.tree_map(wrap, function(*args, **kwargs))


@pytest.mark.parametrize("kind", [Plain.of, Wrapper], ids=["plain", "wrapper"])
def test_subclasses(kind, backend, device):
    """Plain operations, which a subclass can handle: results of its class, the same numbers."""
    mu, logvar = (t.detach() for t in leaves((4, 6), device))
    unwrap = lambda t: t.inner if isinstance(t, Wrapper) else t.as_subclass(torch.Tensor)  # noqa: E731
    eps = torch.ones_like(mu)
    found = []
    for wrap in (lambda t: t, kind):
        m, v = (wrap(t.clone()).requires_grad_() for t in (mu, logvar))
        out = vaekl.reparameterize_kl(m, v, eps=wrap(eps), backend=backend)
        slopes = torch.autograd.grad(total(out), (m, v))
        found.append((*out, *slopes))
    assert {type(t) for t in found[1]} == {type(kind(mu))}
    for a, b in zip(*found):
        torch.testing.assert_close(unwrap(b), a)
    for noise in ({}, {"seed": 3}):
        z = vaekl.reparameterize(kind(mu), kind(logvar), backend=backend, **noise)
        assert len(unwrap(z).unique()) == 24
    given = vaekl.reparameterize(mu, logvar, seed=3, backend=backend)
    torch.testing.assert_close(unwrap(z), given, rtol=0, atol=2e-5)


def test_parameters_are_plain(backend, device):
    mu, logvar = (torch.nn.Parameter(t.detach()) for t in leaves((4, 6), device))
    vaekl.kl_loss(mu, logvar, backend=backend).backward()
    torch.testing.assert_close(mu.grad, mu.detach() / 4)


# --- determinism, anomaly, hooks --------------------------------------------------------------


@pytest.mark.parametrize("warn_only", [True, False])
def test_deterministic_algorithms_and_anomaly_mode(warn_only, backend, many_programs, device):
    """No warning, no error: forward, backward, twice differentiated."""
    mu, logvar = leaves((9, 22), device)
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "Anomaly Detection has been enabled"
        anomaly = torch.autograd.detect_anomaly()
    with warnings.catch_warnings(), anomaly:
        warnings.simplefilter("error")
        warnings.filterwarnings(
            "ignore", "Conversion of an array", DeprecationWarning
        )  # Triton 3.6
        out = vaekl.reparameterize_kl(mu, logvar, reduction="none", backend=backend)
        slopes = torch.autograd.grad(total(out), (mu, logvar), create_graph=True)
        sum(s.square().sum() for s in slopes).backward()
        total(vaekl.reparameterize_kl(mu, logvar, reduction="none", backend=backend)).backward()


def test_anomaly_mode_names_the_call(backend, device):
    """NaN in backward (here 0 * inf) is reported with the line that made the output."""
    mu, logvar = leaves((4, 6), device)
    mu = torch.full_like(mu, float("inf"), requires_grad=True)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with torch.autograd.detect_anomaly():
            kl = vaekl.kl_loss(mu, logvar, backend=backend)  # here
            with pytest.raises(RuntimeError, match="returned nan values"):
                (0 * kl).backward()
    assert any("# here" in str(w.message) for w in seen)


def test_hooks(backend, device):
    """On inputs, outputs and nodes: what they see, and what they change."""
    mu, logvar = leaves((4, 6), device)
    seen = {}
    mu.register_hook(lambda g: seen.__setitem__("mu", g.clone()))
    logvar.register_hook(lambda g: 2 * g)
    mu.register_post_accumulate_grad_hook(lambda t: seen.__setitem__("after", t.grad.clone()))
    out = vaekl.reparameterize_kl(mu, logvar, seed=1, backend=backend)
    out.z.register_hook(lambda g: 3 * g)
    out.kl.grad_fn.register_hook(lambda inputs, outputs: seen.__setitem__("node", inputs[0]))
    upstream = [torch.randn_like(o) for o in out]
    torch.autograd.backward(tuple(out), upstream)
    free = [t.detach().requires_grad_() for t in (mu, logvar)]
    again = vaekl.reparameterize_kl(*free, seed=1, backend=backend)
    upstream[0] = 3 * upstream[0]
    dmu, dlogvar = torch.autograd.grad(tuple(again), free, upstream)
    for hooked in (seen["mu"], seen["after"], seen["node"], mu.grad):
        assert torch.equal(hooked, dmu)
    assert torch.equal(logvar.grad, 2 * dlogvar)


def test_module_hooks(backend, device):
    mu, logvar = leaves((4, 6), device)
    module = vaekl.nn.ReparameterizeKL(backend=backend)
    module.register_forward_pre_hook(lambda m, inputs: (2 * inputs[0], inputs[1]))
    module.register_forward_hook(lambda m, inputs, out: out._replace(kl=out.kl + 1))
    expected = vaekl.kl_loss(2 * mu, logvar, backend=backend) + 1
    assert torch.equal(module(mu, logvar).kl, expected)


def test_saved_tensors_hooks(backend, device):
    """Offloading what is saved, as torch.autograd.graph.save_on_cpu does."""
    mu, logvar = leaves((4, 6), device)
    found = []
    for context in (
        torch.autograd.graph.saved_tensors_hooks(lambda t: t.cpu().clone(), lambda t: t.to(device)),
        torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
    ):
        with context:
            out = vaekl.reparameterize_kl(mu, logvar, seed=1, backend=backend)
        found.append(torch.autograd.grad(total(out), (mu, logvar)))
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_partial_use_and_retain_graph(backend, device):
    """One output at a time adds up to all at once; a freed graph says so."""
    mu, logvar = leaves((4, 6), device)
    out = vaekl.reparameterize_kl(mu, logvar, backend=backend)
    upstream = [torch.randn_like(o) for o in out]
    whole = torch.autograd.grad(tuple(out), (mu, logvar), upstream, retain_graph=True)
    parts = [
        torch.autograd.grad(o, (mu, logvar), g, retain_graph=True, allow_unused=True)
        for o, g in zip(out, upstream)
    ]
    for column, expected in zip(zip(*parts), whole):
        torch.testing.assert_close(sum(column), expected)
    out.kl.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        out.kl.backward()


def test_no_grad_and_inference_mode(backend, device):
    mu, logvar = leaves((4, 6), device)
    expected = vaekl.reparameterize_kl(mu, logvar, seed=1, backend=backend)
    with torch.no_grad():
        out = vaekl.reparameterize_kl(mu, logvar, seed=1, backend=backend)
    assert not any(o.requires_grad for o in out)
    with torch.inference_mode():
        inferred = vaekl.reparameterize_kl(mu, logvar, seed=1, backend=backend)
    assert all(o.is_inference() for o in inferred)
    for other in (out, inferred):
        assert all(torch.equal(a, b) for a, b in zip(expected, other))


#: Which of mu, logvar, eps are made in inference mode; the others train.
FROZEN = [(0,), (1,), (2,), (0, 1), (0, 2)]


@pytest.mark.parametrize("road", ["direct", "operator", "create_graph"])
@pytest.mark.parametrize("frozen", FROZEN, ids=str)
def test_tensors_of_inference_mode_beside_one_that_trains(frozen, road, backend, operators, device):
    """A frozen encoder: what no gradient reads is not saved, and what one reads is copied."""
    values = [*make_inputs((5, 6), device=device), make_inputs((5, 6), device=device, seed=4)[0]]
    with torch.inference_mode():
        made = [t * 1 for t in values]
    found = []
    for source in (made, values):
        tensors = [
            source[i] if i in frozen else values[i].clone().requires_grad_() for i in range(3)
        ]
        with operators if road == "operator" else contextlib.nullcontext():
            out = vaekl.reparameterize_kl(*tensors[:2], eps=tensors[2], backend=backend)
            leaves = [t for t in tensors if t.requires_grad]
            upstream = [torch.full_like(o, 0.5) for o in out]
            grads = torch.autograd.grad(
                [o for o in out if o.requires_grad], leaves,
                [g for g, o in zip(upstream, out) if o.requires_grad],
                create_graph=road == "create_graph",
            )  # fmt: skip
        found.append([*out, *grads])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_packed_moments_of_inference_mode_beside_noise_that_trains(backend, device):
    values = make_inputs((5, 6), device=device)[0]
    eps = torch.ones(5, 3, device=device, requires_grad=True)
    with torch.inference_mode():
        moments = values * 1
    z = vaekl.reparameterize_kl_moments(moments, eps=eps, backend=backend).z
    torch.testing.assert_close(torch.autograd.grad(z.sum(), eps)[0], (0.5 * values[:, 3:]).exp())


def test_packed_moments_that_train_beside_noise_of_inference_mode(backend, device):
    values = make_inputs((5, 6), device=device)[0]
    found = []
    for mode in (True, False):
        with torch.inference_mode(mode):
            eps = torch.ones(5, 3, device=device)
        moments = values.clone().requires_grad_()
        z = vaekl.reparameterize_kl_moments(moments, eps=eps, backend=backend).z
        found.append(torch.autograd.grad(z.sum(), moments)[0])
    assert torch.equal(*found)


def test_what_no_gradient_reads_is_not_kept(backend, device):
    """Nor is it missed when it is changed before backward."""
    mu, logvar = make_inputs((64, 8), device=device)
    for trains in (mu.clone(), logvar.clone()):
        trains.requires_grad_()
        other = torch.zeros_like(mu)
        pair = (trains, other) if torch.equal(trains, mu) else (other, trains)
        kl = vaekl.kl_loss(*pair, backend=backend)
        assert other.data_ptr() not in {
            t.data_ptr() for t in kl.grad_fn.saved_tensors if t is not None
        }
        other += 1
        kl.backward()
        assert trains.grad.isfinite().all()


@pytest.mark.parametrize("which", [0, 1])
def test_zero_tensors(which, backend, device):
    """Autograd's stand-in for zeros has no memory that a kernel could read."""
    tensors = list(make_inputs((4, 6), device=device))
    tensors[which] = torch._efficientzerotensor(4, 6, device=device)
    plain = [t.clone() if t._is_zerotensor() else t for t in tensors]
    for a, b in zip(
        vaekl.reparameterize_kl(*tensors, seed=1, backend=backend),
        vaekl.reparameterize_kl(*plain, seed=1, backend=backend),
    ):
        torch.testing.assert_close(a, b)
