"""A task whose metrics name every example of every global batch, and whose source can fail in one process.

It has every optional method that computes on all processes together.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from tests.tasks import Net, Task
from trainer.data import ArraySource
from trainer.metrics import Mean
from trainer.report import on_host

BATCH = 16
EXAMPLES = 21  # of Task's test split: two batches of 8, and one in which the last of four processes has no example


@dataclasses.dataclass
class Traced(Task):
    """`id_j` is the id of example j of a training batch, `noise_j` a number drawn with its key.

    `drawn_j` is a number that was drawn for it on the host, by which its input was moved.
    """

    dropout: float = 0.2
    noise: float = 0.3
    broken_in: int = -1  # the process whose source fails
    differs = 0.0  # no setting: by how much what process i + 1 evaluates is larger than what process i does
    silent_in = -1  # no setting: the process that returns None

    def augment(self, example, rng):
        drawn = rng.random(dtype=np.float32)
        return {**example, "x": example["x"] + drawn, "drawn": drawn}

    def loss(self, variables, batch, *, key, train):
        metrics, collections = super().loss(variables, batch, key=key, train=train)
        one = jnp.ones((), jnp.float32)
        if train:
            drawn = jax.vmap(jax.random.normal)(batch["example_key"])
            for j in range(BATCH):
                metrics[f"id_{j}"] = Mean(batch["id"][j].astype(jnp.float32), one)
                metrics[f"noise_{j}"] = Mean(drawn[j], one)
                metrics[f"drawn_{j}"] = Mean(batch["drawn"][j], one)
        else:  # each example's share of all that were seen
            for i in range(EXAMPLES):
                metrics[f"share_{i}"] = Mean.of(batch["id"] == i, batch["mask"])
        return metrics, collections

    def predict(self, variables, batch):
        return {
            "id": batch["id"],
            "logits": Net(self.dropout, self.batch_norm).apply(variables, batch["x"], train=False),
        }

    def evaluate(self, name, variables, batches):
        """Of "own": the accuracy, and the largest logit, which is found on the host."""
        if name != "own":
            return None
        hits, count, largest = 0.0, 0.0, []
        for batch in batches:
            logits = _logits(Net(self.dropout, self.batch_norm), variables, batch["x"], jax.random.key(7))
            hits += float(jnp.sum((logits.argmax(-1) == batch["label"]) * batch["mask"]))
            count += float(jnp.sum(batch["mask"]))
            largest.append(on_host(logits).max())
        if jax.process_index() == self.silent_in:
            return None
        return {"accuracy": hits / count, "largest": max(largest) + self.differs * jax.process_index()}

    def report(self, step, variables, writer):
        writer.histogram("weights", variables["params"]["head"]["kernel"])
        writer.image("kernel", variables["params"]["dense"]["kernel"])

    def source(self, split):
        arrays = super().source(split).arrays
        source = ArraySource(arrays | {"id": np.arange(len(arrays["label"]), dtype=np.int32)})
        return Broken(source.arrays) if split == "train" and jax.process_index() == self.broken_in else source


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, variables, x, key):
    """With noise too small to change an accuracy: a key, like other small arrays, is not on all devices."""
    logits = model.apply(variables, x, train=False)
    return logits + 1e-6 * jax.random.normal(key, logits.shape)


class Broken(ArraySource):
    """A source of which no batch can be read."""

    def take(self, indices):
        raise OSError("the disk is gone")
