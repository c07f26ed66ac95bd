"""What happens if a VAE is trained with the KL of the means instead of the mean of the KLs.

    python examples/which_kl.py

Two trainings of the model of ``digits.py`` (an MLP, a 2-D latent, scikit-learn's 8x8 digits), the
same in weights, batches and noise, but for the KL in the loss. The figures and numbers of
docs/which-kl.md come from here: five PNGs and ``summary.json`` go to ``--out``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
import torch
from digits import VAE, Terms, load, loss_terms, noise_seed, reporting, train
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle
from rich.console import Console
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

import vaekl

#: The KL in the loss: what a training is called, and its colour.
LOSSES = {"mean of the KLs": "tab:blue", "KL of the mean": "tab:orange"}
SAMPLES = 8  # along each side of the square of images decoded from the prior


def right_loss(mu: Tensor, logvar: Tensor, seed: int) -> tuple[Any, Any, Any]:
    """(z, kl, kl_of_mean): the second is what digits.train puts into the loss."""
    return vaekl.reparameterize_kl(mu, logvar, seed=seed)


def wrong_loss(mu: Tensor, logvar: Tensor, seed: int) -> tuple[Any, Any, Any]:
    """The same with the two KLs exchanged."""
    z, kl, kl_of_mean = vaekl.reparameterize_kl(mu, logvar, seed=seed)
    return z, kl_of_mean, kl


def exchanged(row: Terms) -> Terms:
    """The averages of a training with the wrong loss, each under its own name again."""
    kl, kl_of_mean = row.kl_of_mean, row.kl
    return Terms(-(row.reconstruction + kl), row.reconstruction, kl, kl_of_mean, kl - kl_of_mean)


def new_figure(width: float, height: float) -> Figure:
    """With some room around what is drawn."""
    figure = Figure(figsize=(width, height))
    figure.set_layout_engine("constrained", h_pad=0.1, w_pad=0.1)
    return figure


def training_labels() -> Any:
    """The digits on the images that digits.load gives for training."""
    digits = load_digits(return_X_y=True)[1]
    return train_test_split(digits, test_size=0.2, stratify=digits, random_state=0)[0]


def draw_latent(path: Path, codes: dict[str, Tensor], labels: Any) -> None:
    """mu of each image, coloured by its digit, and where the prior has its codes."""
    figure = new_figure(12, 6)
    for axes, (name, mu) in zip(figure.subplots(1, 2), codes.items()):
        x, y = mu.T.numpy()
        points = axes.scatter(x, y, s=10, c=labels, cmap="tab10", vmin=-0.5, vmax=9.5)
        axes.add_patch(Circle((0, 0), 2, fill=False, color="black", lw=1.5))
        circle = Line2D([], [], color="black", lw=1.5, label="prior: 2 std")
        reach = 1.08 * max(float(mu.abs().max()), 2.2)
        axes.set(title=f"trained with the {name}", xlabel="mu[0]", ylabel="mu[1]", aspect=1)
        axes.set(xlim=(-reach, reach), ylim=(-reach, reach))
        axes.legend(handles=[circle], loc="lower right")
    figure.colorbar(points, ax=figure.axes, ticks=range(10), label="digit", shrink=0.8)
    figure.savefig(path, dpi=110)


def draw_samples(path: Path, models: dict[str, VAE]) -> None:
    """Images decoded from draws of the prior, the same for both."""
    z = torch.from_numpy(vaekl.reference.normal(1, 0, SAMPLES**2, 2)).float()
    figure = new_figure(10, 5.8)
    for axes, (name, model) in zip(figure.subplots(1, 2), models.items()):
        images = torch.sigmoid(model.decoder(z)).reshape(SAMPLES, SAMPLES, 8, 8)
        framed = torch.nn.functional.pad(images, (1, 1, 1, 1))
        sheet = framed.permute(0, 2, 1, 3).reshape(SAMPLES * 10, SAMPLES * 10)
        axes.imshow(sheet.numpy(), cmap="gray_r", vmin=0, vmax=1)
        axes.set(title=f"trained with the {name}", xticks=[], yticks=[])
    figure.supxlabel("decoded from draws of the prior N(0, I), the same for both", fontsize=13)
    figure.savefig(path, dpi=110)


def draw_kl(path: Path, histories: dict[str, list[Terms]]) -> None:
    """Both KLs over both trainings; logarithmic, or one would hide the other."""
    figure = new_figure(12, 5.4)
    for axes, (name, history) in zip(figure.subplots(1, 2, sharey=True), histories.items()):
        epochs = range(1, len(history) + 1)
        for label, colour in LOSSES.items():
            field = "kl" if label == "mean of the KLs" else "kl_of_mean"
            used = " (in the loss)" if label == name else ""
            values = [getattr(row, field) for row in history]
            axes.plot(epochs, values, color=colour, lw=2, label=label + used)
        axes.set(title=f"trained with the {name}", xlabel="epoch", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
    figure.axes[0].set_ylabel("nats per image")
    figure.savefig(path, dpi=110)


def draw_report(path: Path, report: vaekl.DiagnosticsReport, name: str) -> None:
    """The report's own figure."""
    figure = report.plot()
    figure.axes[0].set_title(f"trained with the {name}")
    figure.savefig(path, dpi=110)


def arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        description="Train a small VAE on handwritten digits twice, with the mean of the KLs and "
        "with the KL of the mean, and draw what becomes of it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--epochs", type=int, default=120, help="passes over the training images")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data order and noise")
    parser.add_argument("--out", type=Path, default=Path("which-kl"), help="folder for the results")
    args = parser.parse_args()
    if args.epochs < 1:
        parser.error(f"--epochs must be at least 1, got {args.epochs}")
    if not 0 <= args.seed < 2**31:
        parser.error(f"--seed must be in [0, 2**31), got {args.seed}")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"cannot use --out: {error}")
    return args


def main() -> int:
    """Train twice, draw, write; the exit status."""
    args, console = arguments(), Console(highlight=False)
    matplotlib.rcParams["font.size"] = 13
    images = load(torch.device("cpu"))[0]
    models, histories, codes, results = {}, {}, {}, {}
    for name, loss in zip(LOSSES, (right_loss, wrong_loss)):
        with reporting(console, name, args.epochs) as progress:

            def show(epoch: int, row: Terms, name: str = name, progress: Any = progress) -> None:
                progress(epoch, row if name == "mean of the KLs" else exchanged(row))

            model, history = train(images["train"], loss, args.epochs, args.seed, show)
        models[name] = model
        histories[name] = [row if loss is right_loss else exchanged(row) for row in history]
        with torch.no_grad():
            mu, logvar = model.encode(images["train"])
            terms = Terms(
                *loss_terms(model, images["train"], right_loss, noise_seed(0, 0)).tolist()
            )
            report = vaekl.diagnose(mu, logvar)
            codes[name] = mu
        results[name] = {
            **terms._asdict(),
            "share_of_codes_within_2_std": (mu.norm(dim=1) < 2).float().mean().item(),
            "report": report.to_dict(per_dimension=True),
            "printed": str(report),
        }
        stem = name.lower().replace("the ", "").replace(" ", "-")
        draw_report(args.out / f"report-{stem}.png", report, name)
        console.print(f"\n[bold]trained with the {name}[/bold]\n{report}\n", soft_wrap=True)
    draw_kl(args.out / "kl.png", histories)
    draw_latent(args.out / "latent.png", codes, training_labels())
    with torch.no_grad():
        draw_samples(args.out / "samples.png", models)
    setup = {"vaekl": vaekl.__version__, "torch": torch.__version__, "epochs": args.epochs,
             "seed": args.seed, "images": len(images["train"])}  # fmt: skip
    text = json.dumps({**setup, "results": results}, indent=1)
    (args.out / "summary.json").write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
