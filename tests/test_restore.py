"""A trained model comes out of its workdir alone, with every number as it was, and without the optimizer state."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests.tasks import Net, Task, make_run
from trainer import config, load, train
from trainer.commands import run as command
from trainer.data import take
from trainer.errors import UserError
from trainer.metrics import Mean
from trainer.prediction import predict_split
from trainer.state import TrainState

EXAMPLES = 21  # of Task's test split


@dataclasses.dataclass
class Predicting(Task):
    """`Task` whose predictions are the class, the logits, and a number that is not finite for some examples."""

    def predict(self, variables, batch):
        logits: Any = Net(self.dropout, self.batch_norm).apply(variables, batch["x"], train=False)
        odd = jnp.where(batch["x"][:, 0] > 1, jnp.inf, batch["x"][:, 0])
        return {"label": logits.argmax(-1), "logits": logits, "odd": odd, "half": logits.astype(jnp.bfloat16)}


@dataclasses.dataclass
class Trained:
    """A run of 4 steps with two checkpoints, and its final state."""

    workdir: Path
    run: config.Run
    state: TrainState


@pytest.fixture(scope="module", params=["data", "fsdp", "pmap"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    run = make_run(
        4,
        experiment=Predicting(),
        parallel=config.Parallel(request.param, min_shard_size=0, devices=4),
        checkpoint=config.Checkpoint(every_steps=2, best_metric="test/loss", best_mode="max"),
        evaluation=config.Evaluation(every_steps=2, batch_size=8),
    )
    run.optimizer.ema_decay = 0.5 if request.param == "data" else None
    workdir = tmp_path_factory.mktemp("trained") / request.param
    return Trained(workdir, run, train(run, workdir, verbose=False))


class Normalized(nn.Module):
    """A layer whose statistics Flax names after its kernel, with slashes: "dense/kernel/u"."""

    @nn.compact
    def __call__(self, x, train):
        return nn.SpectralNorm(nn.Dense(3, name="dense"), name="norm")(x, update_stats=train)


@dataclasses.dataclass
class Spectral(Task):
    """`Task` with spectral normalization."""

    def init(self, key, batch):
        return Normalized().init(key, batch["x"], train=False)

    def loss(self, variables, batch, *, key, train):
        mutable = ["batch_stats"] if train else []
        logits, collections = Normalized().apply(variables, batch["x"], train=train, mutable=mutable)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return {"loss": Mean.of(losses, batch["mask"])}, collections

    def predict(self, variables, batch):
        return {"logits": Normalized().apply(variables, batch["x"], train=False)}


def assert_equal(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(jax.device_get(expected))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_variables_whose_names_have_slashes_come_back_as_they_were(tmp_path):
    run = make_run(4, experiment=Spectral(), parallel=config.Parallel(devices=1))
    state = train(run, tmp_path / "run", verbose=False)
    found = load(tmp_path / "run")
    assert_equal(found.variables, {"params": state.params, **state.collections})
    assert "dense/kernel/u" in found.variables["batch_stats"]["norm"]
    assert found.predict(take(found.experiment.source("test"), np.arange(2)))["logits"].shape == (2, 3)


def test_the_variables_are_those_of_the_run_on_one_device(trained):
    found, state = load(trained.workdir), trained.state
    assert re.fullmatch(r"Trained\(Predicting, step 4, 211 parameters(, test/\w+ [\d.]+)+\)", repr(found))
    assert_equal(found.variables, {"params": state.params if state.ema is None else state.ema, **state.collections})
    assert {x.sharding for x in jax.tree.leaves(found.variables)} == {
        jax.sharding.SingleDeviceSharding(jax.devices()[0])
    }
    assert (found.step, found.experiment) == (4, trained.run.experiment)
    rows = [json.loads(line) for line in (trained.workdir / "metrics.jsonl").read_text().splitlines()]
    for name in ("train/loss", "test/loss", "test/accuracy"):
        assert found.metrics[name] == next(row[name] for row in reversed(rows) if name in row)


def test_a_step_is_named_or_is_the_best(trained):
    assert load(trained.workdir, 2).step == 2
    losses = {step: load(trained.workdir, step).metrics["test/loss"] for step in (2, 4)}
    assert load(trained.workdir, "best").step == max(losses, key=losses.__getitem__) == 2
    with pytest.raises(UserError, match="there is no checkpoint of step '3'; there are 2, 4, latest, best"):
        load(trained.workdir, 3)


def test_metrics_are_numbers_also_where_a_row_has_nan_or_what_was_accepted(trained, tmp_path):
    shutil.copytree(trained.workdir, copy := tmp_path / "copy")
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "test/nothing": null}\n{"step": 4, "accepted": ["seed was 0, is 1"]}\n')
    found = load(copy)
    assert np.isnan(found.metrics["test/nothing"])
    assert all(isinstance(value, float | int) for value in found.metrics.values())
    assert "test/nothing nan" in repr(found)


def test_a_mesh_of_any_shape_takes_the_variables(trained):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def sharding(path: str, shape: tuple[int, ...]) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(None, "b") if path.endswith("dense/kernel") else PartitionSpec())

    found = load(trained.workdir, sharding=sharding)
    assert found.variables["params"]["dense"]["kernel"].sharding.spec == PartitionSpec(None, "b")
    assert_equal(found.variables, load(trained.workdir).variables)


@dataclasses.dataclass
class Wide(Task):
    """A task with 4 MiB of parameters, and so 8 MiB of moments."""

    def init(self, key, batch):
        return {"params": {"w": jnp.ones((1024, 1024))}}

    def loss(self, variables, batch, *, key, train):
        total = jnp.mean(variables["params"]["w"]) * batch["x"][:, 0]
        return {"loss": Mean.of(total, batch["mask"])}, {}


def bytes_read(action: Callable[[], Any]) -> int:
    """How many bytes this process reads from files meanwhile."""

    def so_far() -> int:
        return int(re.findall(r"rchar: (\d+)", Path("/proc/self/io").read_text())[0])

    before = so_far()
    action()
    return so_far() - before


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the system does not count the bytes that are read")
def test_moments_are_not_read(tmp_path):
    run = make_run(1, experiment=Wide(), optimizer=config.Optimizer(), parallel=config.Parallel(devices=1))
    train(run, tmp_path / "run", verbose=False)
    load(tmp_path / "run")  # what is imported and compiled now is not read again
    read = bytes_read(lambda: load(tmp_path / "run"))
    assert 4 * 2**20 <= read < 5 * 2**20


def test_a_damaged_parameter_is_not_loaded(trained, tmp_path):
    shutil.copytree(trained.workdir, copy := tmp_path / "copy")
    for file in (copy / "checkpoints" / "4" / "state").rglob("d/*"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    with pytest.raises(UserError, match=f"{copy}/checkpoints/4 .*; try --step=2"):
        load(copy)
    assert load(copy, 2).step == 2


def test_a_workdir_without_a_run_or_without_a_checkpoint_is_an_error(tmp_path, trained):
    with pytest.raises(UserError, match="holds no run"):
        load(tmp_path / "none")
    with pytest.raises(UserError, match="holds no checkpoint"):
        load(tmp_path / "none", run=trained.run)


def expected_predictions(trained: Trained) -> dict[str, np.ndarray]:
    """The predictions for all test examples in one batch on one device."""
    batch = take(trained.run.experiment.source("test"), np.arange(EXAMPLES))
    return jax.device_get(load(trained.workdir).predict(batch))


def test_every_example_is_predicted_once_and_in_order(trained):
    found = predict_split(trained.workdir)
    assert (found.step, found.examples) == (4, EXAMPLES)
    parts = list(found.batches)
    assert [len(part["label"]) for part in parts] == [8, 8, 5]
    for name, expected in expected_predictions(trained).items():
        whole = np.concatenate([part[name] for part in parts])
        np.testing.assert_allclose(whole, expected.astype(whole.dtype), rtol=1e-6, atol=1e-6)


def test_predictions_are_written_as_arrays_and_as_lines(trained, tmp_path, capsys):
    expected, files = expected_predictions(trained), [tmp_path / "found.npz", tmp_path / "found.jsonl"]
    for file in files:
        assert command(["predict", f"--workdir={trained.workdir}", f"--output={file}"]) == 0
        assert capsys.readouterr().out == f"wrote {file}: 21 examples, step 4 of {trained.workdir}\n"
    assert sorted(tmp_path.iterdir()) == sorted(files)  # and no temporary file
    arrays = np.load(files[0])
    lines = [json.loads(line) for line in files[1].read_text().splitlines()]
    assert [line["example"] for line in lines] == list(range(EXAMPLES))
    assert set(arrays) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(arrays[name], np.float64(values), rtol=1e-6, atol=1e-6)
        read = np.array([line[name] for line in lines], np.float64)  # null becomes NaN
        finite = np.where(np.isfinite(np.float64(values)), np.float64(values), np.nan)
        np.testing.assert_allclose(read, finite, rtol=1e-6, atol=1e-6)
    assert not np.isfinite(arrays["odd"]).all()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give --output=FILE, which ends in .npz or .jsonl"),
        (["--output=found.npy"], "--output=found.npy must end in .npz or .jsonl; did you mean '.npz'?"),
        (["--output=missing/found.npz"], "--output=missing/found.npz: no folder missing"),
        (["--output=found.npz", "--split=tests"], "source('tests'): KeyError: 'tests'; is there such a split?"),
        (["--output=found.npz", "--step=7"], "there is no checkpoint of step '7'; there are 2, 4, latest, best"),
    ],
)
def test_a_wrong_flag_is_one_line_and_no_file(trained, flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command(["predict", f"--workdir={trained.workdir}", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@dataclasses.dataclass
class Returning(Predicting):
    """Its predictions are of one of several kinds, most of them wrong."""

    kind: str = "none"

    def predict(self, variables, batch):
        if self.kind == "missing":
            return {"a": batch["missing"]}
        if self.kind == "constant":
            return {"a": jnp.ones(batch["x"].shape[0])}
        x = batch["x"][:, 0]
        narrow = {"e4": x.astype(jnp.float8_e4m3fn), "i4": (x > 0).astype(jnp.int4), "u4": (x > 0).astype(jnp.uint4)}
        results: dict[str, Any] = {"array": x, "list": [x], "text": {"a": "b"}, "key": {1: x}, "empty": {}}
        results |= {"none": {"a": None}, "scalar": {"a": x.sum()}, "example": {"example": x}, "narrow": narrow}
        results |= {"complex": {"a": x * 1j}, "masked": {"a": x * batch["mask"]}}
        return results[self.kind]


RULE = "predict must return a mapping of names to arrays, with one row for each example"
WRONG_RESULTS = {
    "array": f"{RULE}, not an array",
    "list": f"{RULE}, not a value of type list",
    "text": f"{RULE}; prediction 'a' is a value of type str",
    "none": f"{RULE}; prediction 'a' is None",
    "key": f"{RULE}; it names one 1, and a printable text is expected",
    "empty": f"{RULE}, not an empty one",
    "scalar": r"prediction 'a' has shape \[\]; its first axis must have the .* examples",
    "missing": r"the model does not fit its batch \(.*test_restore.py:\d+\): KeyError: 'missing'; the batch has label",
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of a run, whose experiment each test replaces."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    train(make_run(3, experiment=Returning()), folder, verbose=False)
    return folder


def set_kind(workdir: Path, kind: str) -> None:
    file = workdir / "config.json"
    file.write_text(re.sub(r'("kind": )"\w+"', rf'\1"{kind}"', file.read_text()))


@pytest.mark.parametrize("kind", [*WRONG_RESULTS, "example", "complex"])
def test_predictions_that_no_file_holds_are_one_line(plain, kind, tmp_path, capsys):
    set_kind(plain, kind)
    texts = WRONG_RESULTS | {"example": "prediction 'example' has the name of", "complex": "'a' is complex64, which"}
    assert command(["predict", f"--workdir={plain}", f"--output={tmp_path}/found.jsonl"]) == 2
    error = capsys.readouterr().err
    assert re.search(texts[kind], error), error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_dtypes_that_numpy_lacks_are_widened(plain, tmp_path):
    set_kind(plain, "narrow")
    assert command(["predict", f"--workdir={plain}", f"--output={tmp_path}/found.npz"]) == 0
    found = np.load(tmp_path / "found.npz")
    assert {name: str(found[name].dtype) for name in found} == {"e4": "float32", "i4": "int8", "u4": "uint8"}
    x = take(Returning().source("test"), np.arange(EXAMPLES))["x"][:, 0]
    np.testing.assert_array_equal(found["i4"], x > 0)
    np.testing.assert_allclose(found["e4"], x, rtol=0.07, atol=0.01)


def test_an_experiment_without_predictions_says_what_it_lacks(tmp_path, capsys):
    train(make_run(3), tmp_path / "run", verbose=False)
    assert command(["predict", f"--workdir={tmp_path}/run", f"--output={tmp_path}/found.npz"]) == 2
    assert capsys.readouterr().err == "error: Task has no method predict(variables, batch)\n"
