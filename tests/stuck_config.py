"""A run that gets stuck where its argument says, for tests of signals and of the watchdog."""

import dataclasses
import hashlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.tasks import Task, make_run
from trainer import config
from trainer.data import ArraySource


class InC(ArraySource):
    """Its sixth batch is in a call of C that no signal ends and that lets other threads run."""

    calls = 0

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        self.calls += 1
        if self.calls == 6:
            hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
        return super().take(indices)


class Slow:
    """Examples that take `seconds` each from position `start` of the reads on."""

    def __init__(self, source: ArraySource, seconds: float, start: int) -> None:
        self.source, self.seconds, self.left = source, seconds, start

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Any:
        self.left -= 1
        if self.left < 0:
            time.sleep(self.seconds)
        return self.source[index]


def long_to_compile(x: jax.Array) -> jax.Array:
    """Numbers that XLA takes seconds to compile."""
    for i in range(400):
        x = jnp.sort(jnp.sin(jax.lax.stop_gradient(x) + i))
    return x


@dataclasses.dataclass
class Stuck(Task):
    where: str = ""

    def loss(self, variables, batch, *, key, train):
        if train and self.where == "compile":
            batch = {**batch, "x": batch["x"] + 0 * long_to_compile(batch["x"])}
        return super().loss(variables, batch, key=key, train=train)

    def source(self, split: str) -> Any:
        source = super().source(split)
        if split == "train" and self.where == "c":
            return InC(source.arrays)
        if split == "train" and self.where == "data":
            return Slow(source, 1000.0, 400)
        if split == "test" and self.where == "evaluate":
            return Slow(source, 3.0, 10)
        return source


def get_config(where: str) -> config.Run:
    """`c`, `data`, `evaluate` or `compile`; anything else gets stuck nowhere."""
    examples = 2000 if where in ("c", "data") else 50
    run = make_run(100_000, experiment=Stuck(where=where, examples=examples), batch_size=16)
    run.loading = config.Loading(in_memory_bytes=0, threads=1)
    run.evaluation = config.Evaluation(every_steps=4, batch_size=8)
    if where not in ("evaluate", "compile"):
        run.evaluation.every_steps = None
    run.checkpoint = config.Checkpoint(every_steps=1 if where == "save" else 1000)
    return run
