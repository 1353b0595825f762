"""AdaBelief against a float64 reference written from the paper's formulas."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from trainer.optim.adabelief import adabelief, scale_by_belief


def reference(params, grads, learning_rate, b1, b2, eps, eps_root):
    """The parameters after each step, in NumPy's float64."""
    m = s = np.zeros_like(params)
    path = []
    for t, g in enumerate(grads, 1):
        m = b1 * m + (1 - b1) * g
        s = b2 * s + (1 - b2) * (g - m) ** 2 + eps_root
        m_hat, s_hat = m / (1 - b1**t), s / (1 - b2**t)
        rate = learning_rate(t - 1) if callable(learning_rate) else learning_rate
        params = params - rate * m_hat / (np.sqrt(s_hat) + eps)
        path.append(params)
    return np.stack(path)


def run(optimizer, params, grads):
    """The parameters after each step of an Optax optimizer."""
    state = optimizer.init(params)
    path: list[Any] = []
    for g in grads:
        updates, state = optimizer.update(g, state, params)
        params = optax.apply_updates(params, updates)
        path.append(params)
    return np.stack(path)


@pytest.fixture
def problem():
    """Parameters and 200 gradients with a mean well away from zero, so that the belief differs from |g|."""
    rng = np.random.default_rng(0)
    return rng.normal(size=7), 1.0 + 0.3 * rng.normal(size=(200, 7))


@pytest.mark.parametrize("eps", [1e-16, 1e-8, 1e-3])
@pytest.mark.parametrize("eps_root", [1e-16, 1e-8, 1e-3])
def test_follows_the_paper_in_float64(problem, eps, eps_root):
    params, grads = problem
    with jax.enable_x64(True):
        found = run(adabelief(1e-2, 0.9, 0.999, eps, eps_root), jnp.asarray(params), jnp.asarray(grads))
    expected = reference(params, grads, 1e-2, 0.9, 0.999, eps, eps_root)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_adam_would_fail_the_same_comparison(problem):
    params, grads = problem
    with jax.enable_x64(True):
        adam = run(optax.adam(1e-2, 0.9, 0.999, 1e-8), jnp.asarray(params), jnp.asarray(grads))
    expected = reference(params, grads, 1e-2, 0.9, 0.999, 1e-8, 1e-8)
    assert np.abs(adam - expected).max() > 0.5 * np.abs(expected - params).max()


def test_schedule_sees_the_count_before_the_update(problem):
    params, grads = problem

    def schedule(count):
        return 0.01 * (count + 1.0)

    with jax.enable_x64(True):
        found = run(adabelief(schedule), jnp.asarray(params), jnp.asarray(grads[:5]))
    expected = reference(params, grads[:5], schedule, 0.9, 0.999, 1e-16, 1e-16)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_agrees_with_optax_in_float64(problem):
    with jax.enable_x64(True):
        params, grads = map(jnp.asarray, problem)
        ours, theirs = run(adabelief(1e-2), params, grads), run(optax.adabelief(1e-2), params, grads)
    np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


def test_state_has_count_and_moments_like_the_parameters():
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones(())}
    transform = scale_by_belief(b1=0.9)
    _, state = transform.update(params, transform.init(params), params)
    assert int(optax.tree.get(state, "count")) == 1
    np.testing.assert_allclose(optax.tree.get(state, "mu")["a"], 0.1, rtol=1e-6)
    np.testing.assert_allclose(optax.tree.get(state, "nu")["b"], 0.001 * 0.9**2, rtol=1e-6)
