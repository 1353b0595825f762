"""Checks of what an experiment returns. They run while a step is traced, so they cost nothing."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from trainer.errors import UserError
from trainer.experiment import Collections
from trainer.metrics import Mean, Metric, Metrics


def check_loss(result: Any) -> tuple[Metrics, Collections]:
    """The result of a loss if it is as the protocol says. Runs while a step is traced, so it costs nothing."""
    if not (isinstance(result, tuple) and [isinstance(part, Mapping) for part in result] == [True, True]):
        raise UserError(
            "loss must return a pair of mappings, (metrics, collections); without collections (metrics, {})"
        )
    metrics, collections = result
    if "loss" not in metrics:
        raise UserError(f"loss must return a metric named 'loss', not only {sorted(metrics)}")
    for name, metric in metrics.items():
        kind = "an array" if isinstance(metric, jax.Array) else f"a {type(metric).__name__}"
        if name == "loss" and not isinstance(metric, Mean):
            raise UserError(f"metric 'loss' must be a Mean, such as Mean.of(losses, batch['mask']), not {kind}")
        if not isinstance(metric, Metric) or not jax.tree.leaves(metric):
            also = "or another metric with arrays and compute()"
            raise UserError(
                f"metric {name!r} must be a Mean, such as Mean.of(values, batch['mask']), {also}, not {kind}"
            )
        if isinstance(metric, Mean) and (jnp.shape(metric.total) or jnp.shape(metric.weight)):
            shapes = f"{jnp.shape(metric.total)}, {jnp.shape(metric.weight)}"
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
