"""The regression: its split, its standardisation, and its metrics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_diabetes
from sklearn.metrics import mean_squared_error, r2_score

from experiments.regression import Regression

TASK = Regression(hidden=5)


def test_each_patient_is_in_one_split_and_the_training_split_is_standardised():
    train, test = (TASK.source(split).arrays for split in ("train", "test"))
    assert (len(train["y"]), len(test["y"])) == (354, 88)
    table, progression = (np.asarray(part) for part in load_diabetes(return_X_y=True, scaled=False))
    for name, whole in (("x", table), ("y", progression[:, None])):
        known, asked = (part[name].reshape(len(part[name]), -1).astype(np.float64) for part in (train, test))
        np.testing.assert_allclose(known.mean(0), 0, atol=1e-6)
        np.testing.assert_allclose(known.std(0), 1, rtol=1e-6)
        # Undone with the training split's own numbers, the two are the whole table again.
        rows = np.arange(442) % 5 == 4
        mean, std = whole[~rows].mean(0), whole[~rows].std(0)
        np.testing.assert_allclose(known * std + mean, whole[~rows], rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(asked * std + mean, whole[rows], rtol=1e-5, atol=1e-4)


def test_loss_and_r2_are_those_of_scikit_learn():
    test = {name: jnp.asarray(x) for name, x in TASK.source("test").arrays.items()}
    params = TASK.init(jax.random.key(0), test)
    variables = jax.tree.map(lambda x: x + 0.1, params)
    mask = (jnp.arange(88) % 7 != 0).astype(jnp.float32)
    found = np.asarray(TASK.predict(variables, test)["y"], np.float64)
    metrics, collections = TASK.loss(variables, {**test, "mask": mask}, key=jax.random.key(0), train=False)
    assert collections == {}
    kept, truth = np.asarray(mask) > 0, np.asarray(test["y"], np.float64)
    assert metrics["loss"].compute() == pytest.approx(mean_squared_error(truth[kept], found[kept]), rel=1e-5)
    # Of scikit-learn's r2 the variance is about the mean of the rows given; ours is about 0, the training split's mean.
    both = (np.concatenate([values[kept], -values[kept]]) for values in (truth, found))
    assert metrics["r2"].compute() == pytest.approx(r2_score(*both), rel=1e-5)


def test_a_fresh_model_predicts_the_mean_of_the_training_split():
    test = {name: jnp.asarray(x) for name, x in TASK.source("test").arrays.items()}
    variables = TASK.init(jax.random.key(0), test)
    np.testing.assert_array_equal(TASK.predict(variables, test)["y"], np.zeros(88))
    metrics, _ = TASK.loss(variables, {**test, "mask": jnp.ones(88)}, key=jax.random.key(0), train=False)
    assert metrics["r2"].compute() == 0


def test_dropout_acts_only_when_training():
    task = Regression(hidden=5, dropout=0.5)
    batch = {name: jnp.asarray(x) for name, x in task.source("test").arrays.items()} | {"mask": jnp.ones(88)}
    variables = jax.tree.map(lambda x: x + 0.1, task.init(jax.random.key(0), batch))
    losses = {
        (train, seed): task.loss(variables, batch, key=jax.random.key(seed), train=train)[0]["loss"].compute()
        for train in (True, False)
        for seed in (0, 1)
    }
    assert losses[False, 0] == losses[False, 1]
    assert len(set(losses.values())) == 3
