"""What a type checker knows about a user's code."""

import subprocess
import sys

import pytest

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


class VAE(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.loss = vaekl.nn.ReparameterizeKL(reduction="sum")

    def forward(self, mu: Tensor, logvar: Tensor) -> vaekl.ReparamKL[Tensor]:
        reveal_type(self.loss(mu, logvar).kl_of_mean)
        return self.loss(mu, logvar, generator=torch.Generator())


reveal_type(vaekl.nn.ReparameterizeKL(kl_of_mean=False)(mu, logvar).kl_of_mean)
reveal_type(vaekl.reparameterize(mu, logvar, eps=mu))
reveal_type(vaekl.kl_loss(mu, logvar))
reveal_type(vaekl.kl_of_mean(mu, logvar, mean_over="all"))
"""
TENSOR = "torch._tensor.Tensor"
REVEALED = [TENSOR] * 4 + ["None", f"{TENSOR} | None", TENSOR, "None"] + [TENSOR] * 3

WRONG = {
    "alone.kl_of_mean.item()": "union-attr|attr-defined",
    "vaekl.kl_loss(mu, logvar, seed=1)": "call-arg",
    "vaekl.reparameterize_kl(mu, 1.0)": "call-overload",
    "vaekl.nn.ReparameterizeKL()(mu)": "call-arg",
}


def mypy(code, folder):
    (folder / "user.py").write_text(code)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "user.py"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_a_users_code(tmp_path):
    pytest.importorskip("mypy")
    done = mypy(SNIPPET, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    notes = [line for line in done.stdout.splitlines() if "Revealed type" in line]
    assert [line.split('"')[1] for line in notes] == REVEALED
    # Mistakes are seen: each added line is an error, of the kind expected.
    lines = [line for line in SNIPPET.splitlines() if "reveal_type" not in line or "out" in line]
    done = mypy("\n".join([*lines, *WRONG]), tmp_path)
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert len(errors) == len(WRONG), done.stdout
    for error, code in zip(errors, WRONG.values()):
        assert any(f"[{c}]" in error for c in code.split("|")), error
