"""Checks of what an experiment returns. They run while a step is traced, so they cost nothing."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from trainer.errors import UserError
from trainer.experiment import Collections
from trainer.metrics import Mean, Metrics


def check_loss(result: Any) -> tuple[Metrics, Collections]:
    """The result of a loss if it is as the protocol says. Runs while a step is traced, so it costs nothing."""
    if not (isinstance(result, tuple) and [isinstance(part, Mapping) for part in result] == [True, True]):
        raise UserError(
            "loss must return a pair of mappings, (metrics, collections); without collections (metrics, {})"
        )
    metrics, collections = result
    if "loss" not in metrics:
        raise UserError(f"loss must return a metric named 'loss', not only {sorted(metrics)}")
    for name, mean in metrics.items():
        if not isinstance(mean, Mean):
            kind = "an array" if isinstance(mean, jax.Array) else f"a {type(mean).__name__}"
            raise UserError(f"metric {name!r} must be a Mean, such as Mean.of(values, batch['mask']), not {kind}")
        if jnp.shape(mean.total) or jnp.shape(mean.weight):
            shapes = f"{jnp.shape(mean.total)}, {jnp.shape(mean.weight)}"
            raise UserError(f"metric {name!r} must hold two scalars; its total and weight have shapes {shapes}")
    return metrics, collections


def carried_collections(given: Collections, returned: Collections) -> Collections:
    """The returned collections without sown intermediates, if they have the structure of those that `init` returned."""
    returned = {name: collection for name, collection in returned.items() if name != "intermediates"}
    for name in sorted(given.keys() | returned.keys()):
        if name not in given:
            raise UserError(
                f"loss returns the collection {name!r}, which init does not: if the model sows it, pop it and add it "
                f"to the loss, as in collections.pop({name!r}); else return it from init as well"
            )
        if name not in returned:
            raise UserError(
                f"init returns the collection {name!r}, which loss does not: return it from loss as apply gives it "
                f"(mutable=[{name!r}]), or leave it out in init if the model sows it"
            )
        if jax.tree.structure(given[name]) != jax.tree.structure(returned[name]):
            raise UserError(
                f"loss returns the collection {name!r} with other entries than init: a sown collection grows with "
                "every call, so leave it out in init and pop it in loss"
            )
    return returned
