"""TrainState: everything a run carries from one step to the next, as arrays."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
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
      ema: a mean of the parameters over the updates, in float32 or wider; None where none is kept.
    """

    step: Int32[Array, ""]
    params: Any
    collections: Any
    opt_state: Any
    ema: Any = None


def init_state(
    experiment: Experiment,
    optimizer: optax.GradientTransformation,
    key: Key[Array, ""],
    batch: Batch,
    *,
    ema: bool = False,
) -> TrainState:
    """The state before the first step, with or without a mean. Pure: run it under `jax.jit` or `jax.eval_shape`."""
    variables = dict(nn.unbox(experiment.init(key, batch)))
    params = variables.pop("params")
    mean = jax.tree.map(_at_least_float32, params) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, variables, optimizer.init(params), mean)


def update_ema(ema: Any, params: Any, step: Int32[Array, ""], decay: float) -> Any:
    """The mean after an update: e + (p − e)·(1 − d), where d = min(decay, t / (t + 1)) after t updates before it.

    So the first 1 / (1 − decay) updates count equally, and the initial parameters not at all.

    Args:
      ema: the mean before.
      params: the parameters after the update.
      step: t.
      decay: at least 0, below 1.
    """
    share = jnp.maximum(1 - decay, 1 / (step + 1))

    def moved(mean: Any, param: Any) -> Any:
        wide = param.astype(mean.dtype)
        if param.dtype != mean.dtype:  # XLA would leave out the rounding that it finds between two casts
            info = jnp.finfo(param.dtype)
            wide = jax.lax.reduce_precision(wide, info.nexp, info.nmant)
        return mean + (wide - mean) * share.astype(mean.dtype)

    return jax.tree.map(moved, ema, params)


def _at_least_float32(x: Any) -> Any:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
