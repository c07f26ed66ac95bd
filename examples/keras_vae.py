"""The VAE example of Keras, on Keras 3 with the torch backend and vaekl as its loss.

    python examples/keras_vae.py        (needs keras, scikit-learn, matplotlib)

What changes in ``train_step`` of the well-known example (and its Sampling layer goes)::

    -   z = mean + ops.exp(0.5 * logvar) * keras.random.normal(ops.shape(mean), seed=self.seed)
    -   kl = -0.5 * (1 + logvar - ops.square(mean) - ops.exp(logvar))
    -   kl = ops.mean(ops.sum(kl, axis=1))
    +   z, kl, kl_of_mean = vaekl.reparameterize_kl(mean, logvar)

Trained on scikit-learn's 8x8 digits; ``manifold.png`` shows what the plane of codes decodes to.
"""

import argparse
import os
from pathlib import Path

os.environ["KERAS_BACKEND"] = "torch"

import keras
import numpy as np
import torch
from keras import layers, ops
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

import vaekl

NAMES = ("loss", "reconstruction", "kl", "kl_of_mean")


def network(inputs: int, outputs: int, activation: str | None) -> keras.Model:
    sizes = [(128, "relu"), (128, "relu"), (outputs, activation)]
    dense = [layers.Dense(size, activation=function) for size, function in sizes]
    return keras.Sequential([keras.Input((inputs,)), *dense])


class VAE(keras.Model):
    """Dense layers around a latent of two dimensions."""

    def __init__(self, pixels: int = 64, latent: int = 2) -> None:
        super().__init__()
        self.encoder = network(pixels, 2 * latent, None)
        self.decoder = network(latent, pixels, "sigmoid")
        self.trackers = [keras.metrics.Mean(name=name) for name in NAMES]

    @property
    def metrics(self) -> list[keras.metrics.Mean]:
        return list(self.trackers)  # averages over an epoch, in nats per image

    def call(self, images: torch.Tensor) -> torch.Tensor:
        """Images as the decoder makes them of the mean."""
        return self.decoder(ops.split(self.encoder(images), 2, axis=1)[0])

    def train_step(self, images: torch.Tensor) -> dict[str, float]:
        """One step on a batch."""
        mean, logvar = ops.split(self.encoder(images), 2, axis=1)
        z, kl, kl_of_mean = vaekl.reparameterize_kl(mean, logvar)
        pixels = images.shape[1]
        bce = pixels * ops.mean(keras.losses.binary_crossentropy(images, self.decoder(z)))
        loss = bce + kl
        self.zero_grad()
        loss.backward()
        with torch.no_grad():
            gradients = [weight.value.grad for weight in self.trainable_weights]
            self.optimizer.apply(gradients, self.trainable_weights)
        for tracker, value in zip(self.trackers, (loss, bce, kl, kl_of_mean)):
            tracker.update_state(value.detach())
        return {name: tracker.result() for name, tracker in zip(NAMES, self.trackers)}


def draw_manifold(path: Path, vae: VAE, count: int = 12) -> None:
    """The decoder's images on a grid of codes in [-2, 2]."""
    line = np.linspace(-2, 2, count, dtype="float32")
    codes = np.array([(x, y) for y in line[::-1] for x in line])
    images = ops.convert_to_numpy(vae.decoder(codes)).reshape(count, count, 8, 8)
    images = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1))).transpose(0, 2, 1, 3)
    axes = Figure(figsize=(6, 6), layout="constrained").add_subplot()
    axes.imshow(images.reshape(10 * count, 10 * count), cmap="gray_r")
    axes.set(xticks=[], yticks=[], title="codes from -2 to 2 along both axes")
    path.parent.mkdir(parents=True, exist_ok=True)
    axes.figure.savefig(path, dpi=120)


def main() -> None:
    """Train with Keras's own progress bar, and draw."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("demo"))
    args = parser.parse_args()
    keras.utils.set_random_seed(0)
    vae = VAE()
    vae.compile(optimizer=keras.optimizers.Adam(2e-3))
    vae.fit(load_digits().data.astype("float32") / 16, epochs=args.epochs, batch_size=128)
    draw_manifold(args.out / "manifold.png", vae)


if __name__ == "__main__":
    main()
