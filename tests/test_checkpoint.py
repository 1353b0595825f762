"""Which checkpoints are kept, and which are refused."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainer import config
from trainer.checkpoint import Store
from trainer.errors import UserError
from trainer.state import TrainState


def state(step: int, **params) -> TrainState:
    params = params or {"w": jnp.full((3,), float(step)), "b": jnp.zeros((2, 2))}
    moments = {"scaling": {"mu": jax.tree.map(lambda x: x * 0.5, params)}}
    return TrainState(jnp.asarray(step, jnp.int32), params, {}, moments)


def save_all(store: Store, metrics: dict[int, float | None]) -> None:
    for step, value in metrics.items():
        store.save(state(step), {"step": step}, None if value is None else {"test/accuracy": value})
    store.wait()


def test_restores_every_bit_and_its_metadata(tmp_path):
    saved = state(7, w=jnp.asarray(np.random.default_rng(0).normal(size=5), jnp.float32))
    store = Store(tmp_path, config.Checkpoint())
    store.save(saved, {"step": 7, "config": "…"})
    store.close()
    again = Store(tmp_path, config.Checkpoint(), read_only=True)
    assert again.metadata(7) == {"step": 7, "config": "…"}
    jax.tree.map(np.testing.assert_array_equal, again.restore(saved, 7), saved)


@pytest.mark.parametrize(
    ("mode", "metrics", "kept", "best"),
    [
        ("max", {1: 0.5, 2: 0.9, 3: 0.7, 4: 0.6, 5: 0.65}, [2, 4, 5], 2),
        ("min", {1: 0.5, 2: 0.1, 3: 0.7, 4: 0.6, 5: 0.65}, [2, 4, 5], 2),
        ("max", {1: 0.5, 2: math.nan, 3: 0.4, 4: 0.3, 5: 0.2}, [1, 4, 5], 1),
        ("min", {1: 0.5, 2: math.nan, 3: 0.6, 4: 0.7, 5: 0.8}, [1, 4, 5], 1),
        ("max", {1: 0.5, 2: 0.6, 3: None, 4: None, 5: None}, [2, 4, 5], 2),
    ],
)
def test_keeps_the_last_and_the_best(tmp_path, mode, metrics, kept, best):
    settings = config.Checkpoint(keep_last=2, best_metric="test/accuracy", best_mode=mode)
    store = Store(tmp_path, settings)
    save_all(store, metrics)
    assert (store.steps(), store.best_step()) == (kept, best)
    store.close()
    # And so it is after another launch, which saves once more.
    store = Store(tmp_path, settings)
    assert store.best_step() == best
    save_all(store, {6: 0.01 if mode == "max" else 0.99})
    assert store.steps() == sorted({best, 5, 6})
    store.close()


def test_without_a_metric_only_the_last_are_kept(tmp_path):
    store = Store(tmp_path, config.Checkpoint(keep_last=3))
    save_all(store, dict.fromkeys(range(1, 7)))
    assert store.steps() == [4, 5, 6]
    assert store.best_step() is None
    store.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p | {"w": jnp.zeros(4)}, r"params/w is \(\(3,\), 'float32'\) there, \(\(4,\), 'float32'\) here"),
        (lambda p: p | {"w": jnp.zeros(3, jnp.bfloat16)}, "params/w is .*float32.* there, .*bfloat16.* here"),
        (lambda p: p | {"v": jnp.zeros(3)}, "params/v is missing there"),
        (lambda p: {"w": p["w"]}, "params/b is .* there, missing here"),
    ],
)
def test_refuses_a_state_of_another_shape_dtype_or_structure(tmp_path, change, message):
    saved = state(1)
    store = Store(tmp_path, config.Checkpoint())
    store.save(saved, {"step": 1})
    store.wait()
    with pytest.raises(UserError, match=message):
        store.restore(dataclasses.replace(saved, params=change(saved.params)), 1)
    store.close()


def test_a_save_cut_off_is_no_checkpoint(tmp_path):
    store = Store(tmp_path, config.Checkpoint())
    save_all(store, {1: None})
    store.close()
    (tmp_path / "2.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    store = Store(tmp_path, config.Checkpoint())
    assert store.steps() == [1]
    save_all(store, {2: None})
    assert store.steps() == [1, 2]
    store.close()
