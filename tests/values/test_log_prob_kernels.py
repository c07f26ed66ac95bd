"""The kernels of log densities: random calls against the oracle, one launch each way, all roads."""

import importlib
import math
import random

import numpy as np
import pytest
import torch

import vaekl
from steps import scale_of
from vaekl import _operators, _plans
from vaekl._spec import Spec, to_text
from vaekl.reference import SCALES, Oracle, to_numpy
from vaekl.testing import LAYOUTS, make_inputs, random_upstream, step, unit, worst

# Ragged, one and few columns, several tiles and row ranges, axes that no three strides describe.
SHAPES = [
    ((7, 13), 1), ((40, 1), 1), ((33, 2), 1), ((1, 9), 1), ((9, 34), 1), ((2, 130), 1),
    ((5, 3, 6), 2), ((4, 8, 3, 5), 1), ((60, 20), 1), ((6,), 0), ((6,), 1),
]  # fmt: skip


LARGE = [((2, 5000), 1), ((700, 130), 1), ((33, 2050), 1)]  # of several tiles and ranges of cpu


def a_call(rng, device, shapes):
    """(tensors by name, options) of some call; its eps is that of the seed if there is none."""
    shape, batch_dims = rng.choice(shapes)
    layout = rng.choice(list(LAYOUTS)) if len(shape) > 1 else "contiguous"
    dtype = rng.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16])
    scale = rng.choice(list(SCALES))
    mu, logvar = make_inputs(shape, dtype=torch.float64, layout=layout, seed=rng.randrange(99))
    tensors = {"mu": mu, "logvar": scale_of(scale, logvar)}
    if rng.random() < 0.4:
        tensors["eps"] = torch.randn(shape, dtype=torch.float64)
    kind = rng.choice([None, "sample", "event", "one"])
    if kind is not None:
        of = {"sample": shape, "event": shape[batch_dims:], "one": ()}[kind]
        mean, of_prior = make_inputs(of, dtype=torch.float64, seed=rng.randrange(99))
        tensors |= {"prior_mean": mean, "prior_scale": scale_of(scale, of_prior)}
    options = {
        "batch_dims": batch_dims,
        "scale": scale,
        "clamp": rng.choice([None, None, (-0.5, 0.7)]),
        "path_derivative": rng.random() < 0.4,
    }
    return {name: t.to(device, dtype) for name, t in tensors.items()}, options


def sizes(oracle, upstream):
    """Sums of |terms| of both log densities, and of each gradient, which rounding is in proportion
    to; of whatever reaches z by the largest of its parts.
    """
    shape = oracle.mu.shape
    form, (mean, scale) = SCALES[oracle.scale], oracle.prior_pair
    with np.errstate(all="ignore"):
        of_prior, std = form.logvar(scale), np.exp(0.5 * oracle.posterior_logvar)
    weight = np.exp(-0.5 * of_prior)
    reach = (np.abs(oracle.mu) + std * np.abs(oracle.eps) + np.abs(mean)) * weight
    over = tuple(range(oracle.batch_dims, len(shape)))
    rows = lambda t: np.broadcast_to(t, shape).sum(over)  # noqa: E731
    of_q = rows(2 + np.abs(oracle.posterior_logvar) + oracle.eps**2)
    of_p = rows(2 + np.abs(of_prior) + reach**2)
    dz, dq, dp = (0.0 if g is None else np.abs(to_numpy(g)) for g in upstream)
    dq, dp = (np.reshape(g, np.shape(g) + (1,) * len(over)) if np.ndim(g) else g for g in (dq, dp))
    pull = dp * (reach + reach * weight)
    to_z = dz + pull + dq * np.abs(oracle.eps) / std
    slope = 1 + np.abs(form.slope(oracle.logvar)) + np.abs(form.std_slope(oracle.logvar))
    of_scale = to_z * slope * (1 + np.abs(oracle.eps)) + dq * slope
    of_eps = to_z * std + dq * np.abs(oracle.eps)
    prior_slope = 1 + np.abs(form.slope(scale))
    of_prior_scale = np.broadcast_to(dp * (1 + reach**2) * prior_slope, shape)
    by_name = {"mu": to_z, "logvar": of_scale, "eps": of_eps}
    for name, of in (("prior_mean", pull), ("prior_scale", of_prior_scale)):
        of = np.broadcast_to(of, shape)
        kept = np.shape(mean)
        by_name[name] = of.sum(tuple(range(len(shape) - len(kept)))) if kept != shape else of
    return of_q, of_p, by_name


@pytest.mark.parametrize("number", range(24))
def test_random_calls(number, backend, config, device):
    check(random.Random(number), backend, device, SHAPES)


@pytest.mark.parametrize("number", range(24))
def test_random_calls_on_many_threads(number, device):
    pytest.importorskip("numba")
    check(random.Random(number), "cpu", "cpu", LARGE)


def check(rng, backend, device, shapes):
    """A random call, forward and backward, against the oracle."""
    tensors, options = a_call(rng, device, shapes)
    names, dtype = list(tensors), tensors["mu"].dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    noise = {} if "eps" in tensors else {"seed": rng.choice([0, 5, -3])}

    def call(*given):
        named = dict(zip(names, given, strict=True))
        pair = [named.pop(name) for name in ("prior_mean", "prior_scale") if name in named]
        return vaekl.reparameterize_log_prob(
            **named, prior=tuple(pair) or None, backend=backend, **options, **noise
        )

    used = [rng.random() < 0.7 for _ in range(2)]
    used.append(True)  # log p, in which everything has a part
    with torch.no_grad():
        upstream = [
            g if u else None for g, u in zip(random_upstream(call(*tensors.values())), used)
        ]
    needs = [rng.random() < 0.7 for _ in names]
    needs[rng.randrange(len(names))] = True
    out, _, gradients = step(call, list(tensors.values()), upstream, needs=needs)
    values = {name: to_numpy(t) for name, t in tensors.items()}
    if "eps" not in tensors:
        zero = torch.zeros(tensors["mu"].shape, dtype=wide, device=device)
        drawn = vaekl.reparameterize_kl(
            zero, zero, batch_dims=options["batch_dims"], backend=backend, kl_of_mean=False, **noise
        )
        values["eps"] = to_numpy(drawn.z)
    prior = (values["prior_mean"], values["prior_scale"]) if "prior_mean" in values else None
    oracle = Oracle(values["mu"], values["logvar"], values["eps"], prior=prior, **options)
    u = unit(wide)
    of_q, of_p, of_gradients = sizes(oracle, upstream)
    assert (out.z.dtype, out.log_q.dtype, out.log_p.dtype) == (dtype, wide, wide)
    of_z = np.abs(oracle.mu) + np.abs(oracle.z)
    assert worst(out.z, oracle.z, 4 * u * of_z + 2 * unit(dtype) * np.abs(oracle.z) + 1e-7) <= 1
    assert worst(out.log_q, oracle.log_q, 4 * u * of_q) <= 1
    assert worst(out.log_p, oracle.log_p, 4 * u * of_p) <= 1
    exact = oracle.gradients(dz=upstream[0], dlog_q=upstream[1], dlog_p=upstream[2])
    for name, gradient in zip(names, gradients, strict=True):
        if gradient is None or (name == "eps" and options["path_derivative"]):
            continue  # the oracle's is of noise that is held
        found = exact["d" + name]
        bound = 24 * u * of_gradients[name] + 2 * unit(dtype) * np.abs(found)
        bound = bound + 2 * float(torch.finfo(dtype).smallest_normal)
        assert gradient.shape == tensors[name].shape
        assert worst(gradient, found, bound) <= 1, name


def test_one_launch_each_way(backend, monkeypatch, device):
    """And one draw: with its gradients, the call is two calls of a backend."""
    calls = []
    for name in ("forward", "backward"):
        plain = getattr(_plans, name)
        monkeypatch.setattr(_plans, name, lambda *x, p=plain, n=name: calls.append(n) or p(*x))
    mu, logvar = (t.requires_grad_() for t in make_inputs((6, 5), device=device))
    prior = tuple(t.requires_grad_() for t in make_inputs((5,), device=device, seed=1))
    out = vaekl.reparameterize_log_prob(mu, logvar, prior=prior, seed=1, backend=backend)
    assert calls == ["forward"]
    torch.autograd.grad(out, (mu, logvar, *prior), [torch.randn_like(o) for o in out])
    assert calls == ["forward", "backward"]


def test_what_is_kept(backend, device):
    """mu, logvar and the prior by reference, and a key; noise only where there is no key."""
    mu, logvar = (t.requires_grad_() for t in make_inputs((64, 32), device=device))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        vaekl.reparameterize_log_prob(mu, logvar, seed=1, backend=backend)
    theirs = {mu.data_ptr(), logvar.data_ptr()}
    own = sum(t.numel() for t in kept if t.data_ptr() not in theirs)
    assert own == (mu.numel() if backend == "eager" else 2)


@pytest.mark.parametrize("path", [False, True])
def test_roads_agree(path, backend, device):
    """Operator, composed and direct, and gradients of gradients."""
    mu, logvar = make_inputs((6, 5), device=device, dtype=torch.float64)
    eps = torch.randn_like(mu)
    prior = make_inputs((5,), device=device, dtype=torch.float64, seed=1)
    given = (mu, logvar, eps, *prior)

    def call(mu, logvar, eps, *prior):
        return vaekl.reparameterize_log_prob(
            mu, logvar, eps=eps, prior=prior, path_derivative=path, backend=backend
        )

    def loss(*given):
        z, log_q, log_p = call(*given)
        return (z.sin().sum(-1) + log_q.tanh() - 2 * log_p.sigmoid()).sum()

    def direct(*given):
        leaves = [t.clone().requires_grad_() for t in given]
        return torch.autograd.grad(loss(*leaves), leaves)

    expected = direct(*given)
    for found in (
        torch.func.grad(loss, argnums=tuple(range(5)))(*given),
        [
            t.grad
            for t in _backward(torch.compile(loss, backend="aot_eager", fullgraph=True), given)
        ],
    ):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
    torch.testing.assert_close(torch.func.vmap(call)(*(t[None].clone() for t in given))[1][0],
                               call(*given)[1])  # fmt: skip

    def slope(*given):
        leaves = [t if t.requires_grad else t.clone().requires_grad_() for t in given]
        found = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
        return sum(g.square().sum() for g in found)

    leaves = [t.clone().requires_grad_() for t in given]
    of_slope = torch.autograd.grad(slope(*leaves), leaves)
    gradients = torch.func.grad(loss, argnums=tuple(range(5)))
    composed = torch.func.grad(
        lambda *x: sum(g.square().sum() for g in gradients(*x)), argnums=tuple(range(5))
    )(*given)
    for a, b in zip(of_slope, composed, strict=True):
        torch.testing.assert_close(a, b)


class Bound(torch.nn.Module):
    """K draws' weights, as IWAE takes them."""

    def forward(self, mu, logvar):
        many = [t.expand(3, *t.shape) for t in (mu, logvar)]
        out = vaekl.reparameterize_log_prob(*many, batch_dims=2, seed=1)
        return (out.log_p - out.log_q).logsumexp(0)


def test_exported(device):
    """For batches of any size."""
    batch = torch.export.Dim("batch", min=2)
    mu, logvar = make_inputs((6, 5), device=device)
    shapes = {"mu": {0: batch}, "logvar": {0: batch}}
    program = torch.export.export(Bound(), (mu, logvar), dynamic_shapes=shapes).module()
    for n in (6, 4):
        exact = Bound()(mu[:n], logvar[:n])
        torch.testing.assert_close(program(mu[:n], logvar[:n]), exact, rtol=1e-5, atol=1e-5)


def _backward(function, given):
    leaves = [t.clone().requires_grad_() for t in given]
    function(*leaves).backward()
    return leaves


def test_a_gradient_is_no_tensor_of_the_callers(backend, device):
    """Of z alone it is the upstream gradient, to the bit."""
    mu, logvar = (t.requires_grad_() for t in make_inputs((6, 5), device=device))
    out = vaekl.reparameterize_log_prob(mu, logvar, seed=1, backend=backend)
    for create_graph in (False, True):
        upstream = torch.randn_like(mu)
        (found,) = torch.autograd.grad(
            out.z, [mu], upstream, retain_graph=True, create_graph=create_graph
        )
        assert torch.equal(found, upstream)
        assert found.data_ptr() != upstream.data_ptr()


def test_operators_of_no_event_and_of_float64(backend, device):
    """Permuted, with results of mu's shape; and groups of noise that events do not fill."""
    permuted = [t.t().requires_grad_() for t in make_inputs((3, 4), device=device)]
    wide = make_inputs((4, 6), dtype=torch.float64, device=device)
    for batch_dims, (mu, logvar) in ((2, permuted), (1, wide)):
        spec = Spec(True, None, None, batch_dims, "logvar", None, backend, log_prob="total")
        forward = torch.ops.vaekl.reparameterize_kl.default
        arguments = mu, [logvar], None, 3, None, to_text(spec)
        torch.library.opcheck(forward, arguments)
        outputs, saved = _operators.named(spec, forward(*arguments))
        backward = torch.ops.vaekl.reparameterize_kl_backward.default
        for used in ((True, True, True), (True, False, False)):
            upstream = [torch.randn_like(o) if u else None for o, u in zip(outputs, used)]
            held = [t.detach() for t in (mu, logvar)]
            needs = [True, True]
            torch.library.opcheck(backward, (held, upstream, [*saved], to_text(spec), needs))
    packed = spec._replace(packed=1)
    with pytest.raises(ValueError, match="not of packed moments"):
        forward(wide[0], [], None, 3, None, to_text(packed))


@pytest.mark.parametrize("log_prob", ["total", "path"])
@pytest.mark.parametrize("prior", [None, "event"])
def test_operators(prior, log_prob, backend, device):
    pair = make_inputs((4, 6), device=device)
    tensors = [t.requires_grad_() for t in pair]
    if prior is not None:
        tensors += [t.requires_grad_() for t in make_inputs((6,), device=device, seed=2)]
    spec = Spec(True, None, None, 1, "logvar", None, backend, prior=prior, log_prob=log_prob)
    text, forward = to_text(spec), torch.ops.vaekl.reparameterize_kl.default
    backward = torch.ops.vaekl.reparameterize_kl_backward.default
    torch.library.opcheck(forward, (tensors[0], tensors[1:], None, 3, None, text))
    outputs, saved = _operators.named(spec, forward(tensors[0], tensors[1:], None, 3, None, text))
    upstream = [torch.randn_like(o) for o in outputs]
    needs, held = [True] * len(tensors), [t.detach() for t in tensors]
    torch.library.opcheck(backward, (held, upstream, [*saved], text, needs))
    for i in (1, 2):
        wrong = [g[:2] if i == j else g for j, g in enumerate(upstream)]
        name = ("log_q", "log_p")[i - 1]
        with pytest.raises(ValueError, match=rf"gradient of {name} must have shape \(4,\)"):
            backward(held, wrong, [*saved], text, needs)


def test_upstream_gradients_of_any_stride(backend, device):
    """One number for all, and every second of a larger tensor."""
    mu, logvar = (t.requires_grad_() for t in make_inputs((6, 5), device=device))
    out = vaekl.reparameterize_log_prob(mu, logvar, seed=1, backend=backend)
    wide = torch.randn(6, 2, device=device)
    for upstream in ([wide[:, 0], wide[:, 1]], [wide[0, 0].expand(6), wide[:, 1]]):
        dense = [g.contiguous() for g in upstream]
        found, exact = (
            torch.autograd.grad(out[1:], [mu, logvar], given, retain_graph=True)
            for given in (upstream, dense)
        )
        for a, b in zip(found, exact, strict=True):
            assert torch.equal(a, b)


def test_parts_of_it(backend, device):
    """Gradients of some outputs alone, of some inputs alone: log q has no part in a prior."""
    mu, logvar = (t.requires_grad_() for t in make_inputs((6, 5), device=device))
    prior = tuple(t.requires_grad_() for t in make_inputs((5,), device=device, seed=1))
    out = vaekl.reparameterize_log_prob(mu, logvar, prior=prior, seed=1, backend=backend)
    of_prior = torch.autograd.grad(out.log_q.sum(), prior, retain_graph=True, allow_unused=True)
    assert of_prior == (None, None)
    (of_mu,) = torch.autograd.grad(out.log_q.sum(), [mu], retain_graph=True)
    assert not of_mu.any()
    alone = vaekl.reparameterize_log_prob(
        mu.detach(), logvar.detach(), prior=prior, seed=1, backend=backend
    )
    assert not any(t.requires_grad for t in alone[:2])
    a = torch.autograd.grad(alone.log_p.sum(), prior)
    b = torch.autograd.grad(out.log_p.sum(), prior)
    assert all(map(torch.equal, a, b))


def test_values_do_not_depend_on_the_path(backend, device):
    """Where z is infinite, too."""
    mu = torch.tensor([[1.0, 2.0], [3e38, 1.0]], device=device)
    logvar = torch.tensor([[0.0, 1.0], [88.0, 90.0]], device=device)
    total, path = (
        vaekl.reparameterize_log_prob(mu, logvar, seed=1, path_derivative=p, backend=backend)
        for p in (False, True)
    )
    for a, b in zip(total, path, strict=True):
        assert torch.equal(a, b)
    assert total.log_q.isfinite().all()


@pytest.mark.parametrize("log_prob", ["log_q", "z"])
def test_what_is_absent_makes_no_nan(log_prob, backend, device):
    """An infinite deviation is none of log q's gradient by its parameters."""
    mu, logvar = torch.zeros(2, 3, device=device), torch.full((2, 3), 200.0, device=device)
    eps = torch.ones_like(mu)
    tensors = [t.requires_grad_() for t in (mu, logvar, eps)]
    out = vaekl.reparameterize_log_prob(mu, logvar, eps=eps, backend=backend)
    found = torch.autograd.grad(getattr(out, log_prob).sum(), tensors)
    of_logvar, of_eps = (-0.5, -1.0) if log_prob == "log_q" else (math.inf, math.inf)
    values = (0.0 if log_prob == "log_q" else 1.0, of_logvar, of_eps)
    for gradient, value in zip(found, values, strict=True):
        assert torch.equal(gradient, torch.full_like(gradient, value))


@pytest.mark.parametrize(
    ("scale", "of_scale"),
    [("logvar", -180.0), ("logvar", -math.inf), ("logvar", 178.0), ("std", 0.0)],
)
def test_values_along_the_path_on_every_road(scale, of_scale, backend, device):
    """Where its slope, or z, is infinite, too."""
    mu = torch.tensor([[1.0, 2.0], [3e38, 1.0]], device=device)
    given, eps = torch.full_like(mu, of_scale), torch.full_like(mu, 3.0)

    def call(mu, given, eps):
        return vaekl.reparameterize_log_prob(
            mu, given, eps=eps, scale=scale, path_derivative=True, backend=backend
        )

    composed = torch.func.vmap(call)(mu[None], given[None], eps[None])
    for a, b in zip(composed, call(mu, given, eps), strict=True):
        torch.testing.assert_close(a[0], b)
    assert not composed.log_q.isnan().any()


def test_the_same_bits_again(backend, config, device):
    mu, logvar = (t.requires_grad_() for t in make_inputs((60, 20), device=device))
    prior = tuple(t.requires_grad_() for t in make_inputs((20,), device=device, seed=1))

    def results():
        out = vaekl.reparameterize_log_prob(mu, logvar, prior=prior, seed=1, backend=backend)
        return [*out, *torch.autograd.grad(out, [mu, logvar, *prior], random_upstream(out))]

    assert all(map(torch.equal, results(), results()))


@pytest.mark.parametrize("kind", [None, "row", "event"])
def test_many_draws_of_each_sample(kind, backend, config, monkeypatch, device):
    """Parameters expanded to K draws are read where they are: to the bit as copies of them are."""
    K, B, D = 5, 9, 6
    mu, logvar = make_inputs((B, D), device=device, scale=0.7)
    given = [mu, logvar]
    if kind is not None:
        given += make_inputs((B, D) if kind == "row" else (D,), device=device, seed=1)

    def call(*given, copied):
        whole = [t if t.dim() == 1 else t.expand(K, B, D) for t in given]
        if copied:
            whole = [t.contiguous() for t in whole]
        prior = tuple(whole[2:]) or None
        return vaekl.reparameterize_log_prob(
            *whole[:2], prior=prior, batch_dims=2, seed=1, backend=backend
        )

    copied = step(lambda *x: call(*x, copied=True), given)
    if backend != "eager":  # and no copy is made
        copies = []
        module = importlib.import_module(f"vaekl.backends.{backend}")
        monkeypatch.setattr(module, "forward_of_copies", lambda *x: copies.append(x))
        monkeypatch.setattr(module, "backward_of_copies", lambda *x: copies.append(x))
    _plans.forget()
    expanded = step(lambda *x: call(*x, copied=False), given)
    for a, b in zip(expanded.tensors, copied.tensors, strict=True):
        assert torch.equal(a, b)
