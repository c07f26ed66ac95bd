"""What a type checker knows about a user's code."""

import os
import re
import subprocess
import sys

import pytest

from paths import ROOT

SNIPPET = """
import torch
from torch import Tensor

import vaekl

mu, logvar = torch.zeros(2, 3), torch.zeros(2, 3)

z, kl, kl_of_mean = vaekl.reparameterize_kl(mu, logvar, reduction="none", clamp=(-30, None))
reveal_type(z)
reveal_type(kl)
reveal_type(kl_of_mean)
loss: Tensor = z.sum() + kl.sum() + kl_of_mean

alone = vaekl.reparameterize_kl(mu, logvar, kl_of_mean=False)
reveal_type(alone.kl)
reveal_type(alone.kl_of_mean)


def either(flag: bool) -> vaekl.ReparamKL:
    out = vaekl.reparameterize_kl(mu, logvar, kl_of_mean=flag, seed=1)
    reveal_type(out.kl_of_mean)
    return out


every = vaekl.reparameterize_kl(
    mu, logvar, reduction="sum", kl_of_mean=True, mean_over="all", batch_dims=1, eps=None,
    generator=None, seed=1, clamp=None, backend="eager",
)
reveal_type(every.kl_of_mean)


class VAE(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.loss = vaekl.nn.ReparameterizeKL(reduction="sum")

    def forward(self, mu: Tensor, logvar: Tensor) -> vaekl.ReparamKL[Tensor]:
        reveal_type(self.loss(mu, logvar).kl_of_mean)
        return self.loss(mu, logvar, generator=torch.Generator())


def packed(flag: bool) -> None:
    reveal_type(vaekl.reparameterize_kl_moments(mu, dim=0, clamp=(None, 20)).kl_of_mean)
    reveal_type(vaekl.reparameterize_kl_moments(mu, kl_of_mean=False, eps=mu).kl_of_mean)
    reveal_type(vaekl.reparameterize_kl_moments(mu, kl_of_mean=flag, seed=1).kl_of_mean)
    every = vaekl.reparameterize_kl_moments(
        mu, dim=0, reduction="sum", kl_of_mean=True, mean_over="all", batch_dims=1, eps=None,
        generator=None, seed=1, clamp=None, backend="eager",
    )
    reveal_type(every.kl_of_mean)


every_option = vaekl.nn.ReparameterizeKL(
    reduction="sum", kl_of_mean=True, mean_over="all", batch_dims=1, clamp=None, backend="eager",
    sample_in_eval=True,
)
reveal_type(every_option(mu, logvar).kl_of_mean)

reveal_type(vaekl.nn.ReparameterizeKL(kl_of_mean=False)(mu, logvar).kl_of_mean)
reveal_type(vaekl.reparameterize(mu, logvar, eps=mu))
reveal_type(vaekl.kl_loss(mu, logvar))
reveal_type(vaekl.kl_of_mean(mu, logvar, mean_over="all"))
"""
TENSOR = "torch._tensor.Tensor"
REVEALED = [TENSOR] * 4 + ["None", f"{TENSOR} | None", TENSOR, TENSOR]  # to VAE
REVEALED += [TENSOR, "None", f"{TENSOR} | None", TENSOR, TENSOR]  # packed, and every option
REVEALED += ["None"] + [TENSOR] * 3

WRONG = {
    "alone.kl_of_mean.item()": "attr-defined",
    "vaekl.kl_loss(mu, logvar, seed=1)": "call-arg",
    "vaekl.reparameterize_kl(mu, '1.0')": "call-overload",
    "vaekl.reparameterize_kl(mu, logvar, sede=1)": "call-overload",
    "vaekl.reparameterize_kl(mu, logvar, seed=1.0)": "call-overload",
    "vaekl.reparameterize_kl_moments(mu, axis=1)": "call-overload",
    "vaekl.nn.ReparameterizeKL(seed=1)": "call-overload",
    "vaekl.nn.ReparameterizeKL()(mu)": "call-arg",
}


def test_a_users_code(tmp_path):
    """The types of results; and mistakes, each added line an error of the kind expected."""
    pytest.importorskip("mypy")
    (tmp_path / "user.py").write_text(SNIPPET + "\n".join(WRONG))
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "user.py"]
    # vaekl itself is checked by `make test`; what is wanted of it here are its types.
    command += ["--follow-imports=silent", f"--cache-dir={ROOT / '.mypy_cache' / 'users'}"]
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    notes = [line.split('"')[1] for line in lines if "Revealed type" in line]
    assert notes == REVEALED, done.stdout + done.stderr
    errors = set(re.findall(r"^user\.py:(\d+): error: .*\[(.+)\]$", done.stdout, re.MULTILINE))
    first = SNIPPET.count("\n") + 1
    assert errors == {(str(n), kind) for n, kind in enumerate(WRONG.values(), first)}, done.stdout
