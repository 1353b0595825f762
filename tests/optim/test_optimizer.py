"""Labels, schedules and update rules as one transformation."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.optim.building import build
from trainer import config
from trainer.optim.adabelief import adabelief
from trainer.rules import paths

LABELS = {"kernel": "decayed", "bias": "plain"}


def settings(name: str, decay: float = 0.1) -> config.Optimizer:
    groups = {"decayed": config.Group(weight_decay=decay), "plain": config.Group()}
    return config.Optimizer(name=name, schedule=config.Schedule(peak=0.5), groups=groups)


def params() -> dict[str, jax.Array]:
    return {"kernel": jnp.asarray([1.0, -2.0, 3.0]), "bias": jnp.asarray([1.0, -2.0, 3.0])}


def built(optimizer: config.Optimizer, labels: Any = None) -> Any:
    return build(optimizer, LABELS if labels is None else labels)[0]


def first_update(optimizer: optax.GradientTransformation, grads: Any) -> tuple[Any, Any]:
    """Updates and state after the first step."""
    return optimizer.update(grads, optimizer.init(params()), params())


@pytest.mark.parametrize("name", ["adabelief", "adam", "sgd"])
def test_zero_gradients_shrink_decayed_leaves_and_leave_the_rest_to_the_bit(name):
    optimizer = built(settings(name))
    updates, _ = first_update(optimizer, jax.tree.map(jnp.zeros_like, params()))
    np.testing.assert_allclose(updates["kernel"], -0.5 * 0.1 * params()["kernel"], rtol=1e-7)
    assert not np.any(updates["bias"])


def test_decay_is_decoupled_from_the_moments():
    grads = {"kernel": jnp.ones(3), "bias": jnp.ones(3)}
    moments = []
    for decay in (0.0, 0.1):
        optimizer = built(settings("adabelief", decay))
        moments.append(first_update(optimizer, grads)[1])
    jax.tree.map(np.testing.assert_array_equal, *moments)


def test_relabelling_keeps_the_structure_of_the_state():
    states = [
        jax.tree.structure(built(settings("adabelief"), labels).init(params()))
        for labels in (LABELS, {"kernel": "plain", "bias": "decayed"})
    ]
    assert states[0] == states[1]


def test_paths_of_the_state_are_readable():
    state = built(settings("adabelief")).init(params())
    assert "mu/kernel" in paths(state)
    assert "nu/bias" in paths(state)


def optimizer_of(kernel: config.Group, bias: config.Group | None = None, **fields: Any) -> config.Optimizer:
    """Adam by default: its first steps are ± the learning rate."""
    groups = {"decayed": kernel, "plain": bias or config.Group()}
    defaults: dict[str, Any] = {"name": "adam", "eps": 0.0, "eps_root": 1e-30, "schedule": config.Schedule(peak=0.5)}
    return config.Optimizer(groups=groups, **defaults | fields)


def walk(optimizer: config.Optimizer, grads: Any, steps: int) -> tuple[list[Any], Any]:
    """The updates of each step with the same gradients, and the last state."""
    transform = built(optimizer)
    update = jax.jit(transform.update)
    state, tree, found = transform.init(params()), params(), []
    for _ in range(steps):
        updates, state = update(grads, state, tree)
        tree = optax.apply_updates(tree, updates)
        found.append(jax.device_get(updates))
    return found, state


ONES = {"kernel": jnp.ones(3), "bias": jnp.ones(3)}


def test_learning_rate_multiplier_acts_on_its_group_alone():
    (updates,), _ = walk(optimizer_of(config.Group(lr_multiplier=0.1)), ONES, 1)
    np.testing.assert_allclose(updates["kernel"], -0.05, rtol=1e-6)
    np.testing.assert_allclose(updates["bias"], -0.5, rtol=1e-6)


def test_schedule_of_a_group_replaces_that_of_the_run_and_is_multiplied():
    own = config.Schedule("linear", peak=1.0, end=10)
    updates, _ = walk(optimizer_of(config.Group(schedule=own, lr_multiplier=0.5)), ONES, 3)
    np.testing.assert_allclose([u["kernel"][0] for u in updates], [-0.5, -0.45, -0.4], rtol=1e-5)
    np.testing.assert_allclose([u["bias"][0] for u in updates], -0.5, rtol=1e-5)


def test_scheduled_decay_follows_the_count_before_the_update():
    own = config.Schedule("linear", peak=0.2, end=10)
    zeros = jax.tree.map(jnp.zeros_like, params())
    updates, _ = walk(optimizer_of(config.Group(decay_schedule=own)), zeros, 3)
    tree = np.asarray(params()["kernel"], np.float64)
    for count, update in enumerate(updates):
        np.testing.assert_allclose(update["kernel"], -0.5 * 0.2 * (1 - count / 10) * tree, rtol=1e-6)
        tree = tree + update["kernel"]


@pytest.mark.parametrize("name", ["adabelief", "adam", "sgd"])
def test_frozen_group_keeps_its_bits_and_has_no_moments(name):
    negative_zero = {"kernel": jnp.asarray([-0.0, 1e-37, 3.0]), "bias": jnp.ones(3)}
    transform = built(optimizer_of(config.Group(frozen=True), name=name))
    state = transform.init(negative_zero)
    assert jax.tree.leaves(state.mu["kernel"]) == jax.tree.leaves(state.nu["kernel"]) == []
    updates, after = transform.update(ONES, state, negative_zero)
    moved: Any = optax.apply_updates(negative_zero, updates)
    assert np.asarray(moved["kernel"]).tobytes() == np.asarray(negative_zero["kernel"]).tobytes()
    assert not np.array_equal(moved["bias"], negative_zero["bias"])
    assert jax.tree.structure(after) == jax.tree.structure(state)


def test_frozen_group_may_have_no_gradient():
    """As in a run, whose step computes none."""
    transform = built(optimizer_of(config.Group(frozen=True)))
    state = transform.init(params())
    updates, after = transform.update(ONES, state, params())
    without, same = transform.update(ONES | {"kernel": None}, state, params())
    assert without["kernel"] is None
    np.testing.assert_array_equal(without["bias"], updates["bias"])
    jax.tree.map(np.testing.assert_array_equal, same, after)


def test_clipping_is_by_the_norm_of_the_group_and_then_only_down():
    grads = {"kernel": jnp.asarray([3.0, 0.0, 4.0]), "bias": jnp.asarray([0.3, 0.0, 0.4])}
    (updates,), _ = walk(optimizer_of(config.Group(clip_norm=1.0), config.Group(clip_norm=1.0), name="sgd"), grads, 1)
    np.testing.assert_allclose(updates["kernel"], [-0.3, 0, -0.4], rtol=1e-6)
    np.testing.assert_allclose(updates["bias"], [-0.15, 0, -0.2], rtol=1e-6)


def test_the_whole_gradient_is_clipped_before_groups_are():
    grads = {"kernel": jnp.asarray([3.0, 0.0, 0.0]), "bias": jnp.asarray([4.0, 0.0, 0.0])}
    (updates,), _ = walk(optimizer_of(config.Group(clip_norm=0.3), name="sgd", clip_norm=1.0), grads, 1)
    np.testing.assert_allclose(updates["kernel"], [-0.5 * 0.3, 0, 0], rtol=1e-6)  # 3 → 0.6 → 0.3
    np.testing.assert_allclose(updates["bias"], [-0.5 * 0.8, 0, 0], rtol=1e-6)


def test_frozen_groups_do_not_count_in_the_norm_of_the_whole_gradient():
    grads = {"kernel": jnp.asarray([1e6, 0.0, 0.0]), "bias": jnp.asarray([1.0, 0.0, 0.0])}
    (updates,), _ = walk(optimizer_of(config.Group(frozen=True), name="sgd", clip_norm=1.0), grads, 1)
    np.testing.assert_allclose(updates["bias"], [-0.5, 0, 0], rtol=1e-6)


def test_group_updated_every_third_step_does_what_it_would_in_a_run_of_its_own():
    """Its moments and bias corrections know the gradients of its own updates alone."""
    rng = np.random.default_rng(0)
    grads = [{"kernel": jnp.asarray(g), "bias": jnp.asarray(g)} for g in rng.normal(1, 0.3, (7, 3)).astype(np.float32)]

    def run(group: config.Group, given: list[Any]) -> list[Any]:
        transform = built(optimizer_of(group, name="adabelief"))
        state = transform.init(params())
        tree: Any = params()
        seen: list[Any] = []
        for g in given:
            updates, state = transform.update(g, state, tree)
            tree = optax.apply_updates(tree, updates)
            seen.append(jax.device_get(tree)["kernel"])
        return seen

    every = run(config.Group(weight_decay=0.1, every_steps=3), grads)
    alone = run(config.Group(weight_decay=0.1), grads[::3])
    for step, values in enumerate(every):
        np.testing.assert_array_equal(values, alone[step // 3])


def test_groups_with_other_optimizers_are_updated_as_by_those():
    transform = built(optimizer_of(config.Group(optimizer="sgd"), name="adam", b1=0.8, eps=1e-3, eps_root=0.0))
    theirs = optax.partition({"s": optax.sgd(0.5, momentum=0.8), "a": optax.adam(0.5, 0.8, 0.999, 1e-3)}, OTHERS)
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):  # in float32 Optax's 1 − b2^t is less exact
        start = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), jax.device_get(params()))
        ours, other = start, start
        ours_state, theirs_state = transform.init(start), theirs.init(start)
        for _ in range(5):
            g = {name: jnp.asarray(rng.normal(size=3)) for name in start}
            updates, ours_state = transform.update(g, ours_state, ours)
            ours = optax.apply_updates(ours, updates)
            updates, theirs_state = theirs.update(g, theirs_state, other)
            other = optax.apply_updates(other, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), ours, other)
    assert jax.tree.leaves(ours_state.nu["kernel"]) == []


OTHERS = {"kernel": "s", "bias": "a"}


def test_moment_dtypes_of_a_group_win_over_those_of_the_optimizer():
    optimizer = optimizer_of(config.Group(mu_dtype="float32", nu_dtype="bfloat16"), mu_dtype="bfloat16")
    _, state = walk(optimizer, ONES, 1)
    found = [(state.mu[name].dtype.name, state.nu[name].dtype.name) for name in ("kernel", "bias")]
    assert found == [("float32", "bfloat16"), ("bfloat16", "float32")]


def test_options_of_the_config_reach_the_transformation():
    options: dict[str, Any] = {"nesterov": True, "rectify": True, "sgd_fallback": False, "decay": "fixed"}
    optimizer = optimizer_of(config.Group(weight_decay=0.1), name="adabelief", eps=1e-8, eps_root=1e-8, **options)
    mask = {"kernel": True, "bias": False}
    direct = adabelief(0.5, eps=1e-8, eps_root=1e-8, weight_decay=0.1, weight_decay_mask=mask, **options)
    updates, state = walk(optimizer, ONES, 8)
    other = direct.init(params())
    tree = params()
    for update in updates:
        expected, other = direct.update(ONES, other, tree)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-9), update, expected)
        tree = optax.apply_updates(tree, update)
    assert state.nu_max is None
    amsgrad = optimizer_of(config.Group(), name="adabelief", amsgrad=True)
    assert built(amsgrad).init(params()).nu_max["bias"].shape == (3,)
