"""Evaluations by name, of the experiment's own, and reports after them."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.launched import launch
from tests.tasks import Net, Task, make_run
from tests.test_hooks import BreaksAt, FailedError, bits
from trainer import config, evaluate, load, train
from trainer.data import ArraySource, take
from trainer.errors import UserError
from trainer.metrics import Moments
from trainer.observe.events import event_files, read_events
from trainer.observe.log import read_rows
from trainer.observe.progress import Progress
from trainer.report import ReportWriter, _grid

ONE = config.Parallel(devices=1)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps(folder: Path, name: str) -> list[int]:
    return [row["step"] for row in rows_of(folder) if f"{name}/examples" in row]


def run_of(total_steps: int = 12, **settings: Any) -> config.Run:
    evaluations = {
        "often": config.Evaluation(every_steps=2, max_examples=5, batch_size=4),
        "epoch": config.Evaluation(every=2, unit="epochs"),  # 50 examples in batches of 16: 6 steps
        "train-set": config.Evaluation("train", every=25, unit="percent", batch_size=32),
        "examples": config.Evaluation(every=64, unit="examples", ema=False),
    }
    defaults: dict[str, Any] = {"parallel": ONE, "evaluations": evaluations}
    return make_run(total_steps, **defaults | settings)


@dataclasses.dataclass
class Grids(Task):
    """Also has another data set, "grids": 33 examples of shape [2, 4] with a note."""

    def loss(self, variables, batch, *, key, train):
        return super().loss(variables, batch | {"x": batch["x"].reshape(-1, 8)}, key=key, train=train)

    def source(self, split):
        if split != "grids":
            return super().source(split)
        rng = np.random.default_rng(2)
        label = rng.integers(0, 3, 33).astype(np.int32)
        return ArraySource({"x": rng.normal(size=(33, 2, 4)), "label": label, "note": np.zeros((33, 5), np.uint8)})


def test_each_evaluation_has_its_cadence_its_split_its_examples_and_its_params(tmp_path):
    optimizer = config.Optimizer(schedule=config.Schedule(peak=1e-2), ema_decay=0.5)
    run = run_of(optimizer=optimizer, experiment=Grids())
    run.evaluations["other"] = config.Evaluation("grids", every_steps=4, batch_size=5)
    state = train(run, tmp_path / "run", verbose=False)
    expected = {"often": [2, 4, 6, 8, 10, 12], "epoch": [6, 12], "train-set": [3, 6, 9, 12], "examples": [4, 8, 12]}
    expected |= {"other": [4, 8, 12]}
    for name, found in ({"test": [12]} | expected).items():
        assert steps(tmp_path / "run", name) == found
    last = {name: value for row in rows_of(tmp_path / "run") if row["step"] == 12 for name, value in row.items()}
    trained = load(tmp_path / "run")
    measure = jax.jit(lambda *arrays: run.experiment.loss(*arrays, key=jax.random.key(0), train=False)[0])
    for name, split, count, params in (
        ("often", "test", 5, trained.variables["params"]),
        ("train-set", "train", 50, trained.variables["params"]),
        ("examples", "test", 21, state.params),
        ("other", "grids", 33, trained.variables["params"]),
    ):
        assert last[f"{name}/examples"] == count
        batch = jax.tree.map(jnp.asarray, take(run.experiment.source(split), np.arange(count)))
        variables = {**trained.variables, "params": params}
        metrics = measure(variables, batch | {"mask": jnp.ones(count)})
        assert last[f"{name}/loss"] == pytest.approx(metrics["loss"].compute(), rel=1e-5)
    assert last["examples/loss"] != last["test/loss"]
    assert evaluate(tmp_path / "run", split="often")["often/loss"] == pytest.approx(last["often/loss"], rel=1e-6)
    assert evaluate(tmp_path / "run", split="train")["train/examples"] == 50


def test_a_killed_run_makes_every_evaluation_that_it_owes(tmp_path):
    run = run_of(checkpoint=config.Checkpoint(every_steps=6))
    whole = launch(run, tmp_path / "whole")
    for step in (5, 8):
        with pytest.raises(FailedError):
            launch(run, tmp_path / "run", hooks=[BreaksAt(step)])
    file = tmp_path / "run" / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if not ('"step": 8' in line and "often/" in line)))
    assert bits(launch(run, tmp_path / "run")) == bits(whole)
    assert sorted(map(str, rows_of(tmp_path / "run"))) == sorted(map(str, rows_of(tmp_path / "whole")))


def test_the_best_metric_of_a_named_evaluation_is_kept(tmp_path):
    checkpoint = config.Checkpoint(every_steps=2, keep_last=1, best_metric="often/loss", best_mode="max")
    launch(run_of(checkpoint=checkpoint), tmp_path / "run")
    losses = {row["step"]: row["often/loss"] for row in rows_of(tmp_path / "run") if "often/loss" in row}
    best = max(losses, key=lambda step: losses[step])
    assert load(tmp_path / "run", "best").step == best
    assert best < 12


@dataclasses.dataclass
class Named(Task):
    """Has a setting with the name of a method that an experiment may have."""

    augment: bool = True


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"evaluations": {"train": config.Evaluation()}}, "evaluations has the name 'train'; letters"),
        ({"evaluations": {"test": config.Evaluation()}}, "evaluations has the name 'test'; .* the split of the main"),
        ({"evaluation": config.Evaluation("train")}, "evaluation.split is 'train', and training metrics are named"),
        ({"evaluations": {"a/b": config.Evaluation()}}, "evaluations has the name 'a/b'"),
        ({"evaluations": {"a": config.Evaluation(every=1, every_steps=2)}}, "evaluations.a has every and every_steps"),
        ({"experiment": Named()}, "Named.augment is a bool; a method is expected: rename the setting"),
        ({"evaluations": {"a": config.Evaluation("tset")}}, r"Task.source\('tset'\): KeyError"),
        (
            {"checkpoint": config.Checkpoint(every_steps=3, best_metric="often/loss")},
            r"every_steps \(3\) must be a multiple of evaluations.often.every_steps \(2\)",
        ),
        (
            {"checkpoint": config.Checkpoint(every_steps=4, best_metric="epoch/loss")},
            r"every_steps \(4\) must be a multiple of evaluations.epoch.every_steps \(6\)",
        ),
        (
            {"checkpoint": config.Checkpoint(every_steps=2, best_metric="often/los")},
            r"best_metric 'often/los' is not evaluated; did you mean 'often/loss'\?",
        ),
        (
            {"parallel": config.Parallel(devices=2), "evaluations": {"a": config.Evaluation(batch_size=3)}},
            "evaluations.a.batch_size 3 does not divide over 2 batch shards",
        ),
    ],
    ids=range(11),
)
def test_settings_that_contradict_each_other_are_named(tmp_path, settings, text):
    with pytest.raises(UserError, match=text):
        launch(run_of(**settings), tmp_path / "run")


@dataclasses.dataclass
class Neighbours(Task):
    """Evaluates "knn" by the nearest training example in the space of the logits, and reports all kinds."""

    def logits(self, variables: Any, x: Any) -> Any:
        return Net(self.dropout, self.batch_norm).apply(variables, x, train=False)

    def evaluate(self, name, variables, batches):
        if name != "knn":
            return None
        train_set = take(self.source("train"), np.arange(50))
        known = self.logits(variables, jnp.asarray(train_set["x"]))
        hits, count, seen = 0.0, 0.0, []
        for batch in batches:
            found = self.logits(variables, batch["x"])
            nearest = jnp.argmin(jnp.sum((found[:, None] - known[None]) ** 2, -1), -1)
            right = jnp.asarray(train_set["label"])[nearest] == batch["label"]
            hits, count = hits + float(jnp.sum(right * batch["mask"])), count + float(jnp.sum(batch["mask"]))
            seen.append(Moments.of(found[:, 0], batch["mask"]))
        moments = jax.tree.map(lambda *x: sum(x), *seen)
        return {"accuracy": hits / count, "logit": moments}

    def report(self, step, variables, writer):
        kernel = np.asarray(variables["params"]["head"]["kernel"])
        writer.image("kernel", (kernel - kernel.min()) / np.ptp(kernel))
        writer.image("grid", np.full((3, 4, 5, 3), 7, np.uint8))
        writer.text("largest", f"largest weight {kernel.max():.3f}, {len(writer.rows())} rows")
        writer.histogram("weights", kernel, bins=4)
        from matplotlib.figure import Figure

        figure = Figure(figsize=(2, 1), dpi=50)
        figure.subplots().plot([row["train/loss"] for row in writer.rows() if "train/loss" in row])
        writer.figure("losses", figure)


@pytest.mark.parametrize(
    "strategy", ["fsdp", *(pytest.param(s, marks=pytest.mark.exhaustive) for s in ("data", "pmap"))]
)
def test_an_evaluation_of_ones_own_and_a_report(tmp_path, strategy):
    parallel = config.Parallel(strategy, devices=4, min_shard_size=0)
    run = run_of(
        6,
        experiment=Neighbours(),
        parallel=parallel,
        evaluation=config.Evaluation(every_steps=3, batch_size=8),
        evaluations={"knn": config.Evaluation(every_steps=2, batch_size=8)},
        checkpoint=config.Checkpoint(every_steps=2, best_metric="knn/accuracy"),
    )
    launch(run, tmp_path / "run")
    rows = [row for row in rows_of(tmp_path / "run") if "knn/accuracy" in row]
    assert [row["step"] for row in rows] == [2, 4, 6]
    trained = load(tmp_path / "run")
    own: Any = run.experiment
    test, known = (take(own.source(split), np.arange(n)) for split, n in (("test", 21), ("train", 50)))
    a, b = (np.asarray(own.logits(trained.variables, batch["x"]), np.float64) for batch in (test, known))
    nearest = ((a[:, None] - b[None]) ** 2).sum(-1).argmin(-1)
    assert rows[-1]["knn/accuracy"] == pytest.approx((known["label"][nearest] == test["label"]).mean(), abs=1e-6)
    assert rows[-1]["knn/logit/mean"] == pytest.approx(a[:, 0].mean(), rel=1e-4, abs=1e-5)
    assert rows[-1]["knn/examples"] == 21
    reports = tmp_path / "run" / "reports"
    assert sorted(path.name for path in reports.iterdir()) == ["3", "6"]
    names = ["grid.png", "kernel.png", "largest.txt", "losses.png", "weights.npz"]
    assert sorted(path.name for path in (reports / "6").iterdir()) == names
    kernel = np.asarray(trained.variables["params"]["head"]["kernel"], np.float64)
    pixels = np.asarray(Image.open(reports / "6" / "kernel.png"))
    np.testing.assert_allclose(pixels, (kernel - kernel.min()) / np.ptp(kernel) * 255, atol=0.51)
    counts = np.load(reports / "6" / "weights.npz")["counts"]
    np.testing.assert_array_equal(counts, np.histogram(kernel, 4)[0])
    assert (reports / "6" / "largest.txt").read_text().startswith(f"largest weight {kernel.max():.3f}, ")
    values = [
        (value.tag.partition("/")[0], event.step, value)
        for name in event_files(tmp_path / "run" / "tensorboard")
        for event in read_events((tmp_path / "run" / "tensorboard" / name).read_bytes())
        for value in event.summary.value
    ]
    for name in ("kernel", "grid", "largest", "weights", "losses"):
        assert [step for tag, step, _ in values if tag == name] == [3, 6], name
    shown = {tag: value for tag, step, value in values if step == 6}
    for name in ("kernel", "grid", "losses"):
        assert shown[name].image.encoded_image_string == (reports / "6" / f"{name}.png").read_bytes()
        with Image.open(reports / "6" / f"{name}.png") as image:
            assert image.size == (shown[name].image.width, shown[name].image.height)
    assert shown["largest"].tensor.string_val[:] == [(reports / "6" / "largest.txt").read_bytes()]
    histogram = shown["weights"].histo
    assert (histogram.num, histogram.min, histogram.max) == (kernel.size, kernel.min(), kernel.max())
    assert sum(histogram.bucket) == kernel.size


def test_a_best_metric_that_ones_own_evaluation_does_not_give_is_named(tmp_path):
    run = run_of(
        6,
        experiment=Neighbours(),
        evaluations={"knn": config.Evaluation(every_steps=2)},
        checkpoint=config.Checkpoint(every_steps=2, best_metric="knn/acuracy"),
    )
    with pytest.raises(UserError, match=r"best_metric 'knn/acuracy' is not evaluated; did you mean 'knn/accuracy'\?"):
        launch(run, tmp_path / "run")


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((4, 6), (4, 6)), ((4, 6, 1), (4, 6)), ((4, 6, 3), (4, 6, 3)), ((5, 4, 6, 1), (8, 18)), ((5, 4, 6), (8, 18))],
    ids=str,
)
def test_images_of_every_shape_become_one_grid(shape, expected):
    image = np.random.default_rng(0).random(shape)
    grid = _grid(image, "x")
    assert grid.shape == expected
    first = image.reshape(-1, 4, 6, shape[-1] if shape[-1] == 3 else 1)[0].squeeze()
    np.testing.assert_allclose(grid[:4, :6], first * 255, atol=0.51)


def test_a_report_that_cannot_be_written_does_not_stop_the_run(tmp_path, monkeypatch):
    run = run_of(3, experiment=Neighbours(), evaluations={})
    stream = io.StringIO()
    (tmp_path / "run").mkdir()
    launch(run, tmp_path / "first")
    (tmp_path / "first" / "config.json").rename(tmp_path / "run" / "config.json")
    (tmp_path / "run" / "reports").write_text("a file in its place")
    launch(run, tmp_path / "run", progress=Progress(3, stream))
    assert stream.getvalue().count("Not a directory; the report lacks it") >= 1
    assert [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]


def test_a_name_that_is_no_file_name_becomes_one(tmp_path):
    writer = ReportWriter(tmp_path / "reports", 1, list, lambda step, summary: None, print)
    writer.text("../up/there", "text")
    (file,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert file == tmp_path / "reports" / "1" / "__up_there.txt"


def test_a_histogram_leaves_out_what_is_not_finite(tmp_path):
    lines: list[str] = []
    writer = ReportWriter(tmp_path / "reports", 1, list, lambda step, summary: None, lines.append)
    writer.histogram("some", np.array([0.0, np.nan, 1.0, np.inf]), bins=2)
    writer.histogram("none", np.array([]))
    assert np.load(tmp_path / "reports" / "1" / "some.npz")["counts"].tolist() == [1, 1]
    assert lines == ["warning: histogram 'some' has 2 NaN or Inf, which are left out"]


@pytest.mark.parametrize("folder", ["reports", None], ids=["writes", "writes-nothing"])
@pytest.mark.parametrize(
    ("kind", "arguments", "text"),
    [
        ("text", ("a", 5), "text 'a' is a value of type int; a str is expected"),
        ("text", ("a", b"b"), "text 'a' is a value of type bytes"),
        ("text", (5, "a"), "text 5 of a report has no name"),
        ("histogram", ("a", {}), "histogram 'a' is a value of type dict; an array of real numbers is expected"),
        ("histogram", ("a", [1, [2]]), "histogram 'a' is a value of type list"),
        ("histogram", ("a", ["b"]), "histogram 'a' is an array of <U1"),
        ("histogram", ("a", [1.0], 0), "histogram 'a' has bins=0; an int from 1 to 10,000 is expected"),
        ("image", ("a", None), "image 'a' is None"),
        ("figure", ("a", "b"), "figure 'a' is a value of type str; a figure of matplotlib"),
        ("text", ("x_y", "c"), "text 'x_y' and text 'x/y' have the same file x_y.txt: rename one"),
    ],
    ids=range(10),
)
def test_a_wrong_argument_of_a_report_is_named_in_every_process(tmp_path, folder, kind, arguments, text):
    place = tmp_path / folder if folder else None
    writer = ReportWriter(place, 1, list, lambda step, summary: None, print)
    writer.text("x/y", "once")
    writer.text("x/y", "again")
    with pytest.raises(UserError, match=text):
        getattr(writer, kind)(*arguments)


@pytest.mark.parametrize(
    ("values", "bins"),
    [([1.0, np.nextafter(1, 2)], 1), ([-1.7e308, 1.7e308], 30), ([5e-324, 0], 1), ([1.7e308] * 2, 1), ([3.0], 30)],
    ids=range(5),
)
def test_a_histogram_holds_any_finite_numbers(tmp_path, values, bins):
    shown: list[Any] = []
    writer = ReportWriter(tmp_path / "reports", 1, list, lambda step, summary: shown.append(summary), print)
    writer.histogram("some", values)
    found = np.load(tmp_path / "reports" / "1" / "some.npz")
    assert (found["counts"].sum(), len(found["counts"])) == (len(values), bins)
    assert found["edges"][0] <= min(values) <= max(values) <= found["edges"][-1]
    assert sum(shown[0].value[0].histo.bucket) == len(values)


def test_a_text_that_utf8_cannot_hold_is_written_with_a_warning(tmp_path):
    lines: list[str] = []
    writer = ReportWriter(tmp_path / "reports", 1, list, lambda step, summary: None, lines.append)
    writer.text("note", "a\ud800b")
    assert (tmp_path / "reports" / "1" / "note.txt").read_text() == "a?b"
    assert lines == ["warning: text 'note' has characters that UTF-8 cannot hold, which become '?'"]


@pytest.mark.parametrize("linked", ["reports", "reports/1", "reports/1/note.txt"])
def test_no_link_is_followed(tmp_path, linked):
    outside, lines = tmp_path / "outside", list[str]()
    outside.mkdir()
    place = tmp_path / "run" / linked
    place.parent.mkdir(parents=True)
    place.symlink_to(outside / "file" if linked.endswith(".txt") else outside)
    writer = ReportWriter(tmp_path / "run" / "reports", 1, list, lambda step, summary: None, lines.append)
    writer.text("note", "text")
    assert not list(outside.iterdir())
    assert len(lines) == 1
    assert "the report lacks it" in lines[0]
