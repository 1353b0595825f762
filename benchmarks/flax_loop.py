"""The training loop that somebody writes with Flax and Optax, for the three models of `benchmarks.flax_models`.

    python -m benchmarks.flax_loop NAME STEPS EVERY [norm]        # in a folder with NAME.py and NAME_models.py

It prints a line after the first step and after every EVERY steps. With "norm" the step also computes the norm of the
gradient. The model, the loss and the data are those of the experiment in NAME.py; the state, the step, the optimizer,
the order of the data and the loop are Flax's and Optax's.
"""

import importlib
import sys
from typing import Any

import jax
import numpy as np
import optax
from flax.training import train_state


class TrainState(train_state.TrainState):
    """Flax's state, with the running statistics of BatchNorm."""

    batch_stats: Any


def optimizer(name: str, run: Any) -> optax.GradientTransformation:
    """The optimizer of the experiment's config, from Optax."""
    steps = run.total_steps
    if name == "vae":
        return optax.adam(1e-3)
    decayed = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)  # noqa: E731 - one line
    if name == "resnet":
        schedule = optax.warmup_cosine_decay_schedule(0.0, 0.1, warmup_steps=50, decay_steps=steps)
        decay = optax.add_decayed_weights(1e-4, decayed)
        return optax.chain(decay, optax.sgd(schedule, momentum=0.9, nesterov=True))
    schedule = optax.join_schedules(
        [optax.linear_schedule(0, 2e-3, 100), lambda t: 2e-3 * (100 / (t + 100)) ** 0.5], boundaries=[100]
    )
    clip = optax.clip_by_global_norm(1.0)
    return optax.chain(clip, optax.adabelief(schedule), optax.add_decayed_weights(-0.1 * 2e-3, decayed))


def main() -> None:
    """Trains."""
    name, steps, every = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    sys.path.insert(0, ".")
    with_norm = sys.argv[4:] == ["norm"]
    run = importlib.import_module(name).get_config()
    experiment, size = run.experiment, run.batch_size
    arrays = experiment.source("train").arrays
    key = jax.random.key(0)
    mask = np.ones(size, np.float32)
    variables = jax.jit(experiment.init)(key, {k: x[:size] for k, x in arrays.items()})
    import flax.linen as nn

    variables = nn.unbox(variables)
    state = TrainState.create(
        apply_fn=None,
        params=variables["params"],
        tx=optimizer(name, run),
        batch_stats=variables.get("batch_stats", {}),
    )

    @jax.jit
    def train_step(state: TrainState, batch: Any, key: Any) -> tuple[TrainState, Any]:
        key = jax.random.fold_in(key, state.step)

        def loss(params: Any) -> Any:
            collections = {"batch_stats": state.batch_stats} if state.batch_stats else {}
            metrics, updated = experiment.loss({"params": params, **collections}, batch, key=key, train=True)
            mean = metrics["loss"].total / metrics["loss"].weight
            return mean, updated

        (value, updated), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        norm = optax.global_norm(grads) if with_norm else None
        return state.apply_gradients(grads=grads, batch_stats=updated.get("batch_stats", {})), (value, norm)

    rng, order, at = np.random.default_rng(0), np.arange(0), 0
    for step in range(1, steps + 1):
        if at + size > len(order):
            order, at = rng.permutation(len(next(iter(arrays.values())))), 0
        chosen, at = order[at : at + size], at + size
        state, (value, _) = train_step(state, {k: x[chosen] for k, x in arrays.items()} | {"mask": mask}, key)
        if step == 1 or step % every == 0:
            print(f"step {step} loss {float(value):.4f}", flush=True)


if __name__ == "__main__":
    main()
