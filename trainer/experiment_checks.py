"""Checks of what an experiment returns. They run while a step is traced or built, so they cost no time of a step."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from trainer.errors import UserError, model_errors
from trainer.experiment import Collections, Experiment
from trainer.metrics import Mean, Metric, Metrics
from trainer.rules import path_of

_RESERVED = {"grad_norm", "learning_rate", "examples"}


def check_loss(result: Any) -> tuple[Metrics, Collections]:
    """The result of `Experiment.loss`; raises `UserError` unless it is as the protocol says."""
    if not (isinstance(result, tuple) and [isinstance(part, Mapping) for part in result] == [True, True]):
        raise UserError(
            "loss must return a pair of mappings, (metrics, collections); without collections (metrics, {})"
        )
    metrics, collections = result
    if "loss" not in metrics:
        raise UserError(f"loss must return a metric named 'loss', not only {sorted(metrics)}")
    if taken := sorted(_RESERVED & metrics.keys()):
        raise UserError(f"metric {taken[0]!r} has the name of a number that every run logs; name it otherwise")
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


def abstract_params(
    experiment: Experiment, init_variables: Callable[[], Any], spec: Mapping[str, jax.ShapeDtypeStruct]
) -> Any:
    """The parameters of `init_variables` as shapes and dtypes, in the boxes that name their logical axes."""
    with model_errors(spec):
        variables = jax.eval_shape(init_variables)
    if not isinstance(variables, Mapping):
        kind = "an array" if hasattr(variables, "dtype") else f"a {type(variables).__name__}"
        raise UserError(f"{type(experiment).__name__}.init must return a mapping with 'params', not {kind}")
    if not jax.tree.leaves(variables.get("params")):
        raise UserError(f"{type(experiment).__name__}.init returned no parameters, only {sorted(variables)}")
    return variables["params"]


def check_same_shapes(before: Any, after: Any) -> None:
    """Raises `UserError` unless a step returns a state with the structure, shapes and dtypes of the one before."""
    flat, new_flat = ({path_of(k): x for k, x in jax.tree_util.tree_leaves_with_path(s)} for s in (before, after))
    for name, old in flat.items():
        if (new := new_flat.get(name)) is None:
            raise UserError(f"a step returns a state without {name}; its arrays must stay the same")
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise UserError(f"a step turns {name} from {old.dtype}{list(old.shape)} into {new.dtype}{list(new.shape)}")
    if more := [name for name in new_flat if name not in flat]:
        raise UserError(f"a step adds {more[0]} to the state; its arrays must stay the same")
    if jax.tree.structure(before) != jax.tree.structure(after):
        raise UserError("a step returns a state of another structure, with the same arrays; it must stay the same")
