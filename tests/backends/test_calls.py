"""What is remembered of a kind of calls lets nothing pass that is not of that kind."""

import warnings

import pytest
import torch

import vaekl
from vaekl import _plans, _roads
from vaekl._spec import Spec, to_text
from vaekl.backends import layout as geometry
from vaekl.backends import protocol
from vaekl.testing import make_inputs, step


@pytest.fixture
def seen(backend, device):
    """A kind that is known: mu."""
    mu, _ = make_inputs((3, 4), device=device)
    vaekl.reparameterize_kl(mu, mu, backend=backend)
    return mu


@pytest.mark.parametrize("batch_dims", [True, 1.0])
def test_what_equals_1_is_not_1(batch_dims, seen, backend):
    with pytest.raises(TypeError, match=r"batch_dims must be an int, got (bool|float)"):
        vaekl.reparameterize_kl(seen, seen, batch_dims=batch_dims, backend=backend)


def test_other_tensors_of_the_same_size(seen, backend):
    with pytest.raises(TypeError, match=r"logvar must have one of the dtypes .* got torch.int32"):
        vaekl.reparameterize_kl(seen, seen.int(), backend=backend)
    with pytest.raises(ValueError, match=r"logvar must have the shape of mu, \(3, 4\); got \(4,"):
        vaekl.reparameterize_kl(seen, seen.mT, backend=backend)
    with pytest.raises(TypeError, match=r"mu must be a torch\.Tensor, got ndarray"):
        vaekl.reparameterize_kl(seen.cpu().numpy(), seen, backend=backend)
    with pytest.raises(ValueError, match="eps must have the shape of mu"):
        vaekl.reparameterize_kl(seen, seen, eps=seen[:2], backend=backend)


def test_a_sparse_tensor_whose_strides_are_those_of_a_scalar(backend, device):
    expanded = torch.zeros((), device=device).expand(3, 4)
    sparse = torch.eye(3, 4, device=device).to_sparse()
    assert sparse.stride() == expanded.stride()
    vaekl.kl_loss(expanded, expanded, backend=backend)
    with pytest.raises(TypeError, match="mu must be a dense"):
        vaekl.kl_loss(sparse, expanded, backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "in beta state"
        compressed = sparse.to_sparse_csr()
    with pytest.raises(TypeError, match="logvar must be a dense"):
        vaekl.kl_loss(expanded, compressed, backend=backend)


def test_a_negated_view(backend, device):
    """Its memory holds -x."""
    leaf = torch.randn(3, 4, dtype=torch.complex64, device=device)
    negated = leaf.conj().imag
    assert negated.is_neg()
    plain = negated.resolve_neg()
    for mu in (plain, negated):
        kl = vaekl.kl_loss(mu, mu, backend=backend)
    assert torch.equal(kl, vaekl.kl_loss(plain, plain, backend=backend))


def test_a_tensor_kept_from_a_transform_that_has_ended(backend, device):
    mu, logvar = make_inputs((3, 4), device=device)
    kept = []

    def function(x):
        kept.append(x)
        return x.square().sum()

    torch.func.grad(function)(mu)
    leaf = logvar.requires_grad_()
    grads = []
    for given in (mu, kept[0]):
        out = vaekl.reparameterize_kl(given, leaf, seed=1, backend=backend)
        grads.append(torch.autograd.grad(out.z.sum() + out.kl + out.kl_of_mean, leaf)[0])
    torch.testing.assert_close(grads[1], grads[0])


def test_operators_check_too(backend, device):
    mu, logvar = make_inputs((3, 4), device=device)
    spec = Spec(True, "batchmean", "batch", 1, "logvar", None, backend)
    operator = torch.ops.vaekl.reparameterize_kl
    operator(mu, [logvar], None, 1, None, to_text(spec))  # a kind that is known
    for wrong in (logvar[0], logvar[:2], logvar.t().contiguous()):
        with pytest.raises(ValueError, match="logvar must have the shape of mu"):
            operator(mu, [wrong], None, 1, None, to_text(spec))
        with pytest.raises(ValueError, match="eps must have the shape of mu"):
            operator(mu, [logvar, wrong], None, None, None, to_text(spec._replace(has_eps=True)))


def test_no_more_kinds_are_kept_than_so_many(device, monkeypatch):
    monkeypatch.setattr(protocol, "MOST", 8)
    for n in range(1, 30):
        mu, logvar = (t.requires_grad_() for t in make_inputs((n, 3), device=device))
        out = vaekl.reparameterize_kl(mu, logvar, seed=1, backend="eager")
        torch.autograd.grad(out.kl, (mu, logvar))
    assert 0 < len(_plans._forward) <= 8
    assert 0 < len(_plans._backward) <= 8


def gradients(outputs, inputs, upstream, used):
    """Of the outputs used that depend on the inputs."""
    pairs = [
        (o, u) for o, u, is_used in zip(outputs, upstream, used) if is_used and o.requires_grad
    ]
    if not pairs:
        return ()
    return torch.autograd.grad(
        [o for o, _ in pairs], inputs, [u for _, u in pairs], allow_unused=True
    )


def test_every_stride_is_a_kind_of_its_own(backend, device):
    """One shape and dtype, each tensor in turn transposed in memory, and each gradient absent."""
    mu, logvar, eps, dz = (torch.randn(6, 6, device=device).double() for _ in range(4))
    dkl = torch.randn(6, 2, device=device).double()
    names = ("mu", "logvar", "eps", "dz", "dkl")
    for turned in (None, *names):
        *leaves, upstream = (
            t.mT.contiguous().mT if name == turned else t
            for name, t in zip(names, (mu, logvar, eps, dz))
        )
        of_kl = dkl[:, 0] if turned == "dkl" else dkl[:, 0].contiguous()
        for needed in ((2,), (1, 2), (0, 1), (0, 1, 2)):
            for used in ((0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 0, 1), (1, 1, 1)):
                found = []
                for which in (backend, "eager"):
                    inputs = [t.detach() for t in leaves]
                    for i in needed:
                        inputs[i] = inputs[i].requires_grad_()
                    out = vaekl.reparameterize_kl(
                        inputs[0], inputs[1], eps=inputs[2], reduction="none", backend=which
                    )
                    wanted = [inputs[i] for i in needed]
                    grads = gradients(out, wanted, (upstream, of_kl, dz[0, 0]), used)
                    found.append((*out, *grads))
                for ours, theirs in zip(*found):
                    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_other_sizes_with_the_same_strides(backend, device):
    for batch in (2, 4, 3):
        mu, logvar = make_inputs((batch, 4), device=device)
        ours = vaekl.kl_loss(mu, logvar, reduction="none", backend=backend)
        torch.testing.assert_close(ours, vaekl.kl_loss(mu, logvar, reduction="none"))


@pytest.mark.parametrize("mean_over", ["batch", "all"])
@pytest.mark.parametrize("reduction", ["none", "batchmean"])
@pytest.mark.parametrize("batch_dims", [0, 1, 2])
def test_plans_of_other_sizes(batch_dims, reduction, mean_over, backend, device):
    """Each shape in turn, after plans of those before it: 2 axes may be 2 of the batch, too."""
    options = {"batch_dims": batch_dims, "reduction": reduction, "mean_over": mean_over, "seed": 3}
    for shape in ((4, 3), (5, 2), (2, 6), (3, 2, 2), (7, 1), (1, 7), (3, 5)):
        ours, theirs = (
            step(
                lambda m, v, b=name: vaekl.reparameterize_kl(m, v, backend=b, **options),
                make_inputs(shape, dtype=torch.float64, device=device),
            )
            for name in (backend, "eager")
        )
        for a, b in zip(ours.tensors, theirs.tensors, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_halves_of_one_kind_in_gradients_of_two(backend, device):
    """Side by side in rows of 6, and one above the other in rows of 3 cut from rows of 6."""
    wide = torch.randn(4, 6, device=device)
    for moments, dim in ((wide[:2], 1), (wide[:, :3], 0)):
        found = []
        for which in (backend, "eager"):
            leaf = moments.detach().requires_grad_()
            out = vaekl.reparameterize_kl_moments(leaf, dim=dim, seed=1, backend=which)
            found.append(torch.autograd.grad(out.z.square().sum() + out.kl, leaf)[0])
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 4), (1, 1, 4), (1, 3, 4), (3, 1, 4), (1, 1, 1, 4)])
def test_strides_of_kl_are_those_of_a_new_tensor(shape, backend, device):
    mu, logvar = make_inputs(shape, device=device)
    dims = len(shape) - 1
    kl = vaekl.kl_loss(mu, logvar, reduction="none", batch_dims=dims, backend=backend)
    assert kl.stride() == torch.empty(shape[:-1]).stride()


def test_a_functional_tensor_is_not_plain(backend, device):
    """Its keys are those of one that torch.func.functionalize made; neither has memory."""
    x = torch.randn(3, 4, device=device)
    torch._enable_functionalization(reapply_views=False)
    try:
        functional = torch._to_functional_tensor(x)
    finally:
        torch._disable_functionalization()
    kept = []
    torch.func.functionalize(lambda x: kept.append(x) or x)(x)
    for tensor in (functional, kept[0]):
        assert not _roads.is_direct(tensor)


@pytest.mark.parametrize("change", ["strides", "dtype"])
def test_hooks_that_give_back_other_tensors(change, backend, device):
    """They may change the layout of what is saved; another precision cannot be told from memory."""

    def unpack(tensor):
        if change == "dtype":
            return tensor.float() if tensor.is_floating_point() else tensor
        wide = tensor.new_empty((*tensor.shape, 2))
        wide[..., 0] = tensor
        return wide[..., 0]

    mu, logvar = make_inputs((5, 6), dtype=torch.float64, device=device)
    found = []
    for unpacked in (lambda t: t, unpack):
        leaves = [t.detach().requires_grad_() for t in (mu, logvar)]
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpacked):
            out = vaekl.reparameterize_kl(*leaves, seed=1, backend=backend)
        loss = out.z.square().sum() + out.kl + out.kl_of_mean
        if change == "dtype" and unpacked is unpack and backend != "eager":
            with pytest.raises(TypeError, match="hooks must give back the dtypes"):
                torch.autograd.grad(loss, leaves)
        else:
            found.append(torch.autograd.grad(loss, leaves))
    if len(found) == 2:
        tolerance = 1e-5 if change == "dtype" else 1e-12
        torch.testing.assert_close(found[1], found[0], rtol=tolerance, atol=tolerance)


def test_shapes_that_keep_changing_take_no_more_memory(device):
    """A few hundred kinds are kept, the newest: some MiB at most, for all the shapes there are."""

    def step(n):
        mu = torch.zeros(2, n, device=device, requires_grad=True)
        out = vaekl.reparameterize_kl(mu, torch.zeros_like(mu))
        (out.z.sum() + out.kl).backward()

    for n in range(1, 400):
        step(n)
    for kinds in (_plans._forward, _plans._backward):
        assert len(kinds) <= 256
    newest = list(_plans._forward.values())[-100:]
    for n in range(300, 400):
        step(n)
    assert list(_plans._forward.values())[-100:] == newest
    for cached in (geometry.view, geometry.grid):
        assert cached.cache_info().maxsize <= 256
