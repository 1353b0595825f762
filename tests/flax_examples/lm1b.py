"""Flax's lm1b transformer on the bytes of Flax's own sources: `lm1b_models.py` is examples/lm1b/models.py of Flax."""

import dataclasses
from pathlib import Path

import flax
import jax.numpy as jnp
import lm1b_models  # pyrefly: ignore[missing-import] - from Flax
import numpy as np
import optax

from trainer import ArraySource, Evaluation, Group, Mean, Optimizer, Run, Schedule
from trainer.metrics import Perplexity


@dataclasses.dataclass
class Sources:
    length: int = 64
    width: int = 128
    layers: int = 2

    def _model(self, train):
        config = lm1b_models.TransformerConfig(
            vocab_size=256,
            output_vocab_size=256,
            emb_dim=self.width,
            qkv_dim=self.width,
            mlp_dim=4 * self.width,
            num_heads=4,
            num_layers=self.layers,
            max_len=self.length,
            deterministic=not train,
        )
        return lm1b_models.TransformerLM(config)

    def init(self, key, batch):
        return self._model(train=False).init(key, batch["tokens"])

    def loss(self, variables, batch, *, key, train):
        tokens = batch["tokens"].astype(jnp.int32)
        logits = self._model(train).apply(variables, tokens, rngs={"dropout": key})
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
        weights = (tokens > 0) * batch["mask"][:, None]
        return {"loss": Mean.of(losses, weights), "perplexity": Perplexity.of(losses, weights)}, {}

    def source(self, split):
        files = sorted(Path(flax.__file__).parent.rglob("*.py"))
        files = files[::10] if split == "test" else [file for i, file in enumerate(files) if i % 10]
        text = np.frombuffer(b"\n".join(file.read_bytes() for file in files), np.uint8)
        return ArraySource({"tokens": text[: len(text) // self.length * self.length].reshape(-1, self.length)})


def get_config():
    optimizer = Optimizer(
        schedule=Schedule("inverse_sqrt", peak=2e-3, warmup=100),
        clip_norm=1.0,
        labels=((r".*/kernel", "decayed"), (".*", "plain")),
        groups={"decayed": Group(weight_decay=0.1), "plain": Group()},
    )
    return Run(Sources(), total_steps=1000, batch_size=32, optimizer=optimizer, evaluation=Evaluation(every_steps=500))
