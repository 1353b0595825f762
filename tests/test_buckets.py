"""Workdirs in buckets, where files cannot be appended to and are copied instead."""

import dataclasses
import errno
import gc
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from tests.launched import launch, program_of
from tests.observe.event_reader import shown
from tests.tasks import make_run
from tests.test_init_from import as_bytes, begun
from tests.test_restore import Predicting
from trainer import config, load
from trainer.commands import run as command
from trainer.errors import HostError, UserError
from trainer.export import write_safetensors
from trainer.files import is_bucket
from trainer.init_from import plan_init
from trainer.observe.log import MetricsLog, read_rows
from trainer.workdir import Mirror, Workdir


@pytest.mark.parametrize(
    ("path", "bucket"), [("gs://b/runs/a", True), ("s3://b/a", True), ("/tmp/a", False), ("a:b", False)]
)
def test_a_workdir_is_in_a_bucket_if_its_path_has_a_scheme(path, bucket, monkeypatch):
    monkeypatch.setattr("trainer.workdir._can_open_gs", lambda: True)  # nothing is opened here
    assert is_bucket(path) == bucket
    assert isinstance(Workdir(path).path, Path) != bucket
    assert str(Workdir(path).checkpoints) == f"{path}/checkpoints"


def metrics(folder, steps, after=0):
    with closing(MetricsLog(folder, after)) as log:
        for step in steps:
            log.write(step, {"train/loss": 1 / step}, {"examples_per_second": 5.0})


def test_metrics_reach_a_bucket_at_every_sync_and_when_they_are_closed(tmp_path):
    bucket = epath.Path(tmp_path / "bucket")  # epath's own paths take the way that buckets take
    log = MetricsLog(bucket, 0)
    log.write(1, {"train/loss": 2.0}, {})
    assert not (bucket / "metrics.jsonl").exists()
    log.sync()
    assert [row["step"] for row in read_rows(bucket / "metrics.jsonl")] == [1]
    log.write(2, {"train/loss": 1.0}, {})
    log.close()
    assert [row["step"] for row in read_rows(bucket / "metrics.jsonl")] == [1, 2]
    assert shown(tmp_path / "bucket" / "tensorboard") == {("train/loss", 1): 2.0, ("train/loss", 2): 1.0}


def test_what_cannot_be_read_in_a_bucket_is_an_error_of_one_line(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="is a link or a folder, where a file of rows is expected"):
        list(read_rows(epath.Path(tmp_path)))

    def fail(_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    file = epath.Path(tmp_path / "metrics.jsonl")
    monkeypatch.setattr(type(file), "read_bytes", fail)
    with pytest.raises(HostError, match=r"metrics\.jsonl: Input/output error"):
        list(read_rows(file))


def test_resuming_in_a_bucket_leaves_the_files_of_a_folder(tmp_path):
    bucket, folder = epath.Path(tmp_path / "bucket"), tmp_path / "folder"
    folder.mkdir()
    for place in (bucket, folder):
        metrics(place, [1, 2, 3])
        metrics(place, [3, 4], after=2)
    assert (bucket / "metrics.jsonl").read_text() == (folder / "metrics.jsonl").read_text()
    assert [row["step"] for row in read_rows(bucket / "timing.jsonl")] == [1, 2, 3, 4]
    events = shown(tmp_path / "bucket" / "tensorboard")
    assert events == shown(folder / "tensorboard")
    assert {step for _, step in events} == {1, 2, 3, 4}
    assert len(list((bucket / "tensorboard").glob("events*"))) == 2  # the earlier one is not copied anew


@pytest.mark.parametrize("on_error", ["continue", "stop"])
def test_rows_in_a_bucket_that_cannot_be_read_at_a_resume_stay_and_are_continued_once_they_can(
    tmp_path, monkeypatch, on_error
):
    bucket, file = epath.Path(tmp_path / "bucket"), tmp_path / "bucket" / "metrics.jsonl"
    metrics(bucket, [1, 2, 3])
    before, said = file.read_bytes(), []

    def fail(_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(type(bucket), "read_bytes", fail)
        if on_error == "stop":
            with pytest.raises(HostError, match=r"bucket/\S+ cannot be read: Input/output error; nothing was removed"):
                MetricsLog(bucket, 2)
            return
        log = MetricsLog(bucket, 2, on_error=on_error, report=said.append)
        log.write(3, {"train/loss": 0.25}, {"examples_per_second": 5.0})
        log.sync()
        assert file.read_bytes() == before
    assert any("metrics.jsonl cannot be read: Input/output error; its rows are kept in memory" in line for line in said)
    log.write(4, {"train/loss": 0.2}, {"examples_per_second": 5.0})
    log.close()
    losses = {row["step"]: row["train/loss"] for row in read_rows(epath.Path(file))}
    assert losses == {1: 1.0, 2: 0.5, 3: 0.25, 4: 0.2}
    assert [row["step"] for row in read_rows(bucket / "timing.jsonl")] == [1, 2, 3, 4]
    events = shown(tmp_path / "bucket" / "tensorboard")
    assert {step: value for (tag, step), value in events.items() if tag == "train/loss"} == pytest.approx(losses)


def test_a_mirror_of_a_folder_is_the_folder_and_one_of_a_bucket_is_gone_when_it_is_closed(tmp_path):
    assert Mirror(tmp_path).folder == tmp_path
    mirror = Mirror(epath.Path(tmp_path / "bucket"))
    (mirror.folder / "a").mkdir()
    (mirror.folder / "a" / "b").write_bytes(b"1")
    mirror.close()
    assert (tmp_path / "bucket" / "a" / "b").read_bytes() == b"1"
    assert not mirror.folder.exists()
    forgotten = Mirror(epath.Path(tmp_path / "bucket"))
    folder = forgotten.folder
    del forgotten  # as after an error
    gc.collect()
    assert not folder.exists()


def test_a_run_is_kept_in_a_bucket_as_in_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.workdir.is_bucket", lambda path: True)
    workdir = Workdir(tmp_path / "run")
    run = config.resolve(make_run())
    with workdir.locked():
        workdir.write(run, "labels")
        assert workdir.stored_run() == run
        assert sorted(file.name for file in workdir.path.iterdir()) == ["config.json", "params.txt"]  # no lock


@dataclasses.dataclass
class Reporting(Predicting):
    """Predicts, and reports its kernel."""

    def report(self, step, variables, writer):
        writer.histogram("weights", variables["params"]["head"]["kernel"])
        writer.text("note", f"after step {step}")


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """The same run in a folder and in a folder that is taken for a bucket, as long as this fixture lives."""
    place = tmp_path_factory.mktemp("twins")
    folder, bucket = place / "folder", place / "bucket"
    run = make_run(
        6,
        experiment=Reporting(),
        parallel=config.Parallel(devices=1),
        checkpoint=config.Checkpoint(every_steps=2, keep_last=2, best_metric="test/accuracy"),
        evaluation=config.Evaluation(every_steps=2, batch_size=8),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.workdir.is_bucket", lambda path: str(path).startswith(str(bucket)))
        patch.setattr("orbax.checkpoint._src.path.gcs_utils._GCS_PATH_PREFIX", (str(bucket),))
        for workdir in (folder, bucket / "run"):
            launch(run, workdir)
        yield folder, bucket / "run"


def test_a_run_in_a_bucket_leaves_the_metrics_and_the_reports_of_a_folder(twins):
    folder, bucket = twins
    names = [path.relative_to(folder).as_posix() for path in (folder / "reports").rglob("*.*")]
    assert sorted(names) == sorted(
        f"reports/{step}/{name}" for step in (2, 4, 6) for name in ("note.txt", "weights.npz")
    )
    for name in ("metrics.jsonl", *names):
        assert (bucket / name).read_bytes() == (folder / name).read_bytes(), name
    assert list(bucket.rglob("commit_success.txt"))  # it was a bucket to Orbax, too


@pytest.mark.parametrize("step", ["latest", "best", 4])
def test_a_model_is_loaded_from_a_bucket_as_from_a_folder(twins, step):
    expected, found = (load(workdir, step) for workdir in twins)
    assert (found.step, found.metrics) == (expected.step, expected.metrics)
    assert as_bytes(found.variables) == as_bytes(expected.variables)


def test_predictions_of_a_model_in_a_bucket_are_those_of_a_folder(twins, tmp_path):
    for workdir, name in zip(twins, ("folder.npz", "bucket.npz"), strict=True):
        assert command(["predict", f"--workdir={workdir}", f"--output={tmp_path / name}"]) == 0
    folder, bucket = (np.load(tmp_path / name) for name in ("folder.npz", "bucket.npz"))
    assert set(bucket) == set(folder) > {"label", "logits"}
    for name in folder:
        np.testing.assert_array_equal(bucket[name], folder[name])


@pytest.mark.parametrize(("step", "state"), [("", "fresh"), ("@best", "carried")])
def test_a_run_begins_from_a_bucket_as_from_a_folder(twins, step, state):
    sources = [config.InitFrom(f"{workdir}{step}", optimizer_state=state) for workdir in twins]
    runs = [make_run(8, parallel=config.Parallel(devices=1), init_from=source) for source in sources]
    expected, found = (as_bytes(begun(run)) for run in runs)
    assert found == expected


def test_a_run_begins_from_safetensors_in_a_bucket(twins, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    folder, bucket = twins
    file = bucket.parent / "exported" / "model.safetensors"
    file.parent.mkdir()
    write_safetensors(load(folder), file)
    run = make_run(8, parallel=config.Parallel(devices=1), init_from=config.InitFrom(str(file)))
    plan = plan_init(program_of(run))
    assert plan is not None
    assert plan.source.text == f"arrays of {file}"
    file.unlink()  # the library, which cannot open `gs://`, opens a copy
    assert as_bytes(plan.state()) == as_bytes(begun(dataclasses.replace(run, init_from=config.InitFrom(str(folder)))))
    del plan
    gc.collect()
    assert list((tmp_path / "temporary").iterdir()) == []
