"""The examples that need a peer, in a short setting."""

import os
import re
import subprocess
import sys

import pytest

from paths import EXAMPLES

pytestmark = pytest.mark.peers


def run(name, *arguments):
    command = [sys.executable, EXAMPLES / name, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.peer("keras")
def test_keras(tmp_path):
    printed = run("keras_vae.py", "--epochs", "2", "--out", tmp_path)
    kl, kl_of_mean = (float(re.findall(rf"{n}: (\S+)", printed)[-1]) for n in ("kl", "kl_of_mean"))
    assert kl >= kl_of_mean > 0
    assert (tmp_path / "manifold.png").stat().st_size > 5000


@pytest.mark.peer("diffusers")
def test_diffusers(tmp_path):
    printed = run("diffusers_autoencoder.py", "--steps", "3", "--out", tmp_path)
    mse, kl = map(float, re.search(r"MSE (\S+)  KL (\S+) nats", printed).groups())
    assert 0 < mse < 10
    assert kl > 0
    assert (tmp_path / "autoencoder.png").stat().st_size > 5000
