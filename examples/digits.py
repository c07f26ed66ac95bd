"""Train a small VAE with a 2-D latent on real handwritten digits, with vaekl as its loss.

    python examples/digits.py

The model is an MLP on scikit-learn's 8x8 digits. The loss is the negative ELBO in nats: binary
cross-entropy summed over the pixels (grey values as probabilities, as in the Keras example) plus
the KL, averaged over the batch. Three figures and ``summary.json`` go to ``--out``.

At the end the same training runs again with the plain torch loss and the same noise, and the two
loss curves are compared. The exit status is 1 if they differ by more than rounding.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

import vaekl
from vaekl.reference import SEED_OFFSET, normal, torch_reparameterize_kl

# Limits of the check, relative to the loss of an epoch. For 100 epochs two right trainings stay
# within 1e-7 of each other (14 seeds on a CPU), as do two plain ones with noise 1 ulp apart, while
# a KL or standard deviation wrong by 1e-5 of itself shows as more than 1e-6. Much longer trainings
# amplify what rounding left: up to 7e-4 in 400 epochs.
EARLY_EPOCHS, EARLY_LIMIT, LIMIT = 100, 1e-6, 1e-2

# (mu, logvar, seed) -> (z, kl, kl_of_mean): all that the two trainings differ in.
Loss = Callable[[Tensor, Tensor, int], tuple[Any, Any, Any]]


class Terms(NamedTuple):
    """Averages over images, in nats."""

    elbo: float  # the evidence lower bound, -(reconstruction + kl): what training raises
    reconstruction: float
    kl: float
    kl_of_mean: float
    gap: float  # kl - kl_of_mean: what the codes spend on differing from one another

    def __str__(self) -> str:
        return f"ELBO {self.elbo:.2f}  KL {self.kl:.3f}  KL of mean {self.kl_of_mean:.3f}"


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Two smooth hidden layers: at the kinks of ReLU, rounding errors would grow quickly."""
    first, second = nn.Linear(inputs, hidden), nn.Linear(hidden, hidden)
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Linear(hidden, outputs))


class VAE(nn.Module):
    """An encoder from pixels to mu and logvar, and a decoder from z to pixel logits."""

    def __init__(self, pixels: int = 64, hidden: int = 128, latent: int = 2) -> None:
        super().__init__()
        self.encoder = mlp(pixels, hidden, 2 * latent)
        self.decoder = mlp(latent, hidden, pixels)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """mu and logvar, as views of one tensor: vaekl reads them where they are."""
        mu, logvar = self.encoder(images).chunk(2, dim=-1)
        return mu, logvar


def vaekl_loss(mu: Tensor, logvar: Tensor, seed: int, backend: str) -> tuple[Any, Any, Any]:
    """(z, kl, kl_of_mean) by vaekl, in one call."""
    return vaekl.reparameterize_kl(mu, logvar, seed=seed, backend=backend)


def plain_loss(mu: Tensor, logvar: Tensor, seed: int) -> tuple[Any, Any, Any]:
    """The same by plain torch and autograd, fed the noise that vaekl's seed stands for."""
    eps = torch.from_numpy(normal(seed, SEED_OFFSET, *mu.shape).astype(np.float32))
    return torch_reparameterize_kl(mu, logvar, eps.to(mu.device))


def noise_seed(run_seed: int, step: int) -> int:
    """A seed of its own for every step of every run; step 0 is the evaluation."""
    return (run_seed << 32) + step


def loss_terms(model: VAE, images: Tensor, loss: Loss, seed: int) -> Tensor:
    """The Terms of some images, as one tensor; the loss is minus the first."""
    mu, logvar = model.encode(images)
    z, kl, kl_of_mean = loss(mu, logvar, seed)
    bce = binary_cross_entropy_with_logits(model.decoder(z), images, reduction="sum") / len(images)
    return torch.stack([-(bce + kl), bce, kl, kl_of_mean, kl - kl_of_mean])


def train(
    images: Tensor, loss: Loss, epochs: int, seed: int, report: Callable[[int, Terms], None]
) -> tuple[VAE, list[Terms]]:
    """The model and its averages in each epoch; the seed fixes weights, data order and noise."""
    torch.manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    model = VAE().to(images.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    history, step = [], 0
    for epoch in range(1, epochs + 1):
        totals = np.zeros(len(Terms._fields))
        for indices in torch.randperm(len(images), generator=order).split(128):
            step += 1
            batch = images[indices.to(images.device)]
            values = loss_terms(model, batch, loss, noise_seed(seed, step))
            optimizer.zero_grad()
            (-values[0]).backward()
            optimizer.step()
            totals += len(indices) * np.array(values.tolist())
        history.append(Terms(*(totals / len(images)).tolist()))
        report(epoch, history[-1])
    return model, history


@contextmanager
def reporting(console: Console, name: str, epochs: int) -> Iterator[Callable[[int, Terms], None]]:
    """A progress bar on a terminal, some ten lines elsewhere."""
    live = sys.stdout.isatty() and not console.is_dumb_terminal
    before, after = TextColumn("{task.description}"), TextColumn("{task.fields[averages]}")
    columns = (before, BarColumn(bar_width=12), MofNCompleteColumn(), after)
    with Progress(*columns, console=console, disable=not live) as progress:
        task = progress.add_task(name, total=epochs, averages="")

        def report(epoch: int, averages: Terms) -> None:
            progress.update(task, completed=epoch, averages=averages)
            if not live and (epoch % max(1, epochs // 10) == 0 or epoch == epochs):
                console.print(f"{name}  epoch {epoch}/{epochs}  {averages}", soft_wrap=True)

        yield report


def draw_reconstructions(path: Path, images: Tensor, labels: Any, model: VAE) -> None:
    """The first image of each digit above what the decoder makes of its mu."""
    originals = images[[int(np.argmax(labels == digit)) for digit in range(10)]]
    decoded = torch.sigmoid(model.decoder(model.encode(originals)[0]))
    figure = Figure(figsize=(11, 2.4), layout="constrained")
    grid = figure.subplots(2, 10)
    for axes, pixels in zip(grid.flat, torch.cat([originals, decoded]).cpu().numpy()):
        axes.imshow(pixels.reshape(8, 8), cmap="gray_r", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
    for axes, name in zip(grid[:, 0], ("original", "reconstruction")):
        axes.set_ylabel(name, rotation=0, ha="right", va="center", labelpad=8)
    figure.savefig(path, dpi=150)


def draw_latent(path: Path, mu: Any, labels: Any) -> None:
    """mu of each image, drawn as its digit."""
    figure = Figure(figsize=(8, 7), layout="constrained")
    axes = figure.subplots()
    for digit in range(10):
        x, y = mu[labels == digit].T
        axes.scatter(x, y, s=60, marker=f"${digit}$", linewidths=0.3, label=f"digit {digit}")
    axes.set(title=f"Codes of {len(mu)} test images", xlabel="mu[0]", ylabel="mu[1]", aspect=1)
    figure.legend(loc="outside right center", frameon=False)
    figure.savefig(path, dpi=150)


def draw_kl(path: Path, history: list[Terms]) -> None:
    """Both KLs over the epochs, and what lies between them."""
    epochs = range(1, len(history) + 1)
    kl, kl_of_mean = [row.kl for row in history], [row.kl_of_mean for row in history]
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(epochs, kl, ".-", color="tab:blue", markersize=4, label="KL")
    axes.fill_between(epochs, kl_of_mean, kl, color="0.9", label="gap")
    axes.plot(epochs, kl_of_mean, ".-", color="tab:orange", markersize=4, label="KL of mean")
    axes.set(title="Both KLs during training", xlabel="epoch", ylabel="nats per image")
    axes.set(xlim=(0, len(epochs) + 1), ylim=(0, 1.1 * max(kl)))
    axes.legend(loc="lower right", frameon=False)
    meaning = "The gap, KL minus KL of mean, is what the codes spend on differing from one another."
    figure.supxlabel(f"{meaning}\nIf it were 0, all images would share one code.", fontsize=12)
    figure.savefig(path, dpi=150)


def table(results: dict[str, Terms], setup: dict[str, Any]) -> Table:
    """The averages of each data set, and the set-up."""
    rows = Table("nats per image", title="VAE on 8x8 digits")
    for name in results:
        rows.add_column(name, justify="right")
    labels = ("ELBO", "reconstruction", "KL", "KL of mean", "gap")
    for label, *values in zip(labels, *results.values()):
        rows.add_row(label, *(f"{value:.3f}" for value in values))
    rows.add_section()
    for name, value in setup.items():
        rows.add_row(name.replace("_", " "), str(value))
    return rows


def compare(ours: list[Terms], theirs: list[Terms]) -> dict[str, Any]:
    """The largest relative difference of the two loss curves, and whether it is rounding."""
    difference = np.array([abs(a.elbo / b.elbo - 1) for a, b in zip(ours, theirs)])
    early, whole = float(difference[:EARLY_EPOCHS].max()), float(difference.max())
    passed = early <= EARLY_LIMIT and whole <= LIMIT
    return {"early_difference": early, "difference": whole, "passed": passed}


def load(device: torch.device) -> tuple[dict[str, Tensor], Any]:
    """Train and test images, rows of 64 pixels in [0, 1], and the digits on the test images."""
    pixels, digits = load_digits(return_X_y=True)
    split = train_test_split(pixels, digits, test_size=0.2, stratify=digits, random_state=0)
    images = [torch.tensor(part / 16, dtype=torch.float32, device=device) for part in split[:2]]
    return dict(zip(("train", "test"), images)), split[3]


def arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        description="Train a small VAE on scikit-learn's handwritten digits with vaekl as its "
        "loss, draw it, and check the loss curve against plain torch.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--epochs", type=int, default=120, help="passes over the training images")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data order and noise")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the results")
    parser.add_argument("--device", default=device, help="where to train: cpu, cuda, cuda:1")
    args = parser.parse_args()
    if args.epochs < 1:
        parser.error(f"--epochs must be at least 1, got {args.epochs}")
    if not 0 <= args.seed < 2**31:
        parser.error(f"--seed must be in [0, 2**31), got {args.seed}")
    try:
        torch.zeros(1, device=args.device).tolist()
        args.out.mkdir(parents=True, exist_ok=True)
    except (AssertionError, RuntimeError, OSError) as error:
        parser.error(f"cannot use --device or --out: {str(error).splitlines()[0]}")
    return args


def main() -> int:
    """Train, draw, check; the exit status."""
    started = time.perf_counter()
    args, console = arguments(), Console(highlight=False)
    matplotlib.rcParams["font.size"] = 13
    device = torch.device(args.device)
    images, labels = load(device)
    backend, needs = ("triton", "triton") if device.type == "cuda" else ("cpu", "numba")
    if importlib.util.find_spec(needs) is None:  # as backend="auto" chooses
        backend = "eager"
    loss = partial(vaekl_loss, backend=backend)

    training = time.perf_counter()
    with reporting(console, "vaekl", args.epochs) as report:
        model, history = train(images["train"], loss, args.epochs, args.seed, report)
    seconds = time.perf_counter() - training
    with reporting(console, "plain", args.epochs) as report:
        _, plain_history = train(images["train"], plain_loss, args.epochs, args.seed, report)
    check = compare(history, plain_history)

    with torch.no_grad():
        seed = noise_seed(args.seed, 0)
        results = {k: Terms(*loss_terms(model, x, loss, seed).tolist()) for k, x in images.items()}
        draw_reconstructions(args.out / "reconstructions.png", images["test"], labels, model)
        draw_latent(args.out / "latent.png", model.encode(images["test"])[0].cpu().numpy(), labels)
    draw_kl(args.out / "kl.png", history)

    gpu = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    setup = {
        "vaekl": vaekl.__version__,
        "torch": torch.__version__,
        "device": f"{device}{gpu}",
        "backend": backend,
        "seed": args.seed,
        "epochs": args.epochs,
        "train_seconds": round(seconds, 1),
        "wall_seconds": round(time.perf_counter() - started, 1),
    }
    summary = {**setup, **{k: row._asdict() for k, row in results.items()}, "check": check}
    (args.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")

    console.print(table(results, setup))
    console.print(
        f"Check against the plain torch loss: {'passed' if check['passed'] else 'FAILED'}.\n"
        f"Largest relative difference of the two loss curves: {check['early_difference']:.1e}\n"
        f"in the first {EARLY_EPOCHS} epochs (limit {EARLY_LIMIT:.0e}), "
        f"{check['difference']:.1e} in all (limit {LIMIT:.0e})."
    )
    line = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in setup.items())
    console.print(f"{results['train']}  gap {results['train'].gap:.3f} ({line})", soft_wrap=True)
    return 0 if check["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
