"""Attributes of a posterior assigned, and written to in place: each is a tensor of its own."""

import copy
import math
import pickle

import pytest
import torch

from vaekl.distributions import DiagonalGaussianDistribution
from vaekl.testing import make_inputs

SHAPE = (2, 8, 3, 2)
NAMES = ("parameters", "mean", "logvar", "std", "var")


class Plain:
    """What the class says that its attributes are and its methods give, all there at once."""

    def __init__(self, parameters, deterministic=False):
        self.parameters, self.deterministic = parameters, deterministic
        self.mean = parameters.narrow(1, 0, parameters.shape[1] // 2)
        self.logvar = parameters.chunk(2, 1)[1].clamp(-30.0, 20.0)
        self.std, self.var = torch.exp(0.5 * self.logvar), torch.exp(self.logvar)
        if deterministic:
            self.std = self.var = torch.zeros_like(self.mean)

    def sample(self, eps):
        z = self.mean.double() + self.std.double() * eps.double()
        return z.to(torch.promote_types(self.mean.dtype, self.parameters.dtype))

    def parts(self):
        return self.mean.double(), self.var.double(), self.logvar.double()

    def kl(self, other=None):
        if self.deterministic:
            return torch.zeros(1)
        mean, var, logvar = self.parts()
        if other is None:
            return 0.5 * (mean**2 + var - 1 - logvar).sum((1, 2, 3))
        theirs, their_var, their_logvar = other.parts()
        terms = (mean - theirs) ** 2 / their_var + var / their_var - 1 - logvar + their_logvar
        return 0.5 * terms.sum((1, 2, 3))

    def nll(self, x):
        if self.deterministic:
            return torch.zeros(1)
        mean, var, logvar = self.parts()
        return 0.5 * (math.log(2 * math.pi) + logvar + (x.double() - mean) ** 2 / var).sum(
            (1, 2, 3)
        )


def assign(**changes):
    def write(p):
        for name, change in changes.items():
            setattr(p, name, change(getattr(p, name)))

    return write


def in_place(**changes):
    def write(p):
        for name, change in changes.items():
            change(getattr(p, name))

    return write


def augmented(p):
    p.mean += 1
    p.logvar *= 0.5


def after_reading(p):
    assert p.std.shape == p.var.shape == p.logvar.shape
    p.parameters.mul_(2)
    p.mean.add_(1)


def flipped(p):
    p.deterministic = not p.deterministic


def one_by_one(p):
    """As code that moves everything it finds."""
    for name in NAMES:
        setattr(p, name, getattr(p, name).clone() + 0)


WRITES = {
    "mean": assign(mean=lambda t: t.clone() * 3),
    "mean in place": in_place(mean=lambda t: t.mul_(2)),
    "std": assign(std=torch.zeros_like),
    "std in place": in_place(std=lambda t: t.zero_()),
    "negative std": in_place(std=lambda t: t.neg_()),
    "var": assign(var=lambda t: t + 0.5),
    "var in place": in_place(var=lambda t: t.mul_(2)),
    "logvar": assign(logvar=lambda t: t - 1),
    "logvar in place": in_place(logvar=lambda t: t.add_(5)),
    "logvar and var": in_place(logvar=lambda t: t.fill_(-1), var=lambda t: t.fill_(math.exp(-1))),
    "parameters": assign(parameters=lambda t: t * 5),
    "parameters in place": in_place(parameters=lambda t: t.mul_(2)),
    "all in place": in_place(**{n: lambda t: t.mul_(1.5) for n in NAMES}),
    "a slice": in_place(mean=lambda t: t[:, 0].zero_(), std=lambda t: t[..., 0].zero_()),
    "augmented": augmented,
    "after reading": after_reading,
    "flipped": flipped,
    "flipped and more": lambda p: (flipped(p), p.std.add_(1), p.mean.neg_()),
    "one by one": one_by_one,
    "wider": assign(mean=torch.Tensor.double),
}


def pair(dtype=torch.float32, deterministic=False, seed=0, scale=1.0):
    """Ours and the plain one, of their own copies."""
    parameters = make_inputs(SHAPE, dtype=dtype, scale=scale, seed=seed)[0]
    return [
        kind(parameters.clone(), deterministic) for kind in (DiagonalGaussianDistribution, Plain)
    ]


def generator():
    return torch.Generator().manual_seed(3)


def noise(dtype):
    """What the generator gives a posterior of this dtype."""
    wide = torch.promote_types(dtype, torch.float32)
    return DiagonalGaussianDistribution(torch.zeros(SHAPE, dtype=wide)).sample(generator())


def close(actual, expected, dtype):
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(
        actual.detach().double(), expected.detach().double(), rtol=limit, atol=limit
    )


@pytest.mark.parametrize("write", list(WRITES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("deterministic", [False, True])
def test_writes(write, dtype, deterministic):
    """To half precision where var is rounded to it, which it is not here while untouched."""
    ours, plain = pair(dtype, deterministic, scale=4.0)
    other, plain_other = pair(dtype, seed=1)
    for p in (ours, plain):
        WRITES[write](p)
    x = make_inputs(plain.mean.shape, seed=2)[0]
    close(ours.kl(), plain.kl(), dtype)
    close(ours.nll(x), plain.nll(x), dtype)
    close(ours.kl(other), plain.kl(plain_other), dtype)
    if not (plain.var == 0).any():
        close(other.kl(ours), plain_other.kl(plain), dtype)
    z = plain.sample(noise(dtype))
    close(ours.sample(generator()), z, dtype)
    together = ours.sample_and_kl(generator())
    close(together[0], z, dtype)
    close(together[1], plain.kl(), dtype)
    for name in NAMES:
        assert torch.equal(getattr(ours, name), getattr(plain, name)), name
    assert ours.sample().dtype == plain.sample(noise(dtype)).dtype
    for again in (copy.deepcopy(ours), copy.copy(ours), pickle.loads(pickle.dumps(ours))):
        close(again.sample(generator()), z, dtype)
        close(again.kl(), plain.kl(), dtype)
        assert torch.equal(again.std, plain.std)


@pytest.mark.parametrize("write", ["mean", "std", "logvar", "all in place"])
def test_a_list_of_generators(write):
    ours, plain = pair()
    for p in (ours, plain):
        WRITES[write](p)
    one = [DiagonalGaussianDistribution(torch.zeros(1, *SHAPE[1:])) for _ in range(SHAPE[0])]
    eps = [p.sample(torch.Generator().manual_seed(b)) for b, p in enumerate(one)]
    z = ours.sample([torch.Generator().manual_seed(b) for b in range(SHAPE[0])])
    close(z, plain.sample(torch.cat(eps)), torch.float32)
    if write != "logvar":  # of which samples know nothing
        with pytest.raises(ValueError, match="one per sample, 2; got a list of 3"):
            ours.sample([generator()] * 3)


@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize("is_inference", [False, True])
def test_what_is_only_read_changes_nothing(scale, is_inference, operators):
    """Not a bit, and not a launch: also where posterior and prior nearly agree."""
    with torch.inference_mode(is_inference):
        parameters = make_inputs(SHAPE, scale=scale)[0]
        untouched, read = (DiagonalGaussianDistribution(parameters) for _ in range(2))
        for name in ("mean", "logvar", "std", "var"):
            assert getattr(read, name) is getattr(read, name)
        assert torch.equal(read.sample(generator()), untouched.sample(generator()))
        assert torch.equal(read.kl(), untouched.kl())
        assert torch.equal(read.nll(parameters[:, :4]), untouched.nll(parameters[:, :4]))
        if not is_inference:  # of whose tensors nobody counts the writes
            assert read.parameters is parameters
        read.mean = read.mean
        with operators:
            read.sample_and_kl()
    launched = [name for name in operators.names if name.startswith("vaekl")]
    assert launched == ["vaekl.reparameterize_kl.default"]


@pytest.mark.parametrize("name", ["mean", "std", "logvar", "var"])
@pytest.mark.parametrize("way", ["assigned", "asked"])
def test_gradients_of_what_was_assigned(name, way):
    """Also of an attribute that was asked to have one."""
    gradients = []
    x = make_inputs((2, 4, 3, 2), seed=2)[0]
    for p in pair():
        if way == "assigned":
            leaf = make_inputs((2, 4, 3, 2), seed=4)[0].abs().add(0.5).requires_grad_()
            setattr(p, name, leaf)
        else:
            leaf = getattr(p, name).requires_grad_()
        z = p.sample(noise(torch.float32) if isinstance(p, Plain) else generator())
        (z.sum().double() + p.kl().sum() + p.nll(x).sum()).backward()
        gradients.append(leaf.grad)
    close(*gradients, torch.float32)


def test_gradients_of_parameters_in_part():
    """Through what was left as it was."""
    gradients = []
    for kind in (DiagonalGaussianDistribution, Plain):
        parameters = make_inputs(SHAPE)[0].requires_grad_()
        p = kind(parameters * 1)
        with torch.no_grad():
            assert p.std is not None  # read where there are no gradients
        p.mean = p.mean * 2
        z = p.sample(noise(torch.float32) if kind is Plain else generator())
        (z.sum().double() + p.kl().sum()).backward()
        gradients.append(parameters.grad)
    close(*gradients, torch.float32)


@pytest.mark.parametrize(
    "write", ["mean", "std in place", "logvar in place", "parameters in place"]
)
def test_writes_in_a_compiled_function(write):
    torch._dynamo.reset()

    def call(parameters, x):
        p = DiagonalGaussianDistribution(parameters)
        WRITES[write](p)
        return p.kl(), p.nll(x), p.mean, p.std

    parameters, x = make_inputs(SHAPE)[0], make_inputs((2, 4, 3, 2), seed=2)[0]
    expected = call(parameters.clone(), x)
    program = torch.compile(call, fullgraph=True, backend="aot_eager")
    for a, b in zip(program(parameters.clone(), x), expected):
        close(a, b, torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_only_tensors_are_assigned(name):
    ours, _ = pair()
    with pytest.raises(TypeError, match=rf"{name} must be a torch\.Tensor, got str"):
        setattr(ours, name, "1.0")


@pytest.mark.parametrize("name", ["mean", "logvar", "std", "var"])
def test_numbers_are_assigned(name):
    ours, plain = pair()
    setattr(ours, name, 0.5)
    setattr(plain, name, torch.full_like(plain.mean, 0.5))
    close(ours.sample(generator()), plain.sample(noise(torch.float32)), torch.float32)
    close(ours.kl(), plain.kl(), torch.float32)


@pytest.mark.parametrize("transform", ["vmap", "functionalize"])
def test_writes_under_a_transform(transform):
    """Whose tensors count no writes."""

    def call(parameters):
        p = DiagonalGaussianDistribution(parameters)
        p.std.zero_()
        sample = p.sample()
        p.logvar.zero_()
        p.var.fill_(1.0)
        return sample - p.mean, p.kl() - 0.5 * p.mean.square().sum((1, 2, 3))

    parameters = make_inputs(SHAPE)[0]
    if transform == "vmap":
        found = torch.func.vmap(call, randomness="different")(parameters[None])
    else:
        found = torch.func.functionalize(call)(parameters)
    for difference in found:
        torch.testing.assert_close(difference, torch.zeros_like(difference), rtol=0, atol=1e-5)


@pytest.mark.parametrize("names", [("mean",), ("logvar",), ("mean", "std"), ("mean", "logvar")])
def test_gradients_of_attributes_that_were_read(names):
    gradients = []
    for kind in (DiagonalGaussianDistribution, Plain):
        p = kind(make_inputs(SHAPE)[0].requires_grad_() * 1)
        held = [getattr(p, name) for name in names]
        result = p.kl().sum()
        if "std" in names:
            result = p.sample(noise(torch.float32) if kind is Plain else generator()).sum()
        gradients.append(torch.autograd.grad(result, held))
    for a, b in zip(*gradients):
        close(a, b, torch.float32)
