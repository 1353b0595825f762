"""Cautious updates, corrected decay and stochastic rounding of parameters, against loops in NumPy's float64."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.optim.building import build
from tests.tasks import Task, make_run
from tests.test_hooks import BreaksAt, FailedError, bits
from trainer import config, train
from trainer.optim import build_groups, build_optimizer, build_schedules
from trainer.optim.decay_check import check_decay

STEPS, SHAPES = 40, {"kernel": (5, 3), "bias": (4,)}
LABELS = {"kernel": "decayed", "bias": "plain"}


def settings(**fields: Any) -> config.Optimizer:
    groups = {"decayed": config.Group(weight_decay=0.3, lr_multiplier=0.5), "plain": config.Group()}
    schedule = config.Schedule("cosine", peak=0.1, warmup=2)
    defaults: dict[str, Any] = {"schedule": schedule, "groups": groups}
    return config.Optimizer(**defaults | fields)


def rate(t: int, multiplier: float) -> float:
    """Learning rate of update t, from 0 on: a linear warm-up over 2 of the 10 updates, then a cosine to 0."""
    share = t / 2 if t < 2 else 0.5 * (1 + np.cos(np.pi * min((t - 2) / 8, 1)))
    return 0.1 * multiplier * share


def gradients(kind: Any = np.float64) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)

    def one(shape: Sequence[int]) -> np.ndarray:
        x = rng.normal(size=shape)
        return (x + 1j * rng.normal(size=shape) if kind == np.complex128 else x).astype(kind)

    return [{name: one(shape) for name, shape in SHAPES.items()} for _ in range(10)]


def params(kind: Any = np.float64) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {name: rng.normal(size=shape).astype(kind) for name, shape in SHAPES.items()}


def loop(rule: str, *, cautious: bool, decay: str, kind: Any = np.float64) -> dict[str, np.ndarray]:
    """The parameters after ten updates."""
    final = {}
    for name, p in params(kind).items():
        mu, nu = np.zeros_like(p), np.zeros_like(p.real)
        multiplier, wd = (0.5, 0.3) if name == "kernel" else (1.0, 0.0)
        for t, grads in enumerate(gradients(kind)):
            g, lr = grads[name], rate(t, multiplier)
            if rule == "sgd":
                mu = 0.9 * mu + g
                u = mu
            else:
                mu = 0.9 * mu + 0.1 * g
                center = mu if rule == "adabelief" else 0
                nu = 0.999 * nu + 0.001 * np.abs(g - center) ** 2 + (1e-16 if rule == "adabelief" else 0)
                inside = nu / (1 - 0.999 ** (t + 1)) + (0 if rule == "adabelief" else 1e-16)
                u = mu / (1 - 0.9 ** (t + 1)) / (np.sqrt(inside) + 1e-16)
            if cautious:
                agrees = (u * np.conj(g)).real > 0
                u = u * agrees / max(agrees.mean(), 1e-3)
            share = lr * wd * (lr / (0.1 * multiplier)) if decay == "corrected" else lr * wd
            p = p - lr * u - share * p
        final[name] = p
    return final


def trained(optimizer: config.Optimizer, kind: Any = np.float64) -> Any:
    transform, _ = build(optimizer, LABELS)
    p: Any = jax.tree.map(jnp.asarray, params(kind))
    state = transform.init(p)
    for grads in gradients(kind):
        updates, state = transform.update(jax.tree.map(jnp.asarray, grads), state, p)
        p = optax.apply_updates(p, updates)
    return p


@pytest.fixture
def wide():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("decay", ["decoupled", "corrected"])
@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("rule", ["adabelief", "adam", "sgd"])
def test_cautious_updates_and_corrected_decay_are_those_of_a_loop(wide, rule, cautious, decay):
    found = trained(settings(name=rule, cautious=cautious, decay=decay))
    expected = loop(rule, cautious=cautious, decay=decay)
    plain = loop(rule, cautious=not cautious, decay=decay)
    for name in SHAPES:
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-7, atol=0)
        assert np.abs(found[name] - plain[name]).max() > 1e-3
    other = loop(rule, cautious=cautious, decay="decoupled" if decay == "corrected" else "corrected")
    assert np.abs(found["kernel"] - other["kernel"]).max() > 1e-4


def test_cautious_updates_of_complex_parameters(wide):
    found = trained(settings(cautious=True), np.complex128)
    expected = loop("adabelief", cautious=True, decay="decoupled", kind=np.complex128)
    for name in SHAPES:
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-7, atol=0)


def test_an_update_that_no_gradient_agrees_with_moves_nothing():
    transform, _ = build(settings(name="adam", cautious=True, schedule=config.Schedule(peak=0.1)), LABELS)
    p = {name: jnp.ones(shape) for name, shape in SHAPES.items()}
    state, updates = transform.init(p), {}
    for sign in (1.0, -1e-3):
        updates, state = transform.update(jax.tree.map(lambda x, sign=sign: sign * x, p), state, p)
    assert not np.any(jax.tree.leaves(updates)[0])  # the mean still points along the first gradient


@pytest.mark.parametrize("decay", ["decoupled", "corrected"])
def test_the_decay_check_knows_the_corrected_decay(decay):
    optimizer = settings(decay=decay)
    transform, _ = build(optimizer, LABELS)
    groups = build_groups(optimizer, build_schedules(make_run(10, optimizer=optimizer), examples=10))
    p = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params())
    names = [LABELS[path[0].key] for path, _ in jax.tree_util.tree_leaves_with_path(p)]
    results = {result.label: result for result in check_decay(p, names, groups, transform, 10)}
    assert str(results["decayed"]) == "as stated"
    assert results["decayed"].factor == pytest.approx(1 - 0.05 * 0.3, rel=1e-7)
    wrong = settings(decay="fixed")
    transform, _ = build(wrong, LABELS)
    assert str(check_decay(p, names, groups, transform, 10)[0]).startswith("WRONG")


def stochastic(steps: int, update: float, *, seed: int = 0, rounding: str = "stochastic") -> np.ndarray:
    """The bfloat16 parameters after so many steps of SGD by `update` each; they begin as 1."""
    optimizer = config.Optimizer(
        "sgd", config.Schedule(peak=update), b1=0.0, param_rounding=rounding, labels=((".*", "default"),)
    )
    groups = build_groups(optimizer, build_schedules(make_run(10, optimizer=optimizer), examples=10))
    transform = build_optimizer(optimizer, groups, {"w": "default"}, seed)
    p = {"w": jnp.ones((64, 64), jnp.bfloat16)}
    grads = {"w": jnp.ones((64, 64), jnp.bfloat16)}

    def step(carry, _):
        p, state = carry
        updates, state = transform.update(grads, state, p)
        return (optax.apply_updates(p, updates), state), None

    (p, _), _ = jax.jit(lambda: jax.lax.scan(step, (p, transform.init(p)), length=steps))()
    return np.asarray(p["w"], np.float64)


def test_rounding_to_nearest_loses_small_updates_and_stochastic_rounding_keeps_them_on_average():
    assert np.all(stochastic(100, 1e-3, rounding="nearest") == 1)  # half an ulp below 1 is 2e-3
    found = stochastic(100, 1e-3)
    # Each step errs by at most one ulp, 2⁻⁸, with variance (δ/ulp)(1 − δ/ulp) ulp².
    share = 1e-3 * 2**8
    error = 2.0**-8 * np.sqrt(100 * share * (1 - share))
    assert abs(found.mean() - 0.9) < 5 * error / np.sqrt(100)  # elements of one update are correlated
    assert 0.3 * error < found.std() < 2 * error
    np.testing.assert_array_equal(found, stochastic(100, 1e-3))
    assert not np.array_equal(found, stochastic(100, 1e-3, seed=1))


def test_an_update_moves_a_bfloat16_parameter_exactly_onto_one_of_its_two_neighbours():
    rng = np.random.default_rng(0)
    p = jnp.asarray(rng.normal(size=4096) * 10.0 ** rng.integers(-3, 3, 4096), jnp.bfloat16)
    g = jnp.asarray(rng.normal(size=4096) * 10.0 ** rng.integers(-6, 3, 4096), jnp.bfloat16)
    optimizer = settings(name="sgd", b1=0.0, param_rounding="stochastic", schedule=config.Schedule(peak=0.1))
    transform, _ = build(optimizer, {"kernel": "plain", "bias": "plain"})
    tree = {"kernel": p, "bias": -p}
    updates, _ = jax.jit(transform.update)({"kernel": g, "bias": g}, transform.init(tree), tree)
    assert updates["kernel"].dtype == jnp.float32
    for name, old in tree.items():
        moved: Any = optax.apply_updates(tree, updates)
        new = np.asarray(moved[name], np.float64)
        exact = np.asarray(old, np.float64) - np.float64(np.float32(0.1)) * np.asarray(g, np.float64)
        ulp = 2.0 ** (np.floor(np.log2(np.abs(exact))) - 7)
        assert np.all(np.abs(new - exact) < ulp * (1 + 1e-4))
        assert np.mean(np.abs(new - exact) > 0.5 * ulp) > 0.1  # not to the nearest


def losses(dtype: Any, rounding: str, steps: int = 3000) -> float:
    """The mean loss of the last 100 steps of a classifier whose parameters, moments and computation have a dtype.

    It learns labels drawn from another network, from new examples in every step.
    """
    rng = np.random.default_rng(1)
    teacher = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((16, 32), (32, 8))]
    p = {"a": rng.normal(size=(16, 64)) / 4, "b": rng.normal(size=(64, 8)) / 8}
    p = jax.tree.map(lambda array: jnp.asarray(array, dtype), p)
    stored = None if dtype == jnp.float32 else "bfloat16"
    schedule = config.Schedule("cosine", peak=2e-3, final=2e-4, warmup=100)
    optimizer = config.Optimizer(schedule=schedule, eps=1e-8, mu_dtype=stored, nu_dtype=stored, param_rounding=rounding)
    run = make_run(steps, optimizer=optimizer)
    groups = build_groups(optimizer, build_schedules(run, examples=10))
    transform = build_optimizer(optimizer, groups, {"a": "default", "b": "default"}, 0)

    def loss(p, x, labels):
        logits = jnp.tanh(x.astype(dtype) @ p["a"]) @ p["b"]
        return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels).mean()

    def step(carry, key):
        p, state = carry
        x = jax.random.normal(key, (256, 16))
        labels = jax.random.categorical(key, jnp.tanh(x @ teacher[0] / 4) @ teacher[1])
        value, grads = jax.value_and_grad(loss)(p, x, labels)
        updates, state = transform.update(grads, state, p)
        return (optax.apply_updates(p, updates), state), value

    keys = jax.random.split(jax.random.key(0), steps)
    optimized = {"xla_backend_optimization_level": 2}  # not as `make test` compiles: the steps are most of the time
    _, values = jax.jit(lambda: jax.lax.scan(step, (p, transform.init(p)), keys), compiler_options=optimized)()
    return float(np.mean(values[-100:]))


@pytest.mark.slow
def test_3000_steps_in_bfloat16_alone_end_within_one_percent_of_the_float32_loss():
    wide, stochastic, nearest = (
        losses(jnp.float32, "nearest"),
        losses(jnp.bfloat16, "stochastic"),
        losses(jnp.bfloat16, "nearest"),
    )
    print(f"float32 {wide:.5f}, bfloat16 stochastic {stochastic:.5f}, nearest {nearest:.5f}")
    assert abs(stochastic / wide - 1) < 0.01
    assert nearest / wide > 1.02


@dataclasses.dataclass
class Narrow(Task):
    """`Task` with parameters in bfloat16."""

    def init(self, key, batch):
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16), super().init(key, batch))


def test_a_run_whose_parameters_are_rounded_randomly_resumes_bit_for_bit_and_is_the_same_on_four_devices(tmp_path):
    def run_on(parallel: config.Parallel, total_steps: int) -> config.Run:
        run = make_run(total_steps, experiment=Narrow(batch_norm=False), parallel=parallel)
        run.optimizer.param_rounding, run.checkpoint.every_steps = "stochastic", 4
        run.optimizer.schedule.run_steps, run.optimizer.schedule.warmup = 10, 0
        return run

    one, four = config.Parallel(devices=1), config.Parallel("fsdp", devices=4, min_shard_size=0)
    whole = train(run_on(one, 10), tmp_path / "whole", verbose=False)
    with pytest.raises(FailedError):
        train(run_on(one, 10), tmp_path / "run", verbose=False, hooks=[BreaksAt(6)])
    assert bits(train(run_on(one, 10), tmp_path / "run", verbose=False)) == bits(whole)
    assert {x.dtype for x in jax.tree.leaves(whole.params)} == {jnp.dtype(jnp.bfloat16)}
    # After one step nearly every number was rounded in the same direction, so the random bits are the same.
    first = train(run_on(one, 1), tmp_path / "one", verbose=False)
    sharded = train(run_on(four, 1), tmp_path / "four", verbose=False)
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(state.params)]) for state in (first, sharded))
    assert np.mean(a == b) > 0.95


def test_the_variants_of_the_page_train(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "adabelief.md").read_text()
    (text,) = re.findall(r"```python\n(Optimizer\([^`]*cautious=True.*?)```", page, re.DOTALL)
    run = make_run(2, experiment=Narrow(batch_norm=False), optimizer=eval(text, vars(config)))
    run.optimizer.schedule.run_steps = 1000
    state: Any = train(run, tmp_path / "run", verbose=False)
    assert {x.dtype for x in jax.tree.leaves((state.params, state.opt_state.mu))} == {jnp.dtype(jnp.bfloat16)}


def test_corrected_decay_of_a_group_that_never_moves_is_none():
    groups = {"decayed": config.Group(weight_decay=0.3, lr_multiplier=0.0), "plain": config.Group()}
    for name in ("adabelief", "optax.sgd"):
        transform, _ = build(settings(name=name, groups=groups, decay="corrected"), LABELS)
        p: Any = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params())
        grads = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), gradients()[0])
        updates, _ = transform.update(grads, transform.init(p), p)
        moved: Any = optax.apply_updates(p, updates)
        np.testing.assert_array_equal(moved["kernel"], p["kernel"])
