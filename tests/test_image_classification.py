"""The image task: loss, metrics and the outputs of its two small models."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.augmentation import Augmentation, crop
from experiments.image_classification import ImageClassification
from experiments.models.cnn import StridedCNN
from experiments.models.mlp import MLP
from trainer.errors import NotPreparedError, UserError

EXAMPLES, HEIGHT, WIDTH, CHANNELS, CLASSES = 6, 7, 5, 2, 4
MODELS = {
    "cnn": ImageClassification(model="cnn", classes=CLASSES, widths=(3, 4), hidden=5),
    "cnn with batch_norm": ImageClassification(model="cnn", classes=CLASSES, widths=(3, 4), hidden=5, batch_norm=True),
    "mlp": ImageClassification(model="mlp", classes=CLASSES, widths=(5, 6)),
}


def images(examples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.1, 1, (examples, HEIGHT, WIDTH, CHANNELS)).astype(np.float32)


def keys(examples: int, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), examples)


def make_batch(examples: int = EXAMPLES) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    return {
        "image": jnp.asarray(rng.integers(0, 256, (examples, HEIGHT, WIDTH, CHANNELS), np.uint8)),
        "label": jnp.asarray(rng.integers(0, CLASSES, examples, np.int32)),
        "mask": jnp.ones(examples),
        "example_key": keys(examples),
    }


@functools.cache
def compiled(settings: str, train: bool) -> Callable[..., Any]:
    """The loss of a task with these settings, compiled once for all tests."""
    task = eval(settings)
    return jax.jit(lambda values, batch, key: task.loss(values, batch, key=key, train=train))


def run(task: ImageClassification, values: Any, batch: Any, *, train: bool, seed: int = 0) -> tuple[Any, Any]:
    """Metrics and collections of a batch."""
    return compiled(repr(task), train)(values, batch, jax.random.key(seed))


def total(task: ImageClassification, values: Any, batch: Any, *, train: bool, seed: int = 0) -> float:
    return float(run(task, values, batch, train=train, seed=seed)[0]["loss"].total)


def variables(task: ImageClassification) -> dict[str, Any]:
    """Random values in the right shapes: no bias or statistic is 0 or 1, and variances are positive."""
    rng = np.random.default_rng(2)
    shapes = jax.eval_shape(lambda: nn.unbox(dict(task.init(jax.random.key(0), make_batch()))))

    def made_up(path: Any, x: Any) -> jax.Array:
        values = rng.normal(size=x.shape) / np.sqrt(x.size / x.shape[-1])
        return jnp.asarray(np.abs(values) + 0.1 if path[0].key == "batch_stats" else values, x.dtype)

    return jax.tree_util.tree_map_with_path(made_up, shapes)


def test_loss_and_accuracy_are_those_of_float64_numpy():
    task, batch = ImageClassification(model="mlp", classes=CLASSES, widths=(5,), max_value=16.0), make_batch()
    values = variables(task)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), values["params"])
    x = np.asarray(batch["image"], np.float64).reshape(EXAMPLES, -1) / 16
    x = np.maximum(x @ params["dense_0"]["kernel"] + params["dense_0"]["bias"], 0)
    logits = x @ params["head"]["kernel"] + params["head"]["bias"]
    label = (logits.argmax(1) + np.array([0, 1, 0, 0, 2, 0])) % CLASSES  # four of the six are right
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(EXAMPLES), label]
    batch["label"] = jnp.asarray(label, jnp.int32)

    metrics, _ = run(task, values, batch, train=False)
    assert set(metrics) == {"loss", "accuracy"}
    np.testing.assert_allclose(float(metrics["loss"].total), losses.sum(), rtol=1e-5)
    assert float(metrics["accuracy"].total) == 4
    assert float(metrics["loss"].weight) == float(metrics["accuracy"].weight) == EXAMPLES


@pytest.mark.parametrize("task", MODELS.values(), ids=MODELS)
def test_masked_rows_do_not_count_whatever_their_labels(task):
    batch = make_batch()
    values = variables(task)
    masked = {**batch, "mask": jnp.array([1.0, 0, 1, 1, 0, 1]), "label": batch["label"].at[jnp.array([1, 4])].set(99)}
    kept = jax.tree.map(lambda x: x[jnp.array([0, 2, 3, 5])], batch)
    (actual, _), (expected, _) = (run(task, values, some, train=False) for some in (masked, kept))
    assert float(actual["loss"].weight) == float(actual["accuracy"].weight) == 4
    np.testing.assert_allclose(float(actual["loss"].total), float(expected["loss"].total), rtol=1e-6)
    assert float(actual["accuracy"].total) == float(expected["accuracy"].total)


@pytest.mark.parametrize(
    "model", [StridedCNN((3, 4), 5, CLASSES, 0.0, batch_norm=True), MLP((5,), CLASSES, 0.0)], ids=["cnn", "mlp"]
)
def test_a_model_gives_a_row_of_logits_for_each_image(model):
    x = jnp.asarray(images(EXAMPLES))
    logits, _ = jax.jit(lambda: model.init_with_output(jax.random.key(0), x, train=False))()
    assert logits.shape == (EXAMPLES, CLASSES)
    assert len(np.unique(logits)) == EXAMPLES * CLASSES


@pytest.mark.parametrize(("pixels", "seen_by_hidden"), [(8, 4 * 4), (15, 8 * 8), (16, 4 * 4), (28, 7 * 7)])
def test_every_convolution_but_the_first_on_images_below_16_pixels_halves_them(pixels, seen_by_hidden):
    task = MODELS["cnn"]
    batch = {"image": jnp.zeros((1, pixels, pixels, 1), jnp.uint8)}
    shapes = jax.eval_shape(lambda: nn.unbox(task.init(jax.random.key(0), batch)))
    assert shapes["params"]["hidden"]["kernel"].shape == (seen_by_hidden * 4, task.hidden)


@pytest.mark.parametrize("task", MODELS.values(), ids=MODELS)
def test_every_parameter_has_a_gradient(task):
    batch = make_batch(32)
    values = variables(task)

    def loss(params: Any) -> Any:
        return run(task, {**values, "params": params}, batch, train=True)[0]["loss"].total

    for path, gradient in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(values["params"])):
        assert np.any(np.asarray(gradient)), path


def test_batch_norm_gives_new_statistics_when_training_and_none_otherwise():
    task, batch = MODELS["cnn with batch_norm"], make_batch()
    values = variables(task)
    assert set(values) == {"params", "batch_stats"}
    before = jax.tree.map(np.asarray, values["batch_stats"])
    _, collections = run(task, values, batch, train=True)
    assert set(collections) == {"batch_stats"}
    assert jax.tree.structure(collections["batch_stats"]) == jax.tree.structure(before)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(collections["batch_stats"]), strict=True):
        assert (np.asarray(new) != old).all()
    _, collections = run(task, values, batch, train=False)
    assert not collections


def test_statistics_move_a_tenth_of_the_way_to_the_batchs():
    task, batch = MODELS["cnn with batch_norm"], make_batch()
    values = variables(task)
    _, collections = run(task, values, batch, train=True)
    convolved = jax.lax.conv_general_dilated(
        batch["image"] / jnp.float32(255),
        values["params"]["conv_0"]["kernel"],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    seen = np.asarray(convolved, np.float64).reshape(-1, 3)
    for name, target in (("mean", seen.mean(0)), ("var", seen.var(0))):
        expected = 0.9 * values["batch_stats"]["norm_0"][name] + 0.1 * target
        np.testing.assert_allclose(collections["batch_stats"]["norm_0"][name], expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["cnn", "mlp"])
def test_dropout_acts_only_when_training_and_follows_the_steps_key(name):
    task, batch = dataclasses.replace(MODELS[name], dropout=0.5), make_batch()
    values = variables(task)
    trained = [total(task, values, batch, train=True, seed=seed) for seed in (0, 0, 1)]
    assert trained[0] == trained[1] != trained[2]
    assert total(task, values, batch, train=False, seed=0) == total(task, values, batch, train=False, seed=1)


def test_images_are_cropped_by_their_example_keys_when_training_only():
    task, batch = dataclasses.replace(MODELS["mlp"], augmentation=Augmentation(crop=2)), make_batch()
    plain = MODELS["mlp"]
    values = variables(task)
    # Whole pixel values survive the way to float and back.
    cropped = crop(batch["image"].astype(jnp.float32), batch["example_key"], 2).astype(jnp.uint8)
    trained = total(task, values, batch, train=True)
    np.testing.assert_allclose(trained, total(plain, values, {**batch, "image": cropped}, train=True), rtol=1e-6)
    assert abs(trained - total(task, values, {**batch, "example_key": keys(EXAMPLES, seed=1)}, train=True)) > 1e-3
    del batch["example_key"]  # an evaluation has none
    assert total(task, values, batch, train=False) == total(plain, values, batch, train=False)


def test_the_loss_of_soft_targets_is_that_of_float64_numpy_and_hits_count_their_share():
    soft = Augmentation(mixup=0.7, label_smoothing=0.1)
    task, batch = dataclasses.replace(MODELS["mlp"], augmentation=soft), make_batch()
    values = variables(task)
    logits_of = jax.jit(lambda images: task._model().apply(values, images, train=False))
    images, targets = soft.mixed(
        batch["image"].astype(jnp.float32) / 255, jax.nn.one_hot(batch["label"], CLASSES), batch["example_key"]
    )
    logits, targets = np.asarray(logits_of(images), np.float64), np.asarray(targets, np.float64)
    log_probabilities = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    losses = -((0.9 * targets + 0.1 / CLASSES) * log_probabilities).sum(1)
    metrics, _ = run(task, values, batch, train=True)
    np.testing.assert_allclose(float(metrics["loss"].total), losses.sum(), rtol=1e-5)
    hits = targets[np.arange(EXAMPLES), logits.argmax(1)]
    assert ((hits > 0) & (hits < 1)).any()
    np.testing.assert_allclose(float(metrics["accuracy"].total), hits.sum(), rtol=1e-5)
    plain, _ = run(MODELS["mlp"], values, batch, train=False)
    evaluated, _ = run(task, values, batch, train=False)
    assert float(evaluated["loss"].total) == float(plain["loss"].total)


def test_pixels_are_normalised_by_channel():
    task = dataclasses.replace(MODELS["mlp"], mean=(0.25, 0.5), std=(0.5, 0.125))
    batch, values = make_batch(), variables(MODELS["mlp"])
    by_hand = (np.asarray(batch["image"], np.float64) / 255 - [0.25, 0.5]) / [0.5, 0.125]
    plain = dataclasses.replace(MODELS["mlp"], max_value=1.0)
    expected = jax.jit(lambda images: plain._model().apply(values, images, train=False))(by_hand.astype(np.float32))
    found = jax.jit(task.predict)(values, batch)["probabilities"]
    np.testing.assert_allclose(found, jax.nn.softmax(expected), rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "vit_s16", "widths": (3,)}, "widths is .* which model 'vit_s16' does not use .it uses blocks, drop"),
        ({"model": "resnet18", "blocks": (1, 1)}, r"blocks is \(1, 1\); model 'resnet18' has 4 of them"),
        ({"model": "resnet50", "batch_norm": True}, "batch_norm is True, which model 'resnet50' does not use"),
    ],
)
def test_a_setting_that_the_model_does_not_use_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        ImageClassification(**settings)._model()


def test_a_split_is_its_images_and_labels_and_prepare_is_what_an_error_asks_for(data_dir, tmp_path):
    source = ImageClassification(dataset="digits", data_dir=str(data_dir)).source("test")
    assert (len(source), set(source[0])) == (359, {"image", "label"})
    task = ImageClassification(dataset="digits", data_dir=str(tmp_path))
    with pytest.raises(NotPreparedError):
        task.source("test")
    task.prepare()
    assert len(task.source("test")) == 359
