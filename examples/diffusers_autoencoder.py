"""A tiny AutoencoderKL of diffusers, trained on crops of real photos with vaekl's posterior.

    python examples/diffusers_autoencoder.py    (needs diffusers, scikit-learn, matplotlib, rich)

What changes in a training script is one line before the model is used::

    +   vaekl.patch_diffusers()
        posterior = autoencoder.encode(images).latent_dist
        decoded = autoencoder.decode(posterior.sample()).sample

and, where sample and KL are both wanted, one call (and one kernel) instead of two::

    -   z, kl = posterior.sample(), posterior.kl()
    +   z, kl = posterior.sample_and_kl()

``autoencoder.png`` shows crops of a strip of each photo (scikit-learn's two) that training did not
see, and what becomes of them.
"""

import argparse
import itertools
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from matplotlib.figure import Figure
from rich.progress import track
from sklearn.datasets import load_sample_images
from torch import Tensor

import vaekl

SIZE = 16


def photos() -> tuple[list[Tensor], list[Tensor]]:
    """Parts of the photos at half size, [3, 213, width] in [-1, 1]: for training, and unseen."""
    images = [torch.tensor(image).permute(2, 0, 1) for image in load_sample_images().images]
    halves = [torch.nn.functional.avg_pool2d(i.float(), 2) / 127.5 - 1 for i in images]
    parts = [i.split([60, 50, 210], dim=-1) for i in halves]
    return [side for part in parts for side in part[::2]], [part[1] for part in parts]


def crops(images: list[Tensor], count: int, generator: torch.Generator) -> Tensor:
    """Random squares of the images in turn, [count, 3, SIZE, SIZE]."""
    found = []
    for image, _ in zip(itertools.cycle(images), range(count)):
        y, x = (int(torch.randint(n - SIZE, (), generator=generator)) for n in image.shape[1:])
        found.append(image[:, y : y + SIZE, x : x + SIZE])
    return torch.stack(found)


def model() -> AutoencoderKL:
    """Latents of [4, 8, 8] for images of [3, 16, 16]: Stable Diffusion's, but small."""
    down, up = ["DownEncoderBlock2D"] * 2, ["UpDecoderBlock2D"] * 2
    blocks = {"down_block_types": down, "up_block_types": up, "mid_block_add_attention": False}
    channels = {"block_out_channels": [16, 32], "norm_num_groups": 8, "latent_channels": 4}
    autoencoder = AutoencoderKL(**blocks, **channels, sample_size=SIZE)
    torch.nn.init.constant_(
        autoencoder.quant_conv.bias[4:], -6.0
    )  # logvar: start with little noise
    return autoencoder


def draw(path: Path, originals: Tensor, decoded: Tensor) -> None:
    figure = Figure(figsize=(12, 2.8), layout="constrained")
    grid = figure.subplots(2, len(originals))
    for axes, image in zip(grid.flat, torch.cat([originals, decoded.clamp(-1, 1)])):
        axes.imshow((image.permute(1, 2, 0) + 1) / 2)
        axes.set(xticks=[], yticks=[])
    figure.suptitle("unseen crops and their reconstructions")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Train and draw."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("demo"))
    args = parser.parse_args()
    torch.manual_seed(0)
    vaekl.patch_diffusers()
    (train, unseen), generator, autoencoder = photos(), torch.Generator(), model()
    optimizer = torch.optim.Adam(autoencoder.parameters(), lr=5e-3)
    for _ in track(range(args.steps), "training"):
        images = crops(train, 8, generator)
        z, kl = autoencoder.encode(images).latent_dist.sample_and_kl()
        mse = (autoencoder.decode(z).sample - images).square().mean()
        optimizer.zero_grad()
        (mse + 1e-6 * kl.mean()).backward()
        optimizer.step()
    print(f"MSE {mse:.4f}  KL {kl.mean():.0f} nats a crop")
    images = crops(unseen, 10, generator)
    draw(args.out / "autoencoder.png", images, autoencoder(images).sample.detach())


if __name__ == "__main__":
    main()
