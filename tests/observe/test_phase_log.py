"""The phase log of a training: lines in the file at once, the ids of the very batches, digests of restored states."""

import dataclasses
import inspect
import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.data.test_stream import BATCH, EXAMPLES, STEPS, ListSource, arrays
from tests.multiprocess.tasks import Traced
from tests.tasks import make_run
from trainer import config, train
from trainer.data import IDS, ArraySource
from trainer.data.stream import split_ids, train_batches
from trainer.errors import HostError, UserError
from trainer.observe.phase_log import Follower, NoPhaseLog, PhaseLog, digests_of, read_phase_log
from trainer.observe.rows import read_rows

NOBODY = np.arange(0)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return list(read_phase_log(folder)[0])


def test_each_line_is_in_the_file_when_the_call_returns_and_tells_the_time(tmp_path):
    before = time.monotonic()
    phases = PhaseLog(tmp_path / "new" / "trace")
    follower = Follower(tmp_path / "new" / "trace" / "process_0.jsonl")
    calls = [
        (lambda: None, {"launch": os.getpid()}),
        (lambda: phases.phase("step", 3), {"phase": "step", "step": 3}),
        (lambda: phases.saving(3), {"saving": 3}),
        (lambda: phases.saved(3), {"saved": 3}),
        (lambda: phases.batch(4, np.array([7, 5]), np.array([0, 1])), {"batch": 4, "ids": [7, 5], "places": [0, 1]}),
        (lambda: phases.restored(3, {"a": np.zeros(2)}), {"restored": 3, "digests": digests_of({"a": np.zeros(2)})}),
    ]
    for call, expected in calls:
        call()
        (line,) = follower.new_lines()
        assert before - 1e-3 <= line.pop("time") <= time.monotonic() + 1e-3
        assert line == expected
    phases.close()


def test_a_batch_without_ids_writes_nothing(tmp_path):
    phases = PhaseLog(tmp_path)
    phases.batch(1, None, NOBODY)
    phases.close()
    assert [line.keys() for line in lines_of(tmp_path)] == [{"launch", "time"}]


def test_a_second_launch_continues_the_file(tmp_path):
    for step in (1, 2):
        phases = PhaseLog(tmp_path)
        phases.phase("step", step)
        phases.close()
    assert [line.get("step", "launch") for line in lines_of(tmp_path)] == ["launch", 1, "launch", 2]


def test_the_follower_waits_for_the_end_of_a_line(tmp_path):
    file = tmp_path / "process_0.jsonl"
    follower = Follower(file)
    assert list(follower.new_lines()) == []
    file.write_text('{"phase": "st')
    assert list(follower.new_lines()) == []
    with file.open("a") as stream:
        stream.write('ep"}\n{"phase"')
    assert list(follower.new_lines()) == [{"phase": "step"}]
    assert list(read_phase_log(tmp_path)[0]) == [{"phase": "step"}]


def test_a_phase_log_that_cannot_be_written_or_read_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(HostError, match=r"process_0\.jsonl cannot be written: File exists"):
        PhaseLog(tmp_path / "file")
    with pytest.raises(UserError, match="holds no phase log"):
        read_phase_log(tmp_path)
    (tmp_path / "process_0.jsonl").write_text("[1\n")
    with pytest.raises(UserError, match="not valid JSON"):
        read_phase_log(tmp_path)


def test_a_full_disk_is_a_fault_of_the_machine_at_any_line(tmp_path):
    phases = PhaseLog(tmp_path)
    with Path("/dev/full").open("wb") as full:
        os.dup2(full.fileno(), phases._file)
    for write in (lambda: phases.phase("step", 3), lambda: phases.saved(3)):
        with pytest.raises(HostError, match=r"process_0\.jsonl cannot be written: No space left on device"):
            write()
    phases.close()
    (tmp_path / "process_0.jsonl").unlink()
    (tmp_path / "process_0.jsonl").symlink_to("/dev/full")
    with pytest.raises(HostError, match=r"process_0\.jsonl cannot be written: No space left on device"):
        PhaseLog(tmp_path)


def test_no_phase_log_has_every_method_of_a_phase_log():
    methods = {name: inspect.signature(f) for name, f in vars(PhaseLog).items() if inspect.isfunction(f)}
    public = {name: signature for name, signature in methods.items() if not name.startswith("_")}
    assert {name: inspect.signature(getattr(NoPhaseLog, name)) for name in public} == public
    assert (PhaseLog.is_on, NoPhaseLog.is_on) == (True, False)


@pytest.mark.parametrize("kind", [ArraySource, ListSource])
def test_the_ids_of_a_batch_are_those_of_its_examples_and_come_only_if_asked_for(kind):
    settings = {"seed": 3, "batch_size": BATCH, "start": 2, "stop": STEPS, "local_positions": np.array([1, 4, 5])}
    with_ids = list(train_batches(kind(arrays()), **settings, with_ids=True))
    without = list(train_batches(kind(arrays()), **settings))
    assert len(with_ids) == len(without) == STEPS - 2
    for batch, plain in zip(with_ids, without, strict=True):
        ids, rest = split_ids(batch)
        np.testing.assert_array_equal(ids, plain["number"])
        assert rest.keys() == plain.keys()
        assert split_ids(plain) == (None, plain)
    assert IDS not in without[0]
    assert len({int(i) for batch in with_ids for i in batch[IDS]}) > EXAMPLES / 2


def test_digests_are_equal_only_for_equal_bits():
    flipped = np.ones(3, np.float32)
    flipped.view(np.uint32)[1] ^= 1
    arrays = [np.ones(3, np.float32), flipped, -np.zeros(3, np.float32), np.zeros(3, np.float32)]
    digests = [digests_of({"a": {"b": x}})["a/b"] for x in arrays]
    assert len(set(digests)) == 4
    on_device = [digests_of({"a": {"b": jnp.asarray(x)}})["a/b"] for x in arrays]
    assert on_device == digests
    assert digests_of({"x": jnp.ones(2, jnp.bfloat16)}) != digests_of({"x": jnp.full(2, 1.0078125, jnp.bfloat16)})


def test_the_digest_of_a_sharded_array_is_that_of_the_whole():
    x = np.arange(16, dtype=np.float32)
    sharding = jax.sharding.NamedSharding(jax.make_mesh((8,), ("data",)), jax.sharding.PartitionSpec("data"))
    assert digests_of([jax.device_put(x, sharding)]) == digests_of([x])


@pytest.mark.slow
def test_a_training_traces_its_phases_and_exactly_the_examples_that_its_steps_consumed(tmp_path):
    run = make_run(
        6,
        experiment=Traced(),
        optimizer=dataclasses.replace(make_run().optimizer, schedule=config.Schedule(peak=1e-2)),
        evaluation=config.Evaluation(every_steps=3),
        checkpoint=config.Checkpoint(every_steps=3),
    )
    for launch in ("first", "second"):
        phases = PhaseLog(tmp_path / launch)
        run.total_steps = 6 if launch == "first" else 9
        state = train(run, tmp_path / "run", verbose=False, trace=phases)
        phases.close()
    first, second = (lines_of(tmp_path / launch) for launch in ("first", "second"))
    # The metrics are computed from the ids in the batches on the devices: evidence that owes nothing to the phase log.
    consumed = {
        row["step"]: [row[f"train/id_{j}"] for j in range(16)]
        for row in read_rows(tmp_path / "run/metrics.jsonl")
        if "train/id_0" in row
    }
    traced = {line["batch"]: line["ids"] for line in [*first, *second] if "batch" in line}
    assert traced == consumed
    assert list(traced) == list(range(1, 10))
    phases = [(line["phase"], line["step"]) for line in first if "phase" in line]
    assert [step for phase, step in phases if phase == "evaluate"] == [3, 6]
    assert [step for phase, step in phases if phase == "save"] == [3, 6]
    assert [line["saving"] for line in first if "saving" in line] == [3, 6]
    assert [line["saved"] for line in first if "saved" in line] == [3, 6]
    assert not [line for line in first if "restored" in line]
    (restored,) = [line for line in second if "restored" in line]
    assert restored["restored"] == 6
    assert restored["digests"].keys() == digests_of(state).keys()
    assert json.dumps(restored["digests"]) != json.dumps(digests_of(state))
