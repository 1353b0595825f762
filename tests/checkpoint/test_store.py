"""Which checkpoints are kept, which are refused, and which errors are damage."""

import errno
import gc
import math
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from orbax.checkpoint._src.metadata import checkpoint as orbax_metadata

from tests.observe.small_disk import command_on
from trainer import config
from trainer.checkpoint import DataIdentity, Metadata, Store, leaves_of, reading
from trainer.checkpoint.reading import restore_fitting, verify
from trainer.checkpoint.store import scores
from trainer.errors import HostError, UserError
from trainer.files import DamagedError
from trainer.state import TrainState

ROOT = Path(__file__).parents[2]


def state(step: int, **params) -> TrainState:
    params = params or {"w": jnp.full((3,), float(step)), "b": jnp.zeros((2, 2))}
    moments = {"scaling": {"mu": jax.tree.map(lambda x: x * 0.5, params)}}
    return TrainState(jnp.asarray(step, jnp.int32), params, {}, moments)


def metadata(step: int) -> Metadata:
    return Metadata(step, {"$class": "a run"}, {}, DataIdentity(50, None), 0, {})


def save(store: Store, *steps: int) -> None:
    for step in steps:
        assert store.save(state(step), metadata(step))
    store.wait()


@pytest.fixture
def store(tmp_path):
    made = Store(tmp_path / "checkpoints", config.Checkpoint())
    yield made
    made.close()


def test_restores_every_bit_and_its_metadata(store, tmp_path):
    saved = state(7, w=jnp.asarray(np.random.default_rng(0).normal(size=5), jnp.float32))
    store.save(saved, metadata(7))
    store.wait()
    again = Store(tmp_path / "checkpoints", config.Checkpoint())
    assert again.metadata(7).config == {"$class": "a run"}
    jax.tree.map(np.testing.assert_array_equal, again.restore(saved, 7), saved)


@pytest.mark.parametrize(
    ("mode", "values", "kept", "best"),
    [
        ("max", {1: 0.5, 2: 0.9, 3: 0.7, 4: 0.6, 5: 0.65}, [2, 4, 5], 2),
        ("min", {1: 0.5, 2: 0.1, 3: 0.7, 4: 0.6, 5: 0.65}, [2, 4, 5], 2),
        ("max", {1: 0.5, 2: math.nan, 3: 0.4, 4: 0.3, 5: 0.2}, [1, 4, 5], 1),
        ("min", {1: 0.5, 2: math.nan, 3: 0.6, 4: 0.7, 5: 0.8}, [1, 4, 5], 1),
        ("max", {1: 0.5, 2: 0.6}, [2, 4, 5], 2),
        ("max", {1: 0.5, 2: 0.9, 3: 0.9, 4: 0.9, 5: 0.9}, [2, 4, 5], 2),  # of equals the earliest
        ("max", {1: math.nan, 2: math.nan, 3: math.nan, 4: math.nan, 5: math.nan}, [4, 5], None),
        ("min", {1: math.inf, 2: 0.5}, [2, 4, 5], 2),
    ],
)
def test_keeps_the_last_and_the_best(tmp_path, mode, values, kept, best):
    store = Store(tmp_path, config.Checkpoint(keep_last=2, best_metric="test/accuracy", best_mode=mode))
    for step in range(1, 6):
        save(store, step)  # the evaluation of a step comes after its save
        store.scores |= {step: values[step]} if step in values else {}
    store.remove_old()
    assert (store.steps(), store.best_step()) == (kept, best)
    store.close()


def test_keeps_every_nth_for_ever(tmp_path):
    store = Store(tmp_path, config.Checkpoint(keep_last=1, keep_every_steps=4))
    save(store, *range(1, 11))
    assert store.steps() == [4, 8, 10]
    store.close()


def test_the_best_is_one_of_those_that_are_there(tmp_path):
    store = Store(tmp_path, config.Checkpoint(keep_last=1, best_metric="test/accuracy"))
    save(store, 1, 2)
    store.scores = {1: 0.9, 2: 0.1}  # step 1 is gone
    save(store, 3)
    assert store.steps() == [2, 3]
    store.close()


def test_the_best_step_is_found_while_another_thread_adds_scores(store):
    save(store, 1)
    store.scores, is_ended, interval = dict.fromkeys(range(1, 3000), 0.5), threading.Event(), sys.getswitchinterval()

    def add() -> None:
        steps = iter(range(3000, 60_000))
        while not is_ended.is_set() and (step := next(steps, None)) is not None:
            store.scores[step] = 0.5

    thread = threading.Thread(target=add)
    sys.setswitchinterval(1e-5)
    try:
        thread.start()
        assert {store.best_step() for _ in range(50)} == {1}
    finally:
        sys.setswitchinterval(interval)
        is_ended.set()
        thread.join()


_BUSY = """
import subprocess
from pathlib import Path
from tests.checkpoint.test_store import save, state
from trainer import config
from trainer.checkpoint import Store
from trainer.errors import HostError

said = []
store = Store(Path({disk!r}) / "checkpoints", config.Checkpoint(keep_last=1), on_saved=said.append)
save(store, 1)
subprocess.run(["mount", "--bind", store.path(1), store.path(1)], check=True)
try:
    save(store, 2)
except HostError as error:
    print(error)
print(said, store.steps(), store.restore(state(2), 2).step)
"""


def test_an_older_checkpoint_that_cannot_be_removed_is_named_and_the_new_one_is_complete(tmp_path):
    (tmp_path / "disk").mkdir()
    script = shlex.join([sys.executable, "-c", _BUSY.format(disk=str(tmp_path / "disk"))])
    command = command_on(tmp_path / "disk", "64m", script)  # in a namespace of its own, where the folder can be a mount
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=100)
    error, found = result.stdout.splitlines()
    assert "checkpoint 1 cannot be removed: " in error
    assert error.endswith("; the newest checkpoint, of step 2, is complete")
    assert found == "[1, 2] [1, 2] 2"


@pytest.mark.parametrize(
    ("errors", "damaged"),
    [
        ([OSError(errno.EIO, "Input/output error"), FileNotFoundError(errno.ENOENT, "gone", "a")], False),
        ([FileNotFoundError(errno.ENOENT, "gone", "a"), OSError(errno.EIO, "Input/output error")], False),
        ([FileNotFoundError(errno.ENOENT, "gone", "a")], False),
        ([FileNotFoundError(errno.ENOENT, "gone", "a")] * 2, True),
    ],
    ids=["late", "early", "once", "twice in a row"],
)
def test_a_file_is_missing_only_if_two_reads_in_a_row_miss_it(tmp_path, monkeypatch, errors, damaged):
    monkeypatch.setattr(reading, "_WAITS", (0.01, 0.02, 0.03))
    left = iter(errors)

    def read() -> str:
        if (error := next(left, None)) is not None:
            raise error
        return "read"

    if damaged:
        with pytest.raises(DamagedError, match="a is missing"):
            reading._retry(read, tmp_path)
    else:
        assert reading._retry(read, tmp_path) == "read"


def test_scores_are_read_from_the_rows_of_the_metrics():
    rows = [{"step": 1, "train/loss": 2.0}, {"step": 1, "test/loss": 0.5}, {"step": 2, "test/loss": None}]
    found = scores(iter(rows), "test/loss")
    assert found.keys() == {1, 2}
    assert found[1] == 0.5
    assert math.isnan(found[2])
    assert scores(iter(rows), None) == {}


def test_a_state_that_is_not_finite_is_not_saved(store):
    assert not store.save(state(1, w=jnp.asarray([1.0, math.nan])), metadata(1))
    assert store.steps() == []


def test_a_save_cut_off_is_no_checkpoint_and_is_removed_by_the_next_launch(store, tmp_path):
    save(store, 1)
    folder = tmp_path / "checkpoints"
    (folder / "2.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    (folder / ".removed-1-abcd").mkdir()
    (folder / "007").mkdir()
    assert store.steps() == [1]
    store.remove_incomplete()
    assert sorted(path.name for path in folder.iterdir()) == ["007", "1"]
    save(store, 2)
    assert store.steps() == [1, 2]


def test_a_save_over_leftovers_of_a_killed_one_succeeds(store, tmp_path):
    (tmp_path / "checkpoints" / "1.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    save(store, 1)
    assert store.steps() == [1]


def test_a_killed_save_in_a_bucket_is_removed_and_its_step_can_be_saved_again(tmp_path, monkeypatch):
    # Orbax tells a bucket by the beginning of the path. With another beginning, its own code for buckets writes to this
    # disk: to the folder of the step itself, with the mark of completeness last.
    monkeypatch.setattr("orbax.checkpoint._src.path.gcs_utils._GCS_PATH_PREFIX", (str(tmp_path),))
    bucket = Store(epath.Path(tmp_path / "bucket"), config.Checkpoint())
    save(bucket, 10, 20)
    (tmp_path / "bucket" / "20" / "commit_success.txt").unlink()  # as if killed before its end
    assert bucket.step_names() == bucket.steps() == [10]
    bucket.close()
    again = Store(epath.Path(tmp_path / "bucket"), config.Checkpoint())
    again.remove_incomplete()
    assert [path.name for path in (tmp_path / "bucket").iterdir()] == ["10"]
    save(again, 20)
    assert again.steps() == [10, 20]
    again.close()


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(file: Path, rng: np.random.Generator) -> None:
    data = bytearray(file.read_bytes())
    data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
    file.write_bytes(data)


def test_a_flipped_bit_of_any_file_is_noticed_or_changes_nothing(store, tmp_path):
    saved = state(5, w=jnp.asarray(np.random.default_rng(0).normal(size=(20, 30)), jnp.float32))
    store.save(saved, metadata(5))
    store.wait()
    place, rng, noticed = tmp_path / "checkpoints" / "5", np.random.default_rng(1), 0
    whole = {file: file.read_bytes() for file in files(place)}
    for trial in range(60):
        file = list(whole)[trial % len(whole)]
        if whole[file]:
            flip(file, rng)
            try:
                jax.tree.map(np.testing.assert_array_equal, store.restore(saved, 5), saved)
            except DamagedError as error:
                noticed += str(place) in str(error)
                with pytest.raises(DamagedError):
                    verify(place)
            file.write_bytes(whole[file])
    assert noticed > 20
    assert verify(place) == (3, 2 * 600 * 4 + 4)
    jax.tree.map(np.testing.assert_array_equal, store.restore(saved, 5), saved)


def deep(n: int = 900) -> bytes:
    return b"[" * n + b"]" * n


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[1]", b"\xff\xfe\x00", deep(), deep(100_000), None])
def test_damaged_metadata_are_one_line_that_names_the_file(store, tmp_path, content):
    save(store, 1)
    file = tmp_path / "checkpoints" / "1" / "metadata" / "metadata"
    file.unlink()
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
    with pytest.raises(DamagedError, match=str(file)) as raised:
        store.metadata(1)
    assert "\n" not in str(raised.value)


def test_metadata_behind_a_link_are_not_read(store, tmp_path):
    save(store, 1)
    file = tmp_path / "checkpoints" / "1" / "metadata" / "metadata"
    shutil.move(file, tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DamagedError, match="is a link"):
        store.metadata(1)


def test_a_copy_under_another_step_is_refused(store, tmp_path):
    save(store, 150)
    shutil.copytree(tmp_path / "checkpoints" / "150", tmp_path / "checkpoints" / "240")
    with pytest.raises(DamagedError, match="240 holds the checkpoint of step 150"):
        store.metadata(240)


def test_arrays_of_another_checkpoint_are_refused(store, tmp_path):
    save(store, 1, 2)
    folder = tmp_path / "checkpoints"
    shutil.rmtree(folder / "2" / "state")
    shutil.copytree(folder / "1" / "state", folder / "2" / "state")
    with pytest.raises(DamagedError, match="2 is damaged: the checksum of step, params/w"):
        store.restore(state(2), 2)


def test_a_step_that_is_gone_is_not_damage(store, tmp_path):
    save(store, 1)
    known = store.metadata(1)
    shutil.rmtree(tmp_path / "checkpoints" / "1")
    with pytest.raises(FileNotFoundError):
        store.metadata(1)
    with pytest.raises(FileNotFoundError):
        store.restore(state(1), 1, known)


def test_set_aside_removes_nothing(store, tmp_path):
    save(store, 1, 2)
    content = {
        p.relative_to(tmp_path / "checkpoints" / "2"): p.read_bytes() for p in files(tmp_path / "checkpoints" / "2")
    }
    place = store.set_aside(2, "unused")
    assert store.steps() == [1]
    assert {p.relative_to(place): p.read_bytes() for p in files(Path(place))} == content
    save(store, 2)
    assert store.set_aside(2, "unused") != place


@pytest.mark.parametrize(
    ("step", "message"),
    [("5", "no checkpoint of step '5'; there are 1, 2, latest, best"), ("best", "no best checkpoint is kept")],
)
def test_a_step_that_is_not_there_is_named_with_those_that_are(store, step, message):
    save(store, 1, 2)
    with pytest.raises(UserError, match=message):
        store.choose(step)


def test_arrays_that_fit_are_restored_and_others_left_out(store):
    save(store, 3)
    like = state(3, w=jnp.zeros(3, jnp.bfloat16), b=jnp.zeros((2, 5)), new=jnp.zeros(1))
    found = restore_fitting(store.path(3), like, store.metadata(3), {path: path for path in leaves_of(like)})
    assert sorted(found) == ["opt_state/scaling/mu/w", "params/w", "step"]
    assert found["params/w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(found["opt_state/scaling/mu/w"], np.float32), np.full(3, 1.5))


def test_a_place_that_cannot_be_written_is_a_fault_of_the_machine(tmp_path):
    (tmp_path / "checkpoints").write_text("a file in the place of the folder")
    store = Store(tmp_path / "checkpoints", config.Checkpoint())
    with pytest.raises(HostError, match="checkpoint 1 cannot be written"):
        save(store, 1)


# Orbax leaves coroutines of a failed save behind, which Python reports when they are collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_error_that_a_thread_of_orbax_raises_late_neither_fails_the_next_save_nor_hides_the_first(
    tmp_path, monkeypatch
):
    def point_to(target: Path) -> None:  # in one step, so that Orbax finds the one or the other
        (tmp_path / "new").symlink_to(target)
        (tmp_path / "new").rename(tmp_path / "run")

    (tmp_path / "disk").mkdir()
    (tmp_path / "file").touch()
    point_to(tmp_path / "disk")
    store, is_away = Store(tmp_path / "run" / "checkpoints", config.Checkpoint()), threading.Event()
    save(store, 1)
    write = orbax_metadata._MetadataStoreImpl.write

    def write_late(*args):
        assert is_away.wait(60)
        return write(*args)

    monkeypatch.setattr(orbax_metadata._MetadataStoreImpl, "write", write_late)
    assert store.save(state(2), metadata(2))
    point_to(tmp_path / "file")
    is_away.set()
    with pytest.raises(HostError, match="checkpoint 2 cannot be written"):
        store.wait()
    point_to(tmp_path / "disk")
    save(store, 3)
    assert store.steps() == [1, 3]
    store.close()
    gc.collect()
