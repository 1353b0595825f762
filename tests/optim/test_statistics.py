"""Statistics of an update, by label, against float64 NumPy and against the change of the parameters."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.optim.building import build
from trainer import config

LABELS = {"a": "first", "b": "second", "c": "first"}


def run(optimizer: config.Optimizer, steps: int = 4) -> tuple[dict[str, float], list[Any], Any, Any, Any]:
    """The statistics of the last of some steps, all gradients, and the parameters around that step."""
    rng = np.random.default_rng(0)
    params: Any = {"a": rng.normal(size=(3, 2)), "b": rng.normal(size=4), "c": rng.normal(size=5)}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    transform, statistics = build(optimizer, LABELS)
    state, before, grads = transform.init(params), params, []
    for _ in range(steps):
        grads.append(jax.tree.map(lambda x: jnp.asarray(0.5 + rng.normal(size=x.shape), jnp.float32), params))
        before = params
        updates, state = transform.update(grads[-1], state, params)
        params = optax.apply_updates(params, updates)
    return jax.tree.map(float, jax.jit(statistics)(grads[-1], params, state)), grads, before, params, state


def flat(tree: Any, label: str) -> np.ndarray:
    return np.concatenate([np.asarray(tree[name], np.float64).ravel() for name in "abc" if LABELS[name] == label])


CASES = {
    "decoupled": config.Optimizer(),
    "fixed": config.Optimizer(decay="fixed"),
    "coupled": config.Optimizer(decay="coupled"),
    "nesterov": config.Optimizer(nesterov=True),
    "rectified": config.Optimizer(rectify=True),
    "amsgrad": config.Optimizer(amsgrad=True),
    "adam": config.Optimizer(name="adam", eps=1e-8),
    "sgd": config.Optimizer(name="sgd"),
    "clipped": config.Optimizer(name="sgd", clip_norm=0.5),
}


def settings(case: str) -> config.Optimizer:
    optimizer = CASES[case]
    optimizer.schedule = config.Schedule("linear", peak=0.1, warmup=2)
    groups = {"first": config.Group(weight_decay=0.3), "second": config.Group(lr_multiplier=0.5, clip_norm=1.0)}
    optimizer.groups = groups
    return optimizer


@pytest.mark.parametrize("case", CASES)
def test_update_ratio_is_that_of_the_step_which_was_made(case):
    found, _, before, after, _ = run(settings(case))
    for label in ("first", "second"):
        old, new = flat(before, label), flat(after, label)
        expected = np.linalg.norm(new - old) / np.linalg.norm(new)
        np.testing.assert_allclose(found[f"update_ratio/{label}"], expected, rtol=2e-5)


@pytest.mark.parametrize("case", ["decoupled", "clipped"])
def test_gradient_norm_is_that_of_the_label_before_clipping(case):
    found, grads, *_ = run(settings(case))
    for label in ("first", "second"):
        np.testing.assert_allclose(found[f"grad_norm/{label}"], np.linalg.norm(flat(grads[-1], label)), rtol=1e-6)


def test_belief_is_the_mean_root_of_the_second_moment_about_the_mean_over_that_about_zero():
    found, grads, *_ = run(config.Optimizer(groups={"first": config.Group(), "second": config.Group()}))
    for label in ("first", "second"):
        m = s = np.zeros(1)
        for g in grads:
            m = 0.9 * m + 0.1 * flat(g, label)
            s = 0.999 * s + 0.001 * (flat(g, label) - m) ** 2 + 1e-16
        m_hat, s_hat = m / (1 - 0.9**4), s / (1 - 0.999**4)
        np.testing.assert_allclose(found[f"belief/{label}"], np.mean(np.sqrt(s_hat / (s_hat + m_hat**2))), rtol=1e-5)


def test_belief_of_adam_has_its_second_moment_about_zero():
    groups = {"first": config.Group(), "second": config.Group()}
    found, grads, *_ = run(config.Optimizer(name="adam", eps=1e-8, eps_root=0.0, groups=groups))
    m = v = np.zeros(1)
    for g in grads:
        m, v = 0.9 * m + 0.1 * flat(g, "first"), 0.999 * v + 0.001 * flat(g, "first") ** 2
    m_hat, v_hat = m / (1 - 0.9**4), v / (1 - 0.999**4)
    np.testing.assert_allclose(
        found["belief/first"], np.mean(np.sqrt(np.maximum(v_hat - m_hat**2, 0) / v_hat)), rtol=1e-4
    )


def test_frozen_labels_and_the_belief_of_momentum_are_left_out():
    groups = {"first": config.Group(frozen=True), "second": config.Group(optimizer="sgd")}
    found, *_ = run(config.Optimizer(groups=groups))
    assert set(found) == {"grad_norm/second", "update_ratio/second"}


def test_between_its_updates_a_group_has_the_ratio_of_its_last_one():
    groups = {"first": config.Group(every_steps=2), "second": config.Group()}
    ratios = [run(config.Optimizer(groups=groups), steps)[0]["update_ratio/first"] for steps in (3, 4)]
    assert ratios[0] == ratios[1] > 0


def test_schedules_of_a_label_are_logged_as_they_are_used():
    own = config.Schedule("linear", peak=0.2, end=10)
    groups = {"first": config.Group(lr_multiplier=0.1, decay_schedule=own), "second": config.Group()}
    found, *_ = run(config.Optimizer(schedule=config.Schedule("linear", peak=1.0, end=10), groups=groups))
    assert found["learning_rate/first"] == pytest.approx(0.07)  # the fourth update, after three others
    assert found["learning_rate/second"] == pytest.approx(0.7)
    assert found["weight_decay/first"] == pytest.approx(0.2 * 0.7)
    assert "weight_decay/second" not in found
