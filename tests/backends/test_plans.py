"""A plan's kept kernel is the one that Triton's ordinary launch would take, whatever is called.

Runs in a process of its own, without the interpreter, over a driver that launches nothing.
"""

import contextlib
import os
import random
import subprocess
import sys

import pytest

from paths import BENCH, ROOT


@pytest.mark.parametrize("calls", [50, pytest.param(400, marks=pytest.mark.slow)])
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_random_calls(target, calls):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT / "tests", BENCH)))
    done = subprocess.run(
        [sys.executable, __file__, target, str(calls)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Exception ignored" not in done.stderr, done.stderr[-3000:]
    kept, mismatches = map(int, done.stdout.split())
    assert kept > calls // 4
    assert mismatches == 0


def fuzz(target, count):
    """(times a kept kernel was taken, times it was not what Triton picks) over random calls."""
    import stub_driver

    stub_driver.use(target)
    import torch
    import triton

    import vaekl
    from vaekl import _validate
    from vaekl.backends import triton as launcher

    _validate._interpreting = lambda: True  # CPU tensors may go to the Triton path
    counts, used = [0, 0], []
    log_prob = vaekl.reparameterize_log_prob
    plain = launcher.Launch.__call__

    def checked(launch, tensors, *others):
        key = others[1:]
        picked = launch.kernel[launch.grid](*tensors, *key, *launch.fixed, **launch.options)
        used.clear()
        plain(launch, tensors, *others)
        for kept in used:
            counts[0] += 1
            counts[1] += kept is not picked

    launcher.Launch.__call__ = checked
    triton.compiler.CompiledKernel.__getitem__ = lambda kept, grid: lambda *_: used.append(kept)
    rng = random.Random(0)

    def tensor(shape, dtype):
        """Zeros that start at 16 bytes or one element past; sometimes one value, expanded."""
        if rng.random() < 0.2:
            return torch.zeros((), dtype=dtype).expand(shape)
        start = rng.choice([0, 0, 1])
        count = max(1, torch.Size(shape).numel())
        return torch.zeros(count + start, dtype=dtype)[start : start + count].view(shape)

    def ids(count):
        """At 16 bytes or one element past."""
        start = rng.choice([0, 1])
        return torch.arange(count + start)[start:]

    def moved(saved):
        """What a hook gives back; the key and the means at 16 bytes or one element past."""
        start = rng.choice([0, 1]) if saved.numel() < 64 else 0
        space = torch.zeros(saved.numel() + start, dtype=saved.dtype)
        return space[start:].view(saved.shape).copy_(saved)

    for _ in range(count):
        dtype = rng.choice([torch.float32, torch.float32, torch.bfloat16])
        mu, logvar = (torch.zeros(64, 20, dtype=dtype, requires_grad=True) for _ in range(2))
        inputs, function, options = (mu, logvar), vaekl.reparameterize_kl, {}
        if rng.random() < 0.3:
            # Halves: in the gradient, which is dense, the second may lie at any address.
            rows, width = rng.choice([(64, 20), (63, 21)])
            wide = torch.zeros(2 * rows, 24, dtype=dtype)[:, :width]
            inputs, function = (wide.requires_grad_(),), vaekl.reparameterize_kl_moments
            options, mu = {"dim": 0}, wide[:rows]
        noise = {"eps": tensor(mu.shape, dtype)} if rng.random() < 0.3 else {}
        if not noise:
            noise = {"seed": rng.choice([0, 1, 16, 2**40, -5])}
        kl_of_mean, prior = rng.random() < 0.7, []
        if rng.random() < 0.4:
            shape = mu.shape[1:] if kl_of_mean or rng.random() < 0.5 else mu.shape
            prior = [tensor(shape, dtype).detach().requires_grad_() for _ in range(2)]
            options["prior"] = tuple(prior)
        if len(inputs) == 2 and rng.random() < 0.25:
            function, options["path_derivative"] = log_prob, rng.random() < 0.5
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t, moved)
        if function is not log_prob:
            options["reduction"] = rng.choice(["none", "batchmean", "per_dim"])
            options["kl_of_mean"] = kl_of_mean
            if "seed" in noise and rng.random() < 0.3:
                noise["sample_ids"] = ids(mu.shape[0])
        with hooks if rng.random() < 0.3 else contextlib.nullcontext():
            for _ in range(2):  # the second finds what the first has left
                out = function(*inputs, backend="triton", **noise, **options)
                outputs = [o for o in out if o is not None]
                used = rng.sample(outputs, rng.randrange(1, len(outputs) + 1))
                upstream = [tensor(o.shape, o.dtype) for o in used]
                torch.autograd.grad(used, (*inputs, *prior), upstream, allow_unused=True)
    return counts


if __name__ == "__main__":
    print(*fuzz(sys.argv[1], int(sys.argv[2])))
