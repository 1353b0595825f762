"""Flax's ImageNet ResNet-18, with BatchNorm, on digits: `resnet_models.py` is examples/imagenet/models.py of Flax."""

import dataclasses

import jax
import numpy as np
import optax
import resnet_models  # pyrefly: ignore[missing-import] - from Flax
from sklearn.datasets import load_digits

from trainer import ArraySource, Evaluation, Group, Mean, Optimizer, Run, Schedule
from trainer.metrics import Accuracy


@dataclasses.dataclass
class Digits:
    filters: int = 64

    def _apply(self, variables, images, train):
        model = resnet_models.ResNet18(num_classes=10, num_filters=self.filters)

        def run(images):
            return model.apply(variables, images, train=train, mutable=["batch_stats"] if train else [])

        # The model names an axis: here one of size 1, since arrays are global (docs/migrate.md).
        logits, collections = jax.vmap(run, axis_name="batch", out_axes=(0, None))(images[None])
        return logits[0], collections

    def init(self, key, batch):
        return resnet_models.ResNet18(num_classes=10, num_filters=self.filters).init(key, batch["image"], train=False)

    def loss(self, variables, batch, *, key, train):
        logits, collections = self._apply(variables, batch["image"], train)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        accuracy = Accuracy.of(logits, batch["label"], batch["mask"])
        return {"loss": Mean.of(losses, batch["mask"]), "accuracy": accuracy}, collections

    def source(self, split):
        pixels, labels = load_digits(return_X_y=True)
        rows = (np.arange(len(labels)) % 5 == 0) == (split == "test")
        images = np.repeat(np.repeat(pixels[rows].reshape(-1, 8, 8, 1) / 16, 4, 1), 4, 2)
        return ArraySource({"image": np.repeat(images, 3, -1).astype(np.float32), "label": labels[rows]})


def get_config():
    return Run(
        Digits(),
        total_steps=300,
        batch_size=64,
        optimizer=Optimizer(
            "optax.sgd",
            Schedule("cosine", peak=0.1, warmup=50),
            labels=((r".*/kernel", "decayed"), (".*", "plain")),
            groups={"decayed": Group(weight_decay=1e-4), "plain": Group()},
            options={"momentum": 0.9, "nesterov": True},
        ),
        evaluation=Evaluation(every_steps=100),
    )
