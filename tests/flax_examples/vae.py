"""Flax's VAE on binarized Fashion-MNIST: `vae_models.py` is examples/vae/models.py of Flax."""

import dataclasses
import gzip
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import vae_models  # pyrefly: ignore[missing-import] - from Flax

from trainer import ArraySource, Evaluation, Mean, Optimizer, Run, Schedule


@dataclasses.dataclass
class Autoencoder:
    latents: int = 20
    folder: str = "/usr/share/datasets/fashion-mnist"

    def init(self, key, batch):
        return vae_models.model(self.latents).init(key, batch["image"], key)

    def loss(self, variables, batch, *, key, train):
        logits, mean, logvar = vae_models.model(self.latents).apply(variables, batch["image"], key)
        bce = optax.sigmoid_binary_cross_entropy(logits, batch["image"]).sum(-1)
        kld = -0.5 * jnp.sum(1 + logvar - mean**2 - jnp.exp(logvar), -1)
        values = {"loss": bce + kld, "bce": bce, "kld": kld}
        return {name: Mean.of(value, batch["mask"]) for name, value in values.items()}, {}

    def report(self, step, variables, writer):
        images, model = jnp.asarray(self.source("test").arrays["image"][:8]), vae_models.model(self.latents)
        logits, _, _ = model.apply(variables, images, jax.random.key(0))
        both = jnp.concatenate([images, jax.nn.sigmoid(logits)])
        writer.image("reconstructions", both.reshape(-1, 28, 28, 1))
        z = jax.random.normal(jax.random.key(1), (64, self.latents))
        writer.image("samples", model.apply(variables, z, method="generate").reshape(-1, 28, 28, 1))

    def source(self, split):
        name = {"train": "train", "test": "t10k"}[split]
        data = gzip.decompress(Path(self.folder, f"{name}-images-idx3-ubyte.gz").read_bytes())
        images = np.frombuffer(data, np.uint8, offset=16).reshape(-1, 784)
        return ArraySource({"image": (images >= 128).astype(np.float32)})


def get_config():
    optimizer = Optimizer("adam", Schedule(peak=1e-3))
    return Run(Autoencoder(), total_steps=2000, optimizer=optimizer, evaluation=Evaluation(every_steps=500))
