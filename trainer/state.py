"""TrainState: everything a run carries from one step to the next, as arrays."""

from typing import Any

import flax.struct
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int32, Key

from trainer.experiment import Batch, Experiment


@flax.struct.dataclass
class TrainState:
    """Arrays only: no functions, no config and no random key, since keys and data follow from (seed, step).

    Attributes:
      step: the number of updates made.
      params: the trained parameters.
      collections: every other variable collection of the model, such as "batch_stats"; empty for many models.
      opt_state: the optimizer's state, moments and counts.
    """

    step: Int32[Array, ""]
    params: Any
    collections: Any
    opt_state: Any


def init_state(
    experiment: Experiment, optimizer: optax.GradientTransformation, key: Key[Array, ""], batch: Batch
) -> TrainState:
    """The state before the first step. Pure: run it under `jax.jit` or `jax.eval_shape`."""
    variables = dict(experiment.init(key, batch))
    params = variables.pop("params")
    return TrainState(jnp.zeros((), jnp.int32), params, variables, optimizer.init(params))
