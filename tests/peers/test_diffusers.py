"""vaekl.distributions beside diffusers' class, and patch_diffusers in a real diffusers."""

import copy
import importlib
import pickle
import subprocess
import sys

import peer_cases
import peer_packages
import pytest
import torch

import vaekl
from vaekl.distributions import DiagonalGaussianDistribution as Ours

pytestmark = [pytest.mark.peers, pytest.mark.peer("diffusers")]
NAME = "DiagonalGaussianDistribution"
# SD, SDXL, SD at 256, a mono video of CogVideoX's form, HunyuanVideo.
IMAGES = [(16, 8, 64, 64), (4, 8, 128, 128), (12, 8, 32, 32)]
VIDEO = (1, 32, 33, 90, 160)
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def home():
    return importlib.import_module("diffusers.models.autoencoders.vae")


@pytest.fixture
def theirs(home):
    return getattr(home, NAME)


def parameters(shape, dtype=torch.float32, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator)).to(dtype)


def exactly(distribution, *arrays):
    """A diffusers distribution of the same numbers in float64."""
    return [None if a is None else distribution(a.double()) for a in arrays]


def error(values, exact):
    return ((values.double() - exact).abs() / exact.abs().clamp_min(1e-300)).max().item()


@pytest.mark.parametrize("shape", IMAGES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("deterministic", [False, True])
def test_attributes_are_equal(shape, dtype, deterministic, theirs):
    p = parameters(shape, dtype, scale=15.0)
    mine, other = Ours(p, deterministic), theirs(p, deterministic=deterministic)
    for name in ("parameters", "mean", "logvar", "std", "var"):
        assert torch.equal(getattr(mine, name), getattr(other, name)), name
    assert mine.deterministic == other.deterministic
    assert torch.equal(mine.mode(), other.mode())
    public = {name for name in dir(other) if not name.startswith("_")}
    assert public <= set(dir(mine))
    if deterministic:
        assert torch.equal(mine.kl(), other.kl())
        assert torch.equal(mine.nll(mine.mean), other.nll(other.mean))
        assert torch.equal(mine.sample(), other.sample())


@pytest.mark.parametrize("shape", IMAGES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kl_and_nll(shape, dtype, theirs):
    """Against their class in float64; theirs in half precision is further off."""
    p, q = parameters(shape, dtype), parameters(shape, dtype, seed=1)
    x = parameters((shape[0], shape[1] // 2, *shape[2:]), dtype, seed=2)
    exact, exact_other = exactly(theirs, p, q)
    mine, other = Ours(p), Ours(q)
    assert error(mine.kl(), exact.kl()) < 1e-6
    assert error(mine.kl(other), exact.kl(exact_other)) < 1e-6
    # An object of their class will do, too.
    torch.testing.assert_close(mine.kl(theirs(q)), mine.kl(other))
    for dims in ([1, 2, 3], (2, 3), [1]):
        torch.testing.assert_close(
            mine.nll(x, dims).double(), exact.nll(x.double(), dims), rtol=1e-5, atol=1e-4
        )
    torch.testing.assert_close(mine.nll(x), mine.nll(x, [1, 2, 3]))
    assert mine.kl().shape == theirs(p).kl().shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(dtype, theirs):
    """Random upstream gradients to every result, clamped logvars among the inputs."""
    shape = (4, 8, 16, 16)
    x = parameters((4, 4, 16, 16), dtype, seed=3)
    upstream = [torch.randn(4, dtype=torch.float64) for _ in range(3)]

    def gradients(kind, dtype):
        p = parameters(shape, torch.float32, scale=12.0).to(dtype)
        # At the bounds of clamp, which bfloat16 often hits, torch's own has one before 2.14.
        p = torch.where((p == -30) | (p == 20), 1.0, p).requires_grad_()
        q = parameters(shape, torch.float32, seed=1).to(dtype).requires_grad_()
        posterior = kind(p)
        outputs = [posterior.kl(), posterior.kl(kind(q)) * 1e-3, posterior.nll(x.to(dtype)) * 1e-3]
        used = [g.to(o.dtype) for g, o in zip(upstream, outputs)]
        return torch.autograd.grad(outputs, (p, q), used)

    for mine, other in zip(gradients(Ours, dtype), gradients(theirs, dtype)):
        size = other.double().abs().max()
        limit = 1e-5 if dtype is torch.float32 else 0.03
        assert (mine.double() - other.double()).abs().max() <= limit * size


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_trap_of_video(dtype, theirs):
    """[1, 2, 3] of five axes leave [B, W]; kl() here does not."""
    shape = VIDEO if dtype is torch.bfloat16 else (2, 8, 5, 12, 20)
    p = parameters(shape, dtype)
    (exact,) = exactly(theirs, p)
    batch, width = shape[0], shape[-1]
    assert exact.kl().shape == (batch, width)
    assert Ours(p).kl().shape == (batch,)
    assert error(Ours(p).kl(dims=[1, 2, 3]), exact.kl()) < 1e-6
    assert error(Ours(p).kl(), exact.kl().sum(1)) < 1e-6
    with vaekl.patch_diffusers():
        patched = getattr(importlib.import_module(theirs.__module__), NAME)
        assert error(patched(p).kl(), exact.kl()) < 1e-6  # as before the patch
        x = patched(p).mean
        assert patched(p).nll(x).shape == (batch, width)


@pytest.mark.parametrize("make", [lambda s: torch.Generator().manual_seed(s), None])
def test_samples_have_the_right_distribution(make, theirs):
    """Not their noise, but noise of the same mean and standard deviation; lists as theirs."""
    p = parameters((4, 8, 64, 64))
    torch.manual_seed(0)
    mine = Ours(p).sample(make and make(0))
    standard = (mine - theirs(p).mean) / theirs(p).std
    count = standard.numel()
    assert abs(standard.mean()) < 4 / count**0.5
    assert abs(standard.std() - 1) < 4 / (2 * count) ** 0.5
    if make:
        for kind in (Ours, theirs):
            together = kind(p).sample([make(s) for s in range(4)])
            alone = [kind(p[s : s + 1]).sample(make(s)) for s in range(4)]
            assert torch.equal(together, torch.cat(alone))


def moved(p):
    for name in ("mean", "logvar", "std", "var", "parameters"):
        setattr(p, name, getattr(p, name).clone().contiguous())


def changed(p, **changes):
    for name, change in changes.items():
        value = change(getattr(p, name))
        if value is not None:
            setattr(p, name, value)


#: What code around diffusers does to a posterior.
WRITES = {
    "moved": moved,
    "mean": lambda p: changed(p, mean=lambda t: 3 * t),
    "mean in place": lambda p: p.mean.mul_(2) is None,
    "no width": lambda p: changed(p, std=torch.zeros_like),
    "no width in place": lambda p: p.std.zero_() is None,
    "var": lambda p: changed(p, var=lambda t: t + 1),
    "logvar in place": lambda p: p.logvar.add_(5) is None,
    "parameters in place": lambda p: p.parameters.mul_(2) is None,
    "parameters": lambda p: changed(p, parameters=lambda t: 2 * t),
    "deterministic": lambda p: changed(p, deterministic=lambda flag: not flag),
    "all": lambda p: [getattr(p, n).mul_(1.5) for n in ("mean", "logvar", "std", "var")],
}


@pytest.mark.parametrize("write", list(WRITES))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("deterministic", [False, True])
def test_attributes_are_written_to(write, dtype, deterministic, theirs):
    """The same changes to both: the same samples, KLs and attributes, once patched."""
    p, x = parameters((2, 8, 6, 5), dtype), parameters((2, 4, 6, 5), dtype, seed=2)
    eps = Ours(torch.zeros(2, 8, 6, 5)).sample(torch.Generator().manual_seed(0))
    with vaekl.patch_diffusers():
        patched = getattr(importlib.import_module(theirs.__module__), NAME)
        mine = patched(p.clone(), deterministic=deterministic)
    other = theirs(p.clone(), deterministic=deterministic)
    for each in (mine, other):
        WRITES[write](each)
    for name in ("parameters", "mean", "logvar", "std", "var"):
        assert torch.equal(getattr(mine, name), getattr(other, name)), name
    limits = (
        {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    )
    for a, b in ((mine.kl(), other.kl()), (mine.nll(x), other.nll(x))):
        torch.testing.assert_close(a.float(), b.float(), **limits)
    with peer_packages.fixed_noise(eps):
        expected = other.sample()
    z = mine.sample(torch.Generator().manual_seed(0))
    assert z.dtype == expected.dtype
    torch.testing.assert_close(z, expected, **limits)
    again = pickle.loads(pickle.dumps(mine))
    assert torch.equal(again.sample(torch.Generator().manual_seed(0)), z)


def holders(kind):
    """Modules of diffusers that hold a class."""
    modules = [(n, m) for n, m in sys.modules.items() if n.startswith("diffusers") and m]
    return {n for n, m in modules if any(v is kind for v in list(vars(m).values()))}


def test_patch_reaches_every_module_and_is_undone(home, theirs):
    importlib.import_module("diffusers.models.autoencoders.autoencoder_kl")
    before = holders(theirs)
    assert len(before) > 5
    patch = vaekl.patch_diffusers()
    new = getattr(home, NAME)
    assert issubclass(new, Ours)
    assert holders(new) == before == {n for n in patch.modules if n.startswith("diffusers")}
    assert not holders(theirs)
    again = vaekl.patch_diffusers()  # changes nothing, and undoes nothing
    assert again.modules == ()
    again.undo()
    assert holders(new) == before
    patch.undo()
    patch.undo()
    assert holders(theirs) == before
    assert not holders(new)


def test_patch_as_a_context(home, theirs):
    def fails():
        with vaekl.patch_diffusers() as patch:
            assert patch.modules
            assert getattr(home, NAME) is not theirs
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert getattr(home, NAME) is theirs


def test_modules_imported_while_patched(tmp_path):
    """They get the class from where it is defined, and lose it again; a script's own name too."""
    (tmp_path / "later.py").write_text(f"from diffusers.models.autoencoders.vae import {NAME}\n")
    code = f"""
import vaekl
patch = vaekl.patch_diffusers()
import later
from diffusers.models.autoencoders.vae import {NAME} as mine
assert later.{NAME} is mine and issubclass(mine, vaekl.distributions.{NAME})
patch.undo()
assert later.{NAME}.__module__ == "diffusers.models.autoencoders.vae"
assert mine is later.{NAME}
with vaekl.patch_diffusers() as patch:
    assert issubclass(mine, vaekl.distributions.{NAME})
    assert {{"__main__", "later"}} <= set(patch.modules)
assert mine.__module__ == "diffusers.models.autoencoders.vae"
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture
def autoencoder():
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip


def test_an_autoencoder_is_equal_but_for_the_noise(autoencoder):
    images = torch.rand(2, 3, 16, 16)

    def step():
        """One training step with the mode, and the KL."""
        model = copy.deepcopy(autoencoder)
        posterior = model.encode(images).latent_dist
        decoded = model.decode(posterior.mode()).sample
        loss = (decoded - images).square().sum() + 1e-2 * posterior.kl().sum() / 2
        loss.backward()
        return posterior, loss.detach(), [p.grad for p in model.parameters()]

    posterior, loss, gradients = step()
    with vaekl.patch_diffusers():
        mine, my_loss, my_gradients = step()
        assert isinstance(mine, Ours)
        sampled = autoencoder(images, sample_posterior=True, generator=torch.Generator()).sample
        assert sampled.shape == images.shape
    assert not isinstance(posterior, Ours)
    assert torch.equal(mine.mean, posterior.mean)
    torch.testing.assert_close(my_loss, loss)
    for a, b in zip(my_gradients, gradients):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_a_patched_distribution_can_be_pickled():
    with vaekl.patch_diffusers():
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        posterior = DiagonalGaussianDistribution(parameters((2, 4, 3, 3)))
    again = pickle.loads(pickle.dumps(posterior))
    assert torch.equal(again.kl(), posterior.kl())


def test_same_shapes_as_the_cases():
    """The shapes that are timed are among those compared here."""
    timed = {c.shapes[0] for c in peer_cases.CASES if c.package == "diffusers" and "SD" in c.what}
    assert timed <= set(IMAGES)
