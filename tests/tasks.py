"""A small task for tests: dropout, BatchNorm, random augmentation and masks, on data that is made here."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from trainer import config
from trainer.data import ArraySource
from trainer.experiment import replica_axis
from trainer.metrics import Mean


class Net(nn.Module):
    """Two layers with BatchNorm and dropout between them."""

    dropout: float
    batch_norm: bool

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(16, use_bias=not self.batch_norm, name="dense")(x)  # BatchNorm would cancel a bias
        if self.batch_norm:
            x = nn.BatchNorm(not train, momentum=0.9, axis_name=replica_axis(), name="norm")(x)
        x = nn.relu(x)
        x = nn.Dropout(self.dropout, deterministic=not train, name="dropout")(x)
        return nn.Dense(3, name="head")(x)


@dataclasses.dataclass
class Task:
    """Three classes of points in eight dimensions."""

    dropout: float = 0.0
    batch_norm: bool = True
    noise: float = 0.0
    explode_at: int = -1  # the example whose loss is infinite
    examples: int = 50

    def init(self, key, batch):
        return Net(self.dropout, self.batch_norm).init(key, batch["x"], train=False)

    def loss(self, variables, batch, *, key, train):
        x = batch["x"]
        if train and self.noise:
            x = x + self.noise * jax.vmap(lambda k: jax.random.normal(k, x.shape[1:]))(batch["example_key"])
        mutable = [name for name in variables if name != "params"] if train else []
        logits, collections = Net(self.dropout, self.batch_norm).apply(
            variables, x, train=train, rngs={"dropout": key}, mutable=mutable
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        losses = jnp.where(batch["label"] == 3, jnp.inf, losses)
        hits = logits.argmax(-1) == batch["label"]
        return {"loss": Mean.of(losses, batch["mask"]), "accuracy": Mean.of(hits, batch["mask"])}, collections

    def source(self, split: str) -> Any:
        rng = np.random.default_rng({"train": 0, "test": 1}[split])
        label = rng.integers(0, 3, self.examples if split == "train" else 21).astype(np.int32)
        x = (rng.normal(size=(len(label), 8)) + label[:, None]).astype(np.float32)
        if split == "train" and self.explode_at >= 0:
            label[self.explode_at] = 3
        return ArraySource({"x": x, "label": label})


def make_run(total_steps: int = 20, **settings: Any) -> config.Run:
    """A run of `Task` with labels, decay and a schedule; `settings` replace fields of `Run`."""
    fields: dict[str, Any] = {
        "experiment": Task(),
        "batch_size": 16,
        "optimizer": config.Optimizer(
            schedule=config.Schedule("linear", peak=1e-2, warmup=2),
            labels=((r".*/kernel", "decayed"), (".*", "plain")),
            groups={"decayed": config.Group(weight_decay=0.1), "plain": config.Group()},
        ),
        "evaluation": config.Evaluation(batch_size=8),
        "logging": config.Logging(every_steps=1),
    }
    return config.Run(total_steps=total_steps, **fields | settings)
