"""A decoder of two layers on data in memory, and a task with large examples."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.language_model import LanguageModel
from tests.tasks import Task
from trainer import config
from trainer.data import ArraySource
from trainer.metrics import Mean


@dataclasses.dataclass
class Decoder(LanguageModel):
    """Two layers, 256 wide, bfloat16."""

    length: int = 128
    vocab: int = 512
    width: int = 256
    layers: int = 2
    heads: int = 4
    mlp_width: int = 1024
    dtype: str = "bfloat16"

    def source(self, split: str) -> ArraySource:
        tokens = np.zeros((4, self.length + 1), np.uint8)
        return ArraySource({"tokens": tokens, "targets": np.full(4, self.length, np.int32)})


def make_run(batch_size: int = 16, strategy: str = "fsdp", **model: Any) -> config.Run:
    """A resolved run of the decoder; `model` replaces its fields."""
    parallel = config.Parallel(strategy=strategy)
    return config.resolve(config.Run(Decoder(**model), total_steps=10, batch_size=batch_size, parallel=parallel))


@dataclasses.dataclass
class Wide(Task):
    """Examples of 4 MiB: some thousands of them fill a device."""

    def source(self, split):
        return ArraySource({"x": np.zeros((1, 2**20), np.float32), "label": np.zeros(1, np.int32)})

    def init(self, key, batch):
        return {"params": {"scale": jnp.ones(2**20)}}

    def loss(self, variables, batch, *, key, train):
        losses = jnp.sum(jnp.tanh(batch["x"] * variables["params"]["scale"]), axis=1)
        return {"loss": Mean.of(losses, batch["mask"])}, {}


@dataclasses.dataclass
class Rematerialised(Wide):
    remat: str = config.setting("none", choices=("none", "full"))
