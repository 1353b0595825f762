"""A Flax/Linen training harness. From Python: `from trainer import train`."""

import importlib
from typing import Any

_EXPORTS = {
    "ArraySource": "trainer.data",
    "Experiment": "trainer.experiment",
    "Mean": "trainer.metrics",
    "Run": "trainer.config",
    "TfdsSource": "trainer.data.tfds",
    "TrainState": "trainer.state",
    "UserError": "trainer.errors",
    "adabelief": "trainer.optim.adabelief",
    "train": "trainer.loop",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    # Importing JAX takes a second; `--help` and mistyped flags should not wait for it.
    if name not in _EXPORTS:
        raise AttributeError(f"module 'trainer' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)
