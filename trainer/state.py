"""TrainState: everything a run carries from one step to the next, as arrays."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int32


@flax.struct.dataclass
class TrainState:
    """Arrays only: no functions, no config and no random key, since keys and data follow from (seed, step).

    Attributes:
      step: the number of steps made, with those whose update a guard dropped, which the counts of `opt_state` omit.
      params: the trained parameters.
      collections: every other variable collection of the model, such as "batch_stats"; empty for many models.
      opt_state: the optimizer's state, moments and counts.
      ema: EMA params, an exponential moving average of the parameters in float32 or wider; None where none is kept.
      guard: a `trainer.guard.Guard`; None if updates are never dropped.
    """

    step: Int32[Array, ""]
    params: Any
    collections: Any
    opt_state: Any
    ema: Any = None
    guard: Any = None


def init_state(
    variables: Mapping[str, Any], optimizer: optax.GradientTransformation, *, ema: bool = False, guard: Any = None
) -> TrainState:
    """The state before the first step, with EMA params if `ema`, and with `guard`.

    Pure: call it in `jax.jit` or `jax.eval_shape`.

    Args:
      variables: the model's variables, as `Experiment.init` returns them.
      optimizer: its state is made from the parameters among the variables.
      ema: whether the state has EMA params.
      guard: the `Guard` stored in the state; None if updates are never dropped.
    """
    variables = dict(nn.unbox(variables))
    params = variables.pop("params")
    variables.pop("intermediates", None)  # sown, and different at every call
    averages = jax.tree.map(lambda p: p.astype(jnp.promote_types(p.dtype, jnp.float32)), params) if ema else None
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, variables, optimizer.init(params), averages, guard)


def update_ema(ema: Any, params: Any, count: Int32[Array, ""], decay: float) -> Any:
    """The EMA params after an update: e + (p − e)·(1 − d), where d = min(decay, t / (t + 1)) after t earlier updates.

    So the first 1 / (1 − decay) updates count equally, and the initial parameters do not count.

    Args:
      ema: the EMA params before, in float32 or wider.
      params: the parameters after the update.
      count: t.
      decay: at least 0, below 1.
    """
    weight = jnp.maximum(1 - decay, 1 / (count + 1))

    def average(ema: Any, param: Any) -> Any:
        wide = param.astype(ema.dtype)
        # `param` was just rounded to its dtype. XLA would drop that cast together with this one, and so the rounding.
        if param.dtype != ema.dtype:
            info = jnp.finfo(param.dtype)
            wide = jax.lax.reduce_precision(wide, info.nexp, info.nmant)
        return ema + (wide - ema) * weight.astype(ema.dtype)

    return jax.tree.map(average, ema, params)
