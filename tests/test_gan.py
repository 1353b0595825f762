"""WGAN-GP and SN-GAN: losses and gradients, spectral normalization, samples, the Fréchet distance, every strategy."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from flax.traverse_util import flatten_dict
from PIL import Image

from experiments.frechet import frechet_distance, load_features
from experiments.gan import GAN, Linear, patches
from experiments.image_classification import ImageClassification
from tests.few_steps import STRATEGIES, Outcome, assert_same, few_steps
from tests.launched import StopsAt, launch, program_of
from tests.tasks import make_run
from trainer import config, load, train
from trainer.data import ArraySource, take
from trainer.data.stream import train_batches
from trainer.errors import UserError
from trainer.program import build_program

SIZES = {"train": 32, "test": 21}
LABELS = (("generator/.*", "generator"), ("discriminator/.*", "discriminator"))


def source(split: str, label: bool) -> ArraySource:
    rng = np.random.default_rng(len(split))
    arrays = {"image": rng.integers(0, 256, (SIZES[split], 8, 8, 1), np.uint8)}
    return ArraySource(arrays | ({"label": rng.integers(0, 3, SIZES[split]).astype(np.int32)} if label else {}))


@dataclasses.dataclass
class Noise(GAN):
    """A GAN on random images of 8×8 pixels."""

    def source(self, split: str) -> ArraySource:
        return source(split, label=False)


@dataclasses.dataclass
class Labelled(ImageClassification):
    """A classifier of the same images."""

    def source(self, split: str) -> ArraySource:
        return source(split, label=True)


TASKS = {kind: Noise(kind=kind, shape=(8, 8, 1), widths=(8, 16), latent=4, samples=9) for kind in ("wgan_gp", "sn_gan")}
each_kind = pytest.mark.parametrize("kind", TASKS)


def make_batch(examples: int) -> dict[str, Any]:
    images = source("train", label=False).arrays["image"][:examples]
    keys = jax.random.split(jax.random.key(1), examples)
    return {"image": jnp.asarray(images), "mask": jnp.ones(examples), "example_key": keys}


@functools.cache
def fresh(kind: str) -> Any:
    """Variables in which no bias is 0 and BatchNorm's statistics are not those of fresh ones."""
    variables = jax.jit(lambda: nn.unbox(TASKS[kind].init(jax.random.key(0), make_batch(2))))()
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + jnp.asarray(0.1 * rng.random(x.shape), jnp.float32), variables)


@functools.cache
def compiled(kind: str) -> Any:
    """Metrics and collections of a training step, and the gradients of the total of each loss, by its name."""
    task, names = TASKS[kind], ("loss", "generator_loss", "discriminator_loss")

    def step(variables: Any, batch: Any) -> Any:
        def totals(params: Any) -> Any:
            metrics, new = task.loss({**variables, "params": params}, batch, key=jax.random.key(0), train=True)
            return jnp.stack([metrics[name].total for name in names]), (metrics, new)

        _, pull, aux = jax.vjp(totals, variables["params"], has_aux=True)
        (stacked,) = jax.vmap(pull)(jnp.eye(3))
        return *aux, {name: jax.tree.map(lambda x, i=i: x[i], stacked) for i, name in enumerate(names)}

    return jax.jit(step)


def test_patches_times_a_kernel_are_a_convolution_and_its_transpose():
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 6, 8, 3)), rng.normal(size=(4, 4, 3, 5))
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    expected = np.zeros((2, 3, 4, 5))
    for row, column in np.ndindex(3, 4):
        window = padded[:, 2 * row : 2 * row + 4, 2 * column : 2 * column + 4]
        expected[:, row, column] = np.einsum("nijc,ijco->no", window, kernel)
    # A patch holds its 2×2 blocks one after the other, each with its 2×2 pixels.
    blocks = kernel.reshape(2, 2, 2, 2, 3, 5).swapaxes(1, 2).reshape(48, 5)
    found = patches(jnp.asarray(x, jnp.float32)) @ blocks.astype(np.float32)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_power_iteration_finds_the_largest_singular_value():
    x = jnp.eye(7)
    layer: Any = Linear(5, (None, None), spectral=True)
    variables = nn.unbox(layer.init(jax.random.key(0), x))
    assert set(variables) == {"params", "spectral"}
    step = jax.jit(lambda variables: layer.apply(variables, x, mutable=["spectral"]))
    for _ in range(200):
        _, new = step(variables)
        variables = {**variables, **new}
    kernel = np.asarray(variables["params"]["kernel"], np.float64)
    largest = np.linalg.svd(kernel, compute_uv=False)[0]
    # With a vector that does not move, as at an evaluation, the layer is the same.
    np.testing.assert_allclose(layer.apply(variables, x), kernel / largest, rtol=0, atol=1e-6)
    np.testing.assert_allclose(step(variables)[0], kernel / largest, rtol=0, atol=1e-6)


def reference_scores(params: Any, images: np.ndarray, sigmas: dict[str, float]) -> np.ndarray:
    """The discriminator in float64 NumPy."""
    x = images
    for name in ("down_0", "down_1"):
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        kernel = params[name]["kernel"].reshape(2, 2, 2, 2, x.shape[-1], -1).swapaxes(1, 2)
        kernel = kernel.reshape(4, 4, x.shape[-1], -1) / sigmas.get(name, 1)
        rows, columns = x.shape[1] // 2, x.shape[2] // 2
        y = np.zeros((len(x), rows, columns, kernel.shape[-1]))
        for row, column in np.ndindex(rows, columns):
            window = padded[:, 2 * row : 2 * row + 4, 2 * column : 2 * column + 4]
            y[:, row, column] = np.einsum("nijc,ijco->no", window, kernel) + params[name]["bias"]
        x = np.where(y > 0, y, 0.2 * y)
    return (x.reshape(len(x), -1) @ (params["head"]["kernel"] / sigmas.get("head", 1)))[:, 0] + params["head"].get(
        "bias", 0
    )


def fakes_and_shares(kind: str, batch: Any) -> tuple[np.ndarray, np.ndarray]:
    """The images that a training step generates, and the shares of the real images in the points of the penalty."""
    keys = jax.vmap(jax.random.split)(batch["example_key"])
    latents = jnp.stack([jax.random.normal(key, (4,)) for key in keys[:, 0]])
    shares = np.array([float(jax.random.uniform(key, (1, 1, 1))[0, 0, 0]) for key in keys[:, 1]])
    generate = jax.jit(
        lambda *x: TASKS[kind]._networks().apply(*x, True, method="generate", mutable=["batch_stats"])[0]
    )
    return np.asarray(generate(fresh(kind), latents), np.float64), shares


def test_the_losses_of_wgan_gp_are_those_of_float64_numpy():
    batch, params = make_batch(3), jax.tree.map(lambda x: np.asarray(x, np.float64), fresh("wgan_gp")["params"])
    score = functools.partial(reference_scores, params["discriminator"], sigmas={})
    real, (fake, shares) = np.asarray(batch["image"], np.float64) / 127.5 - 1, fakes_and_shares("wgan_gp", batch)
    between = shares[:, None, None, None] * real + (1 - shares[:, None, None, None]) * fake
    gradient = np.zeros_like(between)
    for place in np.ndindex(between.shape[1:]):
        moved = np.zeros(between.shape[1:])
        moved[place] = 1e-6
        gradient[:, *place] = (score(between + moved) - score(between - moved)) / 2e-6
    slopes = np.sqrt((gradient**2).sum((1, 2, 3)))
    expected = {
        "gap": score(real) - score(fake),
        "slope": slopes,
        "generator_loss": -score(fake),
        "discriminator_loss": score(fake) - score(real) + 10 * (slopes - 1) ** 2,
    }
    assert_means(compiled("wgan_gp")(fresh("wgan_gp"), batch)[0], expected)


def test_the_losses_of_sn_gan_are_those_of_float64_numpy():
    batch, params = make_batch(3), jax.tree.map(lambda x: np.asarray(x, np.float64), fresh("sn_gan")["params"])
    metrics, after, _ = compiled("sn_gan")(fresh("sn_gan"), batch)
    real, (fake, _) = np.asarray(batch["image"], np.float64) / 127.5 - 1, fakes_and_shares("sn_gan", batch)
    sigmas: list[dict[str, float]] = [{}, {}]  # for the real images, and for the generated ones
    for name in ("down_0", "down_1", "head"):
        kernel = params["discriminator"][name]["kernel"]
        u = np.asarray(fresh("sn_gan")["spectral"]["discriminator"][name]["u"], np.float64)
        v = kernel @ u / np.linalg.norm(kernel @ u)
        u = kernel.T @ v / np.linalg.norm(kernel.T @ v)
        sigmas[0][name] = v @ kernel @ u
        sigmas[1][name] = float(np.linalg.norm(kernel @ u))  # with the vector that has moved
        np.testing.assert_allclose(after["spectral"]["discriminator"][name]["u"], u, atol=1e-5)
    real_scores, fake_scores = (
        reference_scores(params["discriminator"], images, found)
        for images, found in zip((real, fake), sigmas, strict=True)
    )
    expected = {
        "gap": real_scores - fake_scores,
        "generator_loss": -fake_scores,
        "discriminator_loss": np.maximum(0, 1 - real_scores) + np.maximum(0, 1 + fake_scores),
    }
    assert_means(metrics, expected)


def assert_means(metrics: Any, expected: dict[str, np.ndarray]) -> None:
    """To float32 rounding; "loss" is the sum of both losses."""
    expected["loss"] = expected["generator_loss"] + expected["discriminator_loss"]
    assert {name: metric.compute() for name, metric in metrics.items()} == pytest.approx(
        {name: values.mean() for name, values in expected.items()}, rel=2e-5, abs=2e-5
    )


@each_kind
def test_the_gradient_of_the_sum_has_for_each_label_that_of_its_own_loss(kind):
    _, _, grads = compiled(kind)(fresh(kind), make_batch(3))
    for label, other in (("generator", "discriminator"), ("discriminator", "generator")):
        own = grads[f"{label}_loss"]
        assert all(not np.any(x) for x in jax.tree.leaves(own[other]))
        for (path, g), expected in zip(
            jax.tree_util.tree_leaves_with_path(grads["loss"][label]), jax.tree.leaves(own[label]), strict=True
        ):
            assert np.any(g), path
            np.testing.assert_allclose(g, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def small_run(kind: str, total_steps: int, **settings: Any) -> config.Run:
    optimizer = config.Optimizer(
        schedule=config.Schedule(peak=2e-4),
        b1=0.5,
        labels=LABELS,
        groups={"generator": config.Group(every_steps=3), "discriminator": config.Group()},
    )
    defaults: dict[str, Any] = {"experiment": TASKS[kind], "batch_size": 8, "optimizer": optimizer}
    return make_run(total_steps, **defaults | {"parallel": config.Parallel(devices=1)} | settings)


def test_the_generator_moves_at_every_third_step_and_the_discriminator_at_all():
    program = program_of(small_run("sn_gan", 4))
    state, moved = program.init(), []
    for batch in train_batches(program.train_source, seed=0, batch_size=8, start=0, stop=4):
        before = jax.device_get(state.params)
        state, _ = program.train_step(state, program.strategy.shard_batch(batch))
        same = jax.tree.map(np.array_equal, before, jax.device_get(state.params))
        moved.append({label: not all(jax.tree.leaves(same[label])) for label in same})
    assert [step["discriminator"] for step in moved] == [True] * 4
    assert [step["generator"] for step in moved] == [True, False, False, True]


@functools.cache
def outcome(kind: str, strategy: str, devices: int) -> Outcome:
    groups = {"generator": config.Group(every_steps=2), "discriminator": config.Group()}
    return few_steps(TASKS[kind], strategy, devices, labels=LABELS, groups=groups)


OFTEN = (("wgan_gp", "fsdp_tensor"), ("sn_gan", "pmap"))
CASES = [
    pytest.param(kind, strategy, marks=[] if (kind, strategy) in OFTEN else [pytest.mark.exhaustive])
    for kind in TASKS
    for strategy in STRATEGIES
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "strategy"), CASES)
def test_four_devices_give_the_losses_the_parameters_and_the_spectral_vectors_of_one(kind, strategy):
    found = outcome(kind, strategy, 4)
    assert_same(found, outcome(kind, "data", 1))
    assert found.axes >= {axis for axis in ("fsdp", "tensor") if axis in strategy}  # something was sharded


@each_kind
def test_an_evaluation_does_not_depend_on_the_batch_size(kind):
    task, batch = TASKS[kind], {name: x for name, x in make_batch(6).items() if name != "example_key"}
    measure = jax.jit(lambda batch: task.loss(fresh(kind), batch, key=jax.random.key(0), train=False)[0])
    whole = measure(batch)
    parts = [measure(jax.tree.map(lambda x, i=i: x[i : i + 2], batch)) for i in (0, 2, 4)]
    for name, metric in whole.items():
        assert sum(part[name].compute() for part in parts) / 3 == pytest.approx(metric.compute(), rel=1e-5, abs=1e-5)


def bits(state: Any) -> dict[str, bytes]:
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(state))
    return {jax.tree_util.keystr(path): np.asarray(x).tobytes() for path, x in leaves}


@pytest.mark.slow
def test_a_run_that_is_continued_has_the_same_bits_and_reports_a_grid_of_samples(tmp_path):
    whole = launch(small_run("sn_gan", 4), tmp_path / "whole")
    assert int(launch(small_run("sn_gan", 4), tmp_path / "run", hooks=[StopsAt(2)]).step) == 2
    assert bits(launch(small_run("sn_gan", 4), tmp_path / "run")) == bits(whole)
    trained = load(tmp_path / "run")
    vectors = flatten_dict(trained.variables["spectral"]["discriminator"], sep="/")
    assert vectors.keys() == {"down_0/u", "down_1/u", "head/u"}
    expected = np.asarray(TASKS["sn_gan"].generate(trained.variables, 9, jax.random.key(0)))
    grid = np.asarray(Image.open(tmp_path / "run" / "reports" / "4" / "samples.png"))
    assert grid.shape == (24, 24)
    np.testing.assert_array_equal(grid[8:16, 16:], expected[5, ..., 0])
    varied = np.asarray(TASKS["sn_gan"].generate(fresh("sn_gan"), 9, jax.random.key(0)))
    assert len(np.unique(varied.reshape(9, -1), axis=0)) == 9  # each has its own latent


def frechet_by_sqrtm(first: np.ndarray, second: np.ndarray) -> float:
    covariances = [np.cov(features, rowvar=False) for features in (first, second)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
    distance = np.square(first.mean(0) - second.mean(0)).sum()
    return float(distance + np.trace(covariances[0] + covariances[1] - 2 * np.real(root)))


def test_the_frechet_distance_is_that_of_scipys_root_of_a_matrix():
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(2, 6, 6))
    first, second = rng.normal(size=(40, 6)) @ mix[0] + 1, rng.normal(size=(70, 6)) @ mix[1]
    assert frechet_distance(first, second) == pytest.approx(frechet_by_sqrtm(first, second), rel=1e-9)


def test_the_frechet_distance_of_equal_and_of_shifted_sets_and_of_units_that_never_vary():
    features = np.random.default_rng(0).normal(size=(30, 4))
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(features, features + 3) == pytest.approx(4 * 9)
    # Two normal distributions of one dimension: (μ₁ − μ₂)² + (σ₁ − σ₂)².
    wide = np.concatenate([5 * features[:, :1], np.zeros((30, 3))], axis=1)
    narrow = np.concatenate([features[:, :1], np.zeros((30, 3))], axis=1)
    mean, std = features[:, 0].mean(), features[:, 0].std(ddof=1)
    assert frechet_distance(wide, narrow) == pytest.approx((4 * mean) ** 2 + (4 * std) ** 2)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of a classifier of the same images."""
    workdir = tmp_path_factory.mktemp("classifier") / "run"
    experiment = Labelled(classes=3, widths=(4,), hidden=6, dropout=0.5)
    optimizer = config.Optimizer(schedule=config.Schedule(peak=1e-2))
    one = config.Parallel(devices=1)
    train(make_run(2, experiment=experiment, optimizer=optimizer, parallel=one), workdir, verbose=False)
    return workdir


def features_of(classifier: Path, images: np.ndarray) -> np.ndarray:
    """The classifier's hidden layer in float64 NumPy."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), load(classifier).variables["params"])
    x = images / 255
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    kernel = params["conv_0"]["kernel"]
    y = sum(
        padded[:, i : i + x.shape[1], j : j + x.shape[2]] @ kernel[i, j] for i, j in np.ndindex(3, 3)
    )  # of stride 1, as the images are small
    hidden = np.maximum(y + params["conv_0"]["bias"], 0).reshape(len(x), -1)
    return np.maximum(hidden @ params["hidden"]["kernel"] + params["hidden"]["bias"], 0)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", pytest.param("pmap", marks=pytest.mark.exhaustive)])
def test_the_evaluation_named_samples_is_the_distance_in_the_features_of_the_classifier(tmp_path, classifier, strategy):
    task = dataclasses.replace(TASKS["sn_gan"], classifier=f"{classifier}@latest")
    run = small_run(
        "sn_gan",
        1,
        experiment=task,
        parallel=config.Parallel(strategy, devices=4),
        evaluations={"samples": config.Evaluation(batch_size=8)},
    )
    train(run, tmp_path / "run", verbose=False)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if "samples/examples" in row]
    variables = load(tmp_path / "run").variables
    generated = np.asarray(task.generate(variables, SIZES["test"], jax.random.key(0)), np.float64)  # of any batch size
    fake = features_of(classifier, generated)
    real = features_of(classifier, np.asarray(take(task.source("test"), np.arange(21))["image"], np.float64))
    assert row["samples/frechet_fashion_cnn"] == pytest.approx(frechet_distance(real, fake), rel=1e-3)
    assert row["samples/examples"] == SIZES["test"]


def test_a_classifier_that_is_trained_again_in_its_workdir_is_read_again(tmp_path):
    sharding, images, found = jax.sharding.SingleDeviceSharding(jax.devices()[0]), make_batch(2)["image"], []
    for seed in (0, 1):
        experiment = Labelled(classes=3, widths=(4,), hidden=6)
        run = make_run(3, experiment=experiment, seed=seed, parallel=config.Parallel(devices=1))
        train(run, tmp_path / "run", verbose=False)
        features = load_features(f"{tmp_path}/run@latest", sharding)
        assert load_features(f"{tmp_path}/run@latest", sharding) is features
        found.append(np.asarray(features(images)))
        np.testing.assert_allclose(found[-1], features_of(tmp_path / "run", np.asarray(images)), rtol=1e-4, atol=1e-5)
        shutil.rmtree(tmp_path / "run")
    assert not np.allclose(*found)


def test_without_a_classifier_there_is_no_distance_and_other_evaluations_are_by_the_loss():
    task = TASKS["wgan_gp"]
    assert task.evaluate("samples", fresh("wgan_gp"), iter([make_batch(2)])) == {}
    assert task.evaluate("test", fresh("wgan_gp"), iter([make_batch(2)])) is None


def test_a_model_without_a_head_has_no_features(classifier, monkeypatch):
    @dataclasses.dataclass
    class Headless(Labelled):
        def predict(self, variables, batch):
            return {"mean": batch["image"].mean((1, 2, 3))}

    monkeypatch.setattr(Labelled, "predict", Headless.predict)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[1])
    with pytest.raises(UserError, match=r"calls a layer 'head' 0 times; once is expected"):
        load_features(str(classifier), sharding)(make_batch(2)["image"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shape": (28, 28, 1)}, r"the images have shape \(8, 8, 1\); the setting shape is \(28, 28, 1\)"),
        ({"shape": (6, 8, 1)}, r"shape \(6, 8, 1\): height and width must be multiples of 4"),
    ],
)
def test_images_that_do_not_fit_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        build_program(config.resolve(small_run("wgan_gp", 1, experiment=Noise(latent=4, **settings))))
