"""SimCLR: NT-Xent and the probe against references, views, and equal losses under every strategy."""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression

from experiments.contrastive import Contrastive, fit_probe, jittered, nt_xent, probe
from experiments.image_keys import image_keys
from tests.few_steps import STRATEGIES, Outcome, assert_same, few_steps
from tests.tasks import make_run
from trainer import config, load, train
from trainer.data import ArraySource

SIZES = {"train": 40, "test": 21}


@dataclasses.dataclass
class Noise(Contrastive):
    """SimCLR on random images of 8×8 pixels, some of them brighter than others, as their labels say."""

    def source(self, split: str) -> ArraySource:
        rng = np.random.default_rng(len(split))
        label = rng.integers(0, 3, SIZES[split]).astype(np.int32)
        return ArraySource({"image": noise(rng, label), "label": label})


def noise(rng: np.random.Generator, label: np.ndarray) -> np.ndarray:
    images = rng.integers(0, 128, (len(label), 8, 8, 1)) + 50 * label[:, None, None, None]
    return images.astype(np.uint8)


TASK = Noise(classes=3, widths=(8, 16), projection=4)


def unit_vectors(examples: int) -> np.ndarray:
    views = np.random.default_rng(0).normal(size=(examples, 2, 5))
    return views / np.linalg.norm(views, axis=-1, keepdims=True)


def reference(views: np.ndarray, mask: np.ndarray, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Equation 1 of the paper, one view after the other, in float64."""
    losses, hits = np.zeros(len(views)), np.zeros(len(views))
    for i, j in np.ndindex(len(views), 2):
        other = float(views[i, j] @ views[i, 1 - j]) / temperature
        negatives = [
            float(views[i, j] @ views[k, side]) / temperature
            for k, side in np.ndindex(len(views), 2)
            if k != i and mask[k]
        ]
        losses[i] += (np.log(np.exp(other) + np.sum(np.exp(negatives))) - other) / 2
        hits[i] += (other >= max(negatives, default=-np.inf)) / 2
    return losses, hits


@pytest.mark.parametrize("temperature", [0.1, 1.0])
@pytest.mark.parametrize("masked", [(), (1,), (0, 4)])
def test_nt_xent_is_that_of_float64_numpy(temperature, masked):
    views, mask = unit_vectors(6), np.ones(6)
    mask[list(masked)] = 0
    expected = reference(views, mask, temperature)
    found = nt_xent(jnp.asarray(views, jnp.float32), jnp.asarray(mask, jnp.float32), temperature)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(a)[mask > 0], b[mask > 0], rtol=1e-5)


def test_a_batch_without_negatives_has_a_loss_of_0_and_finite_gradients():
    views, mask = jnp.asarray(unit_vectors(3), jnp.float32), jnp.array([0.0, 1, 0])

    def total(views: Any) -> Any:
        losses, _ = nt_xent(views, mask, 0.1)
        return jnp.sum(losses * mask)

    value, gradient = jax.value_and_grad(total)(views)
    assert float(value) == 0
    assert np.isfinite(np.asarray(gradient)).all()


@functools.cache
def outcome(strategy: str, devices: int) -> Outcome:
    return few_steps(TASK, strategy, devices)


CASES = [
    pytest.param(strategy, marks=[] if strategy in ("fsdp_tensor", "pmap") else [pytest.mark.exhaustive])
    for strategy in STRATEGIES
]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", CASES)
def test_four_devices_give_the_losses_and_parameters_of_one(strategy):
    found = outcome(strategy, 4)
    assert_same(found, outcome("data", 1))
    assert found.axes >= {axis for axis in ("fsdp", "tensor") if axis in strategy}  # something was sharded


def test_the_loss_depends_on_the_other_examples_of_the_batch_and_on_no_label():
    batch = make_batch(6)
    variables = jax.jit(TASK.init)(jax.random.key(0), batch)
    loss = loss_of(variables, batch)
    assert loss == loss_of(variables, {**batch, "label": batch["label"][::-1]})
    fewer = loss_of(variables, {**batch, "mask": jnp.array([1.0, 1, 1, 1, 1, 0])})
    assert fewer < loss - 1e-2


def loss_of(variables: Any, batch: Any) -> float:
    metrics, _ = compiled()(variables, batch)
    return metrics["loss"].compute()


@functools.cache
def compiled() -> Any:
    return jax.jit(lambda variables, batch: TASK.loss(variables, batch, key=jax.random.key(0), train=False))


def make_batch(examples: int) -> dict[str, Any]:
    arrays = TASK.source("train").arrays
    batch = {name: jnp.asarray(array[:examples]) for name, array in arrays.items()}
    return {**batch, "mask": jnp.ones(examples)}


def test_an_image_has_two_different_views_which_its_key_alone_decides():
    images, keys = make_batch(6)["image"] / 255, jax.random.split(jax.random.key(0), 6)
    make = jax.jit(TASK.views)
    views = np.asarray(make(images, keys)).reshape(6, 2, 8, 8, 1)
    assert (np.abs(views[:, 0] - views[:, 1]).max((1, 2, 3)) > 0.01).all()
    assert views.min() >= 0
    assert views.max() <= 1
    order = jnp.array([4, 1, 0, 5, 2, 3])
    np.testing.assert_allclose(make(images[order], keys[order]).reshape(views.shape), views[order], atol=1e-6)


def test_keys_of_images_differ_with_a_pixel_and_not_with_the_batch():
    images = make_batch(6)["image"]
    draws = np.asarray(jax.vmap(jax.random.uniform)(image_keys(images)))
    assert len(set(draws)) == 6
    np.testing.assert_array_equal(jax.vmap(jax.random.uniform)(image_keys(images[2:4])), draws[2:4])
    # The same pixels in other places are another image.
    flipped = jax.vmap(jax.random.uniform)(image_keys(images[:, ::-1]))
    assert not set(draws) & set(np.asarray(flipped))


def test_jitter_multiplies_contrast_and_brightness_within_the_limits():
    image = np.zeros((1, 4, 4, 1), np.float32)
    image[:, :2], image[:, 2:] = 0.4, 0.5
    keys = jax.random.split(jax.random.key(0), 2000)
    found = np.asarray(jittered(jnp.tile(jnp.asarray(image), (2000, 1, 1, 1)), keys, 0.4), np.float64)
    dark, bright = found[:, 0, 0, 0], found[:, 3, 0, 0]
    brightness = (dark + bright) / 0.9
    contrast = (bright - dark) / 0.1 / brightness
    for factors in (brightness, contrast):
        assert 0.6 <= factors.min() < 0.61
        assert 1.39 < factors.max() <= 1.4 + 1e-5
        assert abs(factors.mean() - 1) < 0.02  # the standard error is 0.005
    assert abs(np.corrcoef(brightness, contrast)[0, 1]) < 0.1


def logistic_regression(features: np.ndarray, labels: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """The probabilities of scikit-learn's regression on scikit-learn's whitening, with a penalty of 0.001."""
    whitening = PCA(whiten=True).fit(features)
    regression = LogisticRegression(C=1 / (1e-3 * len(features)), tol=1e-8, max_iter=1000)
    return regression.fit(whitening.transform(features), labels).predict_proba(whitening.transform(asked))


def test_the_probe_is_the_logistic_regression_of_scikit_learn_on_whitened_features():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 60)
    features = rng.normal(size=(60, 5)) * np.array([1, 100, 0.01, 1, 1]) + labels[:, None]
    asked = rng.normal(size=(20, 5)) + 1
    expected = logistic_regression(features, labels, asked)
    found = scipy.special.softmax(probe(fit_probe(features, labels, 3, 1e-3), asked), axis=1)
    np.testing.assert_allclose(found, expected, atol=1e-3)
    # A unit that never varies, such as one that is always 0, changes nothing.
    dead = [np.concatenate([x, np.full((len(x), 1), 7.0)], axis=1) for x in (features, asked)]
    again = scipy.special.softmax(probe(fit_probe(dead[0], labels, 3, 1e-3), dead[1]), axis=1)
    np.testing.assert_allclose(again, found, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", pytest.param("pmap", marks=pytest.mark.exhaustive)])
def test_the_evaluation_named_probe_is_that_of_the_frozen_features(tmp_path, strategy):
    run = make_run(
        2,
        experiment=TASK,
        batch_size=8,
        optimizer=config.Optimizer(schedule=config.Schedule(peak=1e-2)),
        parallel=config.Parallel(strategy, devices=4),
        evaluation=config.Evaluation(batch_size=8),
        evaluations={"probe": config.Evaluation(every_steps=1, batch_size=8)},
        checkpoint=config.Checkpoint(best_metric="probe/accuracy"),
    )
    train(run, tmp_path / "run", verbose=False)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if row["step"] == 2 and "probe/accuracy" in row]
    trained = load(tmp_path / "run")
    known, asked = (TASK.source(split).arrays for split in ("train", "test"))
    features = [np.asarray(trained.predict(arrays)["features"], np.float64) for arrays in (known, asked)]
    right = logistic_regression(features[0], known["label"], features[1]).argmax(-1) == asked["label"]
    assert row["probe/accuracy"] == pytest.approx(right.mean(), abs=1e-6)
    assert row["probe/examples"] == SIZES["test"]
