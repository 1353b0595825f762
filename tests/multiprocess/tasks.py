"""A task whose metrics name every example of every global batch, and whose source can fail in one process."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from tests.tasks import Task
from trainer.data import ArraySource
from trainer.metrics import Mean

BATCH = 16
EXAMPLES = 21  # of Task's test split: two batches of 8, and one in which the last of four processes has no example


@dataclasses.dataclass
class Traced(Task):
    """`id_j` is the id of example j of a training batch, `noise_j` a number drawn with its key."""

    dropout: float = 0.2
    noise: float = 0.3
    broken_in: int = -1  # the process whose source fails

    def loss(self, variables, batch, *, key, train):
        metrics, collections = super().loss(variables, batch, key=key, train=train)
        one = jnp.ones((), jnp.float32)
        if train:
            drawn = jax.vmap(jax.random.normal)(batch["example_key"])
            for j in range(BATCH):
                metrics[f"id_{j}"] = Mean(batch["id"][j].astype(jnp.float32), one)
                metrics[f"noise_{j}"] = Mean(drawn[j], one)
        else:  # each example's share of all that were seen
            for i in range(EXAMPLES):
                metrics[f"share_{i}"] = Mean.of(batch["id"] == i, batch["mask"])
        return metrics, collections

    def source(self, split):
        arrays = super().source(split).arrays
        source = ArraySource(arrays | {"id": np.arange(len(arrays["label"]), dtype=np.int32)})
        return Broken(source.arrays) if split == "train" and jax.process_index() == self.broken_in else source


class Broken(ArraySource):
    """A source of which no batch can be read."""

    def take(self, indices):
        raise OSError("the disk is gone")
