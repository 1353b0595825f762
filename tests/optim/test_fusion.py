"""XLA makes one pass over each array of an update: nothing is copied, and nothing is computed into temporaries."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from tests.optim.building import build
from trainer import config
from trainer.optim.adabelief import adabelief

SHAPES = {"kernel": (256, 128), "conv": (3, 3, 32, 64), "bias": (128,)}
SIZE = 256 * 128 + 3 * 3 * 32 * 64 + 128


def compiled(optimizer: Any) -> Any:
    """Update and application, with everything donated."""
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()}
    state = jax.eval_shape(optimizer.init, params)

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()


def labelled() -> Any:
    groups = {
        "a": config.Group(weight_decay=0.1, lr_multiplier=0.1, every_steps=2),
        "b": config.Group(decay_schedule=config.Schedule("linear", peak=0.1)),
    }
    optimizer = config.Optimizer(schedule=config.Schedule("cosine", peak=1e-3, warmup=3), groups=groups)
    labels = {"kernel": "a", "conv": "b", "bias": "b"}
    return build(optimizer, labels)[0]


BFLOAT16 = {"mu_dtype": jnp.bfloat16, "nu_dtype": jnp.bfloat16}
OPTIMIZERS = {
    "plain": (adabelief(1e-3), 44),
    "with decay": (adabelief(1e-3, weight_decay=0.1), 44),
    "rectified": (adabelief(1e-3, rectify=True), 44),
    "amsgrad": (adabelief(1e-3, amsgrad=True), 56),
    "bfloat16 moments": (adabelief(1e-3, **BFLOAT16), 30),
    "labels": (labelled(), 46),
}


@pytest.mark.parametrize(("optimizer", "bytes_each"), OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_update_has_no_temporaries_and_no_more_traffic_than_a_fusion_for_each_result(optimizer, bytes_each):
    """New mu: reads g, mu. New nu: reads g, mu, nu. New p: reads mu, nu, p. Each writes one: 11 × 4 bytes are 44."""
    step = compiled(optimizer)
    assert step.memory_analysis().temp_size_in_bytes < 1024
    assert step.cost_analysis()["bytes accessed"] / SIZE < bytes_each + 0.5


def test_optax_copies_the_second_moment():
    assert compiled(optax.adabelief(1e-3)).memory_analysis().temp_size_in_bytes > 3 * SIZE
