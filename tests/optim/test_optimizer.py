"""Labels, schedule and scaling as one transformation."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from trainer import config
from trainer.optim.optimizer import build_optimizer
from trainer.optim.schedules import build_schedule
from trainer.rules import paths

LABELS = {"kernel": "decayed", "bias": "plain"}


def settings(name: str, decay: float = 0.1) -> config.Optimizer:
    groups = {"decayed": config.Group(weight_decay=decay), "plain": config.Group()}
    return config.Optimizer(name=name, schedule=config.Schedule(peak=0.5), groups=groups)


def params() -> dict[str, jax.Array]:
    return {"kernel": jnp.asarray([1.0, -2.0, 3.0]), "bias": jnp.asarray([1.0, -2.0, 3.0])}


def first_update(optimizer: optax.GradientTransformation, grads: Any) -> tuple[Any, Any]:
    """Updates and state after the first step."""
    return optimizer.update(grads, optimizer.init(params()), params())


@pytest.mark.parametrize("name", ["adabelief", "adam", "sgd"])
def test_zero_gradients_shrink_decayed_leaves_and_leave_the_rest_to_the_bit(name):
    optimizer = build_optimizer(settings(name), LABELS)
    updates, _ = first_update(optimizer, jax.tree.map(jnp.zeros_like, params()))
    np.testing.assert_allclose(updates["kernel"], -0.5 * 0.1 * params()["kernel"], rtol=1e-7)
    assert not np.any(updates["bias"])


def test_decay_is_decoupled_from_the_moments():
    grads = {"kernel": jnp.ones(3), "bias": jnp.ones(3)}
    moments = []
    for decay in (0.0, 0.1):
        optimizer = build_optimizer(settings("adabelief", decay), LABELS)
        moments.append(first_update(optimizer, grads)[1]["scaling"])
    jax.tree.map(np.testing.assert_array_equal, *moments)


def test_relabelling_keeps_the_structure_of_the_state():
    states = [
        jax.tree.structure(build_optimizer(settings("adabelief"), labels).init(params()))
        for labels in (LABELS, {"kernel": "plain", "bias": "decayed"})
    ]
    assert states[0] == states[1]


def test_paths_of_the_state_are_readable():
    state = build_optimizer(settings("adabelief"), LABELS).init(params())
    assert "scaling/mu/kernel" in paths(state)
    assert "scaling/nu/bias" in paths(state)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", {0: 0.0, 5: 0.5, 10: 1.0, 60: 1.0, 110: 1.0}),
        ("linear", {0: 0.0, 5: 0.5, 10: 1.0, 60: 0.6, 110: 0.2, 500: 0.2}),
        ("cosine", {0: 0.0, 5: 0.5, 10: 1.0, 35: 0.2 + 0.8 * (1 + np.cos(np.pi / 4)) / 2, 60: 0.6, 110: 0.2, 500: 0.2}),
    ],
)
def test_schedules_pass_through_their_stated_points(name, expected):
    schedule = build_schedule(config.Schedule(name, peak=1.0, warmup_steps=10, decay_steps=110, final=0.2))
    for count, rate in expected.items():
        np.testing.assert_allclose(schedule(count), rate, rtol=1e-6, atol=1e-9)
