"""Metrics against scikit-learn, on the predictions of a real classifier, in uneven parts that hold masked examples."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn import datasets, dummy, linear_model, metrics, preprocessing

from tests.tasks import Net, Task, make_run
from trainer import config, load, train
from trainer.data.stream import train_batches
from trainer.errors import UserError
from trainer.evaluation import evaluate_split
from trainer.metrics import AUC, Accuracy, ConfusionMatrix, Histogram, Mean, Moments, Perplexity, Sum, add, numbers
from trainer.observe.log import read_rows
from trainer.program import build_program

CASES = range(20)
CLASSES = 10
SIZES = (150, 640)  # of a part with its rubbish: each is compiled once


@functools.cache
def predictions() -> tuple[np.ndarray, np.ndarray]:
    """The log-probabilities of a linear classifier for 1,297 handwritten digits that it did not see, and the labels."""
    data: Any = datasets.load_digits()
    images, labels = data.data, data.target
    model = linear_model.LogisticRegression(C=0.1, max_iter=100).fit(images[:500] / 16, labels[:500])
    return model.predict_log_proba(images[500:] / 16).astype(np.float32), labels[500:].astype(np.int32)


@dataclasses.dataclass
class Case:
    """Some of the predictions, with weights."""

    logits: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    rng: np.random.Generator

    @property
    def chosen(self) -> np.ndarray:
        return self.logits.argmax(-1)

    def parts(self, of: Callable[..., Any], *arrays: np.ndarray, **settings: Any) -> Any:
        """The metric of the whole, added up from uneven parts that each have masked examples of rubbish."""
        cuts = np.sort(self.rng.integers(0, len(self.labels), self.rng.integers(0, 5)))
        total = None
        for part in np.split(np.arange(len(self.labels)), cuts):
            masked = next(size for size in SIZES if size >= len(part) + 3) - len(part)
            padded = [np.concatenate([x[part], rubbish(x, masked)]) for x in arrays]
            weights = np.concatenate([self.weights[part], np.zeros(masked, np.float32)])
            total = add(total, {"metric": compiled(of, **settings)(*padded, weights)})
        assert total is not None
        return total["metric"]


@functools.cache
def compiled(of: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    return jax.jit(functools.partial(of, **settings))


def rubbish(x: np.ndarray, count: int) -> np.ndarray:
    value = np.nan if np.issubdtype(x.dtype, np.floating) else np.iinfo(x.dtype).max
    return np.full((count, *x.shape[1:]), value, x.dtype)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    rng = np.random.default_rng(request.param)
    logits, labels = predictions()
    chosen = rng.choice(len(labels), rng.integers(20, 600))
    weights = rng.integers(0, 3, len(chosen)) if request.param % 2 else rng.random(len(chosen))
    return Case(logits[chosen], labels[chosen], weights.astype(np.float32), rng)


def test_mean_sum_and_perplexity(case):
    losses = -case.logits[np.arange(len(case.labels)), case.labels]
    probabilities = np.exp(np.float64(case.logits))
    probabilities /= probabilities.sum(-1, keepdims=True)  # they were rounded to float32
    loss = metrics.log_loss(case.labels, probabilities, sample_weight=case.weights, labels=np.arange(CLASSES))
    assert case.parts(Mean.of, losses).compute() == pytest.approx(loss, rel=1e-6)
    assert case.parts(Perplexity.of, losses).compute() == pytest.approx(np.exp(loss), rel=1e-6)
    assert case.parts(Sum.of, losses).compute() == pytest.approx(loss * case.weights.sum(dtype=np.float64), rel=1e-6)


@pytest.mark.parametrize("top_k", [1, 3])
def test_accuracy_of_the_top_k(case, top_k):
    expected = metrics.top_k_accuracy_score(
        case.labels, case.logits, k=top_k, sample_weight=case.weights, labels=np.arange(CLASSES)
    )
    found = case.parts(Accuracy.of, case.logits, case.labels, top_k=top_k)
    assert found.compute() == pytest.approx(expected, rel=1e-6)


def test_precision_recall_and_f1_of_a_confusion_matrix(case):
    found = case.parts(ConfusionMatrix.of, case.chosen, case.labels, classes=CLASSES).compute()
    expected = {"accuracy": metrics.accuracy_score(case.labels, case.chosen, sample_weight=case.weights)}
    counted = case.weights > 0
    for average in ("macro", "micro"):
        scores = metrics.precision_recall_fscore_support(
            case.labels[counted],
            case.chosen[counted],
            average=average,
            sample_weight=case.weights[counted],
            zero_division=0,
        )
        expected |= dict(zip([f"{name}_{average}" for name in ("precision", "recall", "f1")], scores, strict=False))
    assert found == pytest.approx(expected, rel=1e-6)


def test_area_under_the_curve_of_scores_in_bins(case):
    is_odd, probability = case.labels % 2, np.exp(case.logits[:, 1::2]).sum(-1)
    rounded = np.floor(probability * 1024).clip(0, 1023)
    expected = metrics.roc_auc_score(is_odd, rounded, sample_weight=case.weights)
    assert case.parts(AUC.of, probability, is_odd).compute() == pytest.approx(expected, rel=1e-6)
    exact = metrics.roc_auc_score(is_odd, probability, sample_weight=case.weights)
    assert expected == pytest.approx(exact, abs=2e-3)


@pytest.mark.parametrize("settings", [{}, {"center": -0.5}], ids=str)
def test_moments(case, settings):
    values = case.logits.max(-1)
    found = case.parts(Moments.of, values, **settings).compute()
    scaler: Any = preprocessing.StandardScaler()
    scaler.fit(values.astype(np.float64)[:, None], sample_weight=case.weights.astype(np.float64))
    assert found == pytest.approx({"mean": scaler.mean_[0], "std": np.sqrt(scaler.var_[0])}, rel=1e-6)


def test_percentiles_of_a_histogram(case):
    values = np.exp(case.logits.max(-1))
    found = case.parts(Histogram.of, values, low=0.0, high=1.0, bins=200).compute()
    for percent in PERCENTILES:  # where a percentile falls between two values, it may be any number between
        low, high = (quantile(values, case.weights, percent / 100 + away) for away in (-1e-6, 1e-6))
        assert low - 1 / 200 <= found[f"p{percent}"] <= high + 1 / 200


PERCENTILES = (5, 25, 50, 75, 95)


def quantile(values: np.ndarray, weights: np.ndarray, share: float) -> float:
    """Scikit-learn's weighted quantile: the smallest value up to which there is that share of the weight."""
    regressor = dummy.DummyRegressor(strategy="quantile", quantile=share)
    return regressor.fit(values[:, None], np.float64(values), np.float64(weights)).constant_.item()


@pytest.mark.parametrize("seed", CASES)
def test_percentiles_of_values_at_the_ends_of_bins_are_exact(seed):
    rng = np.random.default_rng(seed)
    ends = (rng.integers(1, 45) + np.arange(20)) / 64  # of 20 bins that have a twentieth each
    counts = rng.integers(1, 9, 20)
    values = np.repeat(np.nextafter(ends.astype(np.float32), np.float32(0)), counts)
    weights = np.repeat(840 // counts, counts).astype(np.float32)
    values, weights = (np.pad(x, (0, 160 - len(x))) for x in (values, weights))  # one shape: compiled once
    found = compiled(Histogram.of, low=0.0, high=1.0)(values, weights).compute()
    expected = {f"p{percent}": quantile(values, weights, percent / 100) for percent in PERCENTILES}
    assert found == pytest.approx(expected, abs=1e-6)


def test_counts_of_a_histogram_are_those_of_numpy(case):
    values = case.logits.max(-1)
    found = case.parts(Histogram.of, values, low=-1.0, high=0.0, bins=16)
    expected, _ = np.histogram(values.clip(-1, 0), 16, (-1, 0), weights=np.float64(case.weights))
    np.testing.assert_allclose(found.counts, expected, rtol=1e-6)


ZERO = jnp.zeros(4)
NOTHING = {
    "mean": Mean.of(ZERO, ZERO),
    "perplexity": Perplexity.of(ZERO, ZERO),
    "accuracy": Accuracy.of(jnp.zeros((4, 3)), jnp.zeros(4, jnp.int32), ZERO),
    "matrix": ConfusionMatrix.of(jnp.zeros(4, jnp.int32), jnp.zeros(4, jnp.int32), ZERO, classes=3),
    "auc": AUC.of(ZERO, ZERO, ZERO),
    "moments": Moments.of(ZERO, ZERO),
    "histogram": Histogram.of(ZERO, ZERO, low=0.0, high=1.0),
}


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16"])
def test_classes_may_be_of_any_integer_dtype(dtype):
    classes = 100
    labels, weights = jnp.arange(classes).astype(dtype), jnp.ones(classes)
    chosen = jnp.where(labels == 3, 7, labels)
    found = ConfusionMatrix.of(chosen.astype(jnp.int32), labels, weights, classes)
    expected = np.zeros((classes, classes))
    np.add.at(expected, (np.arange(classes), np.asarray(chosen, int)), 1)
    np.testing.assert_array_equal(found.counts, expected)
    logits = jax.nn.one_hot(chosen, classes)
    assert Accuracy.of(logits, labels, weights).compute() == pytest.approx(0.99)


def test_a_class_beyond_those_that_there_are_is_never_taken_for_another():
    logits, labels, weights = jnp.asarray([[0.0, 1.0], [1.0, 0.0]]), jnp.asarray([-1, 0]), jnp.ones(2)
    assert Accuracy.of(logits, labels, weights).compute() == 0.5
    found = ConfusionMatrix.of(logits.argmax(-1), labels, weights, 2).compute()
    assert all(np.isnan(value) for value in found.values())
    masked = ConfusionMatrix.of(logits.argmax(-1), labels, jnp.asarray([0.0, 1.0]), 2).compute()
    assert masked["accuracy"] == 1.0


def test_two_metrics_that_give_one_name_and_one_that_gives_no_number_are_named():
    one = jnp.ones(2, jnp.int32)
    matrix = ConfusionMatrix.of(one, one, one, 2)
    with pytest.raises(UserError, match="two metrics give a number with the name test/m/accuracy; rename one"):
        numbers({"m": matrix, "m/accuracy": Mean.of(one, one)}, "test")
    with pytest.raises(UserError, match=r"test/m is 'high', a str; one number or a metric is expected"):
        numbers({"m": "high"}, "test")
    assert numbers({"tokens": 123456789, "x": 0.9}, "test") == {"test/tokens": 123456789.0, "test/x": 0.9}


@pytest.mark.parametrize("name", NOTHING)
def test_nothing_counted_is_nan(name):
    found = numbers({name: NOTHING[name]}, "test")
    assert np.isnan(list(found.values())).all()
    assert all(key.startswith(f"test/{name}") for key in found)


@pytest.mark.parametrize("logits", [[0.0, 0.0, 0.0], [np.nan, 0.0, 0.0], [np.nan] * 3])
def test_logits_that_are_equal_or_nan_are_no_hit_for_every_label(logits):
    labels = jnp.arange(3)
    hits = Accuracy.of(jnp.tile(jnp.asarray(logits), (3, 1)), labels, jnp.ones(3))
    assert float(hits.total) == (1 if logits == [0.0] * 3 else 0)


def test_a_score_that_is_nan_makes_the_area_nan_unless_it_is_masked():
    scores, labels = jnp.array([0.1, 0.9, np.nan]), jnp.array([0, 1, 1])
    assert np.isnan(AUC.of(scores, labels, jnp.ones(3)).compute())
    assert AUC.of(scores, labels, jnp.array([1.0, 1.0, 0.0])).compute() == 1


@pytest.mark.parametrize(
    "of",
    [
        Mean.of,
        AUC.of,
        Moments.of,
        functools.partial(Histogram.of, low=0.0, high=1.0),
        functools.partial(ConfusionMatrix.of, classes=2),
    ],
)
def test_weights_of_another_shape_are_an_error(of):
    arrays = [jnp.zeros((4, 1), jnp.int32)] * (2 if getattr(of, "func", of) in (AUC.of, ConfusionMatrix.of) else 1)
    with pytest.raises(ValueError, match=r"needs values and weights of one shape, not \(4, 1\) and \(4,\)"):
        of(*arrays, jnp.ones(4))


def test_labels_of_another_shape_than_the_predictions_are_an_error():
    with pytest.raises(ValueError, match=r"needs values and weights of one shape, not \(4, 1\) and \(4,\)"):
        ConfusionMatrix.of(jnp.zeros(4, jnp.int32), jnp.zeros((4, 1), jnp.int32), jnp.ones(4), classes=2)


@flax.struct.dataclass
class Extremes:
    """A user's own metric: how many values are far out, and their share."""

    far: jax.Array
    count: jax.Array

    def compute(self) -> dict[str, float]:
        return {"far": float(self.far), "share": float(self.far) / max(float(self.count), 1.0)}


@dataclasses.dataclass
class Everything(Task):
    """`Task` with a metric of each kind. The model is a fixed function of the data, whatever the parameters."""

    def loss(self, variables, batch, *, key, train) -> Any:
        result, collections = super().loss(variables, batch, key=key, train=train)
        logits, mask = batch["x"][:, :3], batch["mask"]
        far = jnp.abs(batch["x"][:, 0]) > 1
        return {
            **result,
            "top_2": Accuracy.of(logits, batch["label"], mask, top_k=2),
            "matrix": ConfusionMatrix.of(logits.argmax(-1), batch["label"], mask, classes=3),
            "area": AUC.of(jax.nn.sigmoid(logits[:, 0]), batch["label"] == 0, mask),
            "moments": Moments.of(logits[:, 1], mask),
            "spread": Histogram.of(logits[:, 1], mask, low=-3.0, high=3.0),
            "tokens": Sum.of(jnp.ones_like(mask), mask),
            "perplexity": Perplexity.of(optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]), mask),
            "own": Extremes(jnp.sum(far * mask), jnp.sum(mask, dtype=jnp.float32).astype(jnp.int32)),
        }, collections


MADE_BY_THE_MODEL = ("loss", "accuracy", "grad_norm", "learning_rate")


def whole(source: Any, ids: np.ndarray) -> dict[str, float]:
    """The metrics of examples in one batch."""
    batch = {name: np.stack([source[int(i)][name] for i in ids]) for name in source[0]}
    return numbers_of(batch | {"mask": np.ones(len(ids), np.float32)}, "test")


def numbers_of(batch: Any, prefix: str) -> dict[str, float]:
    """The metrics of a whole batch, but those that the model makes."""
    metrics = without_parts()(batch)
    return numbers({name: metric for name, metric in metrics.items() if name not in MADE_BY_THE_MODEL}, prefix)


@functools.cache
def without_parts() -> Any:
    task = Everything(batch_norm=False)

    def measure(batch: Any) -> Any:
        variables = task.init(jax.random.key(0), batch)
        return task.loss(variables, batch, key=jax.random.key(0), train=False)[0]

    return jax.jit(measure)


@pytest.mark.parametrize(("strategy", "devices", "microbatches"), [("data", 1, 1), ("data", 4, 1), ("pmap", 4, 2)])
def test_an_evaluation_in_uneven_batches_over_devices_gives_the_metrics_of_the_whole_split(
    strategy, devices, microbatches
):
    program = program_of(strategy, devices, microbatches)
    found = evaluate_split(program, program.init(), program.main_evaluation.source)
    expected = whole(program.main_evaluation.source, np.arange(len(program.main_evaluation.source)))
    assert {name: value for name, value in found.items() if name in expected} == pytest.approx(expected, rel=1e-6)
    assert {"test/matrix/f1_macro", "test/own/share", "test/spread/p50", "test/area"} <= found.keys()


@pytest.mark.parametrize(("strategy", "microbatches"), [("data", 1), ("data", 2), ("pmap", 2)])
def test_a_step_gives_the_metrics_of_its_whole_batch(strategy, microbatches):
    program = program_of(strategy, 4, microbatches)
    ids = np.arange(16)
    examples = [program.train_source[int(i)] for i in ids]
    batch = {name: np.stack([example[name] for example in examples]) for name in examples[0]}
    _, found = program.train_step(program.init(), program.strategy.shard_batch(batch | {"mask": np.ones(16, "f")}))
    expected = whole(program.train_source, ids)
    values = numbers(found, "test")
    assert {name: values[name] for name in expected} == pytest.approx(expected, rel=1e-6)


@functools.cache
def program_of(strategy: str, devices: int, microbatches: int) -> Any:
    parallel = config.Parallel(strategy, devices=devices)
    experiment = Everything(batch_norm=False)
    run = make_run(experiment=experiment, batch_size=16, parallel=parallel, microbatches=microbatches)
    return build_program(config.resolve(run))


@dataclasses.dataclass
class Scored(Everything):
    """`Everything`, but the matrix is that of the model's predictions; the other one is there as `fixed`."""

    def loss(self, variables, batch, *, key, train) -> Any:
        result, collections = super().loss(variables, batch, key=key, train=train)
        logits: Any = Net(self.dropout, self.batch_norm).apply(variables, batch["x"], train=False)
        matrix = ConfusionMatrix.of(logits.argmax(-1), batch["label"], batch["mask"], classes=3)
        return {**result, "fixed": result["matrix"], "matrix": matrix}, collections


def test_a_run_logs_every_number_of_its_batches_and_keeps_the_checkpoint_with_the_best_f1(tmp_path):
    checkpoint = config.Checkpoint(every_steps=2, keep_last=1, best_metric="test/matrix/f1_macro")
    run = make_run(
        8,
        experiment=Scored(batch_norm=False),
        seed=5,  # of which the best is not the last
        microbatches=2,
        parallel=config.Parallel(devices=1),
        evaluation=config.Evaluation(every_steps=2, batch_size=8),
        checkpoint=checkpoint,
    )
    train(run, tmp_path / "run", verbose=False)
    rows = list(read_rows(tmp_path / "run" / "metrics.jsonl"))
    trained = {row["step"]: row for row in rows if "train/loss" in row}
    batches = train_batches(run.experiment.source("train"), seed=5, batch_size=16, start=0, stop=8)
    for step, batch in enumerate(batches, 1):
        whole = numbers_of({name: batch[name] for name in ("x", "label", "mask")}, "train")
        expected = {name.replace("/matrix/", "/fixed/"): value for name, value in whole.items()}
        assert {name: trained[step][name] for name in expected} == pytest.approx(expected, rel=1e-6)
        matrix = {name for name in trained[step] if name.startswith("train/matrix/")}
        assert matrix == {name for name in whole if name.startswith("train/matrix/")}
    scores = {row["step"]: row["test/matrix/f1_macro"] for row in rows if "test/matrix/f1_macro" in row}
    assert list(scores) == [2, 4, 6, 8]
    best = max(scores, key=lambda step: scores[step])
    assert list(scores.values()).count(scores[best]) == 1
    assert best < 8
    assert load(tmp_path / "run", "best").step == best


def test_the_best_checkpoint_may_be_chosen_by_a_number_of_a_metric():
    checkpoint = config.Checkpoint(every_steps=2, best_metric="test/matrix/f1_macro")
    evaluation = config.Evaluation(every_steps=2)
    run = make_run(4, experiment=Everything(), checkpoint=checkpoint, evaluation=evaluation)
    build_program(config.resolve(run))
    run.checkpoint.best_metric = "test/matrix/f1"
    with pytest.raises(UserError, match="'test/matrix/f1' is not evaluated; did you mean 'test/matrix/f1_m"):
        build_program(config.resolve(run))
