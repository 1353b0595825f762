"""Two and four processes train the run that one process trains, and only one of them writes."""

import json
import re
import shutil
import sys
from io import StringIO
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from tests import xla_flags
from tests.multiprocess.config import get_config
from tests.multiprocess.conftest import CONFIG, ROOT, Group, arrays, finished, free_port, rehearse
from tests.multiprocess.tasks import BATCH, EXAMPLES, Traced
from tests.multiprocess.test_ends import assert_stopped
from tests.test_resume import event_steps
from trainer import config, train
from trainer.checkpoint import Store
from trainer.commands import run as command
from trainer.data.order import Order
from trainer.observe.log import read_rows
from trainer.observe.progress import Progress
from trainer.program import build_program
from trainer.rules import paths

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def in_one(tmp_path_factory) -> list[dict]:
    """The rows of metrics of the same run in this process, also on four devices."""
    workdir, run = tmp_path_factory.mktemp("one") / "run", get_config()
    run.evaluation.every_steps = 10
    train(run, workdir, progress=Progress(20, StringIO()))
    return list(read_rows(workdir / "metrics.jsonl"))


def values(rows: list[dict], *names: str) -> np.ndarray:
    return np.array([[row[name] for name in names] for row in rows])


@pytest.fixture(params=["in_two", "in_four"])
def rows(request, in_two, in_four) -> list[dict]:
    """Of the twenty steps in two or in four processes."""
    workdir, _ = in_two if request.param == "in_two" else in_four
    return list(read_rows(workdir / "metrics.jsonl"))[:20]


def test_losses_gradients_and_evaluations_are_those_of_one_process_to_float32_rounding(rows, in_one):
    for names in (["train/loss", "train/grad_norm", "train/accuracy"], ["test/loss", "test/accuracy"]):
        found, expected = ([row for row in run if names[0] in row] for run in (rows, in_one))
        np.testing.assert_allclose(values(found, *names), values(expected, *names), rtol=2e-5, atol=0)
    assert [row["step"] for row in rows] == [row["step"] for row in in_one] == list(range(1, 21))


def test_a_stopped_process_of_four_is_named_and_killed_and_the_others_end_after_the_limit(in_four):
    assert_stopped(in_four[1], 3)


def test_pmap_over_two_processes_in_a_temporary_workdir_trains_and_saves_what_one_process_does(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    flags = ("--processes=2", "--devices=2", "--config.evaluation.every_steps=10")
    said = finished(rehearse(f"{CONFIG}:replicated", *flags)).stdout.splitlines()[0]
    workdir = Path(said.removeprefix("no --workdir: the run is in "))
    assert workdir.parent == tmp_path
    assert ROOT not in workdir.parents
    run = get_config("replicated")
    run.evaluation.every_steps, run.parallel.devices, run.parallel.strategy = 10, 4, "data"
    train(run, tmp_path / "one", progress=Progress(20, StringIO()))
    found, expected = (list(read_rows(folder / "metrics.jsonl")) for folder in (workdir, tmp_path / "one"))
    for names in (["train/loss", "train/grad_norm"], ["test/loss", "test/accuracy", "test/examples"]):
        found_values, expected_values = (
            values([row for row in rows if names[0] in row], *names) for rows in (found, expected)
        )
        np.testing.assert_allclose(found_values, expected_values, rtol=2e-5, atol=0)
    found, expected = arrays(workdir), arrays(tmp_path / "one")
    assert found.keys() == expected.keys()
    for path, array in found.items():
        np.testing.assert_allclose(array, expected[path], rtol=1e-4, atol=1e-5, err_msg=path)


def test_example_j_of_batch_i_is_the_same_with_the_same_random_numbers_on_any_number_of_processes(rows, in_one):
    names = [f"train/id_{j}" for j in range(BATCH)]
    examples = Order(Traced().examples, get_config().seed)(np.arange(20 * BATCH)).reshape(20, BATCH)
    np.testing.assert_array_equal(values(rows, *names), examples)
    for kind in ("noise", "drawn"):  # on the devices, and by `augment` on the host
        numbers = [f"train/{kind}_{j}" for j in range(BATCH)]
        np.testing.assert_array_equal(values(rows, *numbers), values(in_one, *numbers))
        assert len(np.unique(values(rows, *numbers))) == 20 * BATCH


def test_evaluation_sees_every_example_once_though_the_last_batch_is_not_full(rows):
    evaluated = [row for row in rows if "test/examples" in row]
    assert [(row["step"], row["test/examples"]) for row in evaluated] == [(10, EXAMPLES), (20, EXAMPLES)]
    shares = values(evaluated, *(f"test/share_{i}" for i in range(EXAMPLES)))
    np.testing.assert_array_equal(shares, np.full_like(shares, 1 / EXAMPLES))


def test_only_the_first_process_writes_and_speaks(in_two):
    workdir, group = in_two
    assert {line[:4] for line in group.stdout.splitlines()} == {"[0] "}
    assert "Gloo" not in group.stdout
    shown = re.findall(r"^\[0\] step +(\d+)/20  loss ", group.stdout, re.MULTILINE)
    assert shown == [str(step) for step in range(1, 21)]
    assert event_steps(workdir) == list(range(1, 21))
    assert len(list((workdir / "tensorboard").glob("events*"))) == 1
    assert sorted(path.name for path in workdir.iterdir()) == [
        *(".lock", "checkpoints", "config.json", "metrics.jsonl", "params.txt", "profile", "reports"),
        "tensorboard",
        "timing.jsonl",
    ]


def test_every_process_writes_a_profile_of_its_own(in_two):
    for index in (0, 1):
        traces = list((in_two[0] / "profile" / f"process_{index}").rglob("*.xplane.pb"))
        assert len(traces) == 1
        recorded = traces[0].read_bytes()
        assert b"step_num" in recorded
        assert b"train" in recorded


def test_a_checkpoint_of_two_processes_has_shards_of_both_and_one_metadata(in_two):
    folder = in_two[0] / "checkpoints" / "20"
    assert {path.name for path in (folder / "state").glob("ocdbt.process_*")} == {"ocdbt.process_0", "ocdbt.process_1"}
    assert json.loads((folder / "metadata" / "metadata").read_text())["content"]["step"] == 20


def test_a_checkpoint_of_two_processes_is_restored_on_one_bit_for_bit(in_two):
    expected, run = arrays(in_two[0]), get_config()
    for strategy, devices in (("data", 1), ("fsdp", 4), ("pmap", 4)):
        run.parallel = config.Parallel(strategy=strategy, devices=devices, min_shard_size=0)
        store = Store(in_two[0] / "checkpoints", run.checkpoint)
        state = store.restore(build_program(config.resolve(run)).state, 20)
        found = dict(zip(paths(state), map(np.asarray, jax.tree.leaves(state)), strict=True))
        assert found.keys() == expected.keys()
        for path in found:
            np.testing.assert_array_equal(found[path], expected[path], err_msg=path)


def test_a_checkpoint_of_two_is_restored_and_loaded_on_four_and_a_process_that_is_late_or_differs_is_named(
    in_two, tmp_path
):
    expected = arrays(in_two[0])
    np.savez(tmp_path / "expected.npz", **expected)  # pyrefly: ignore[bad-argument-type] - no name is an option of it
    script = ["-m", "tests.multiprocess.restore", str(in_two[0]), str(tmp_path / "expected.npz")]
    command = [sys.executable, *script]
    start = f"with ProcessGroup({command}, processes=4, devices=1) as group:\n    sys.exit(group.wait())"
    start = f"import sys\nfrom trainer.distributed.launch import ProcessGroup\n{start}"
    lines = finished(Group("-c", start)).stdout.splitlines()
    divisible = [a for path, a in expected.items() if "batch_stats" not in path and any(n % 4 == 0 for n in a.shape)]
    sharded = len(divisible)
    assert sharded > 5
    for index in range(4):
        shown = [line for line in lines if line.startswith(f"[{index}] ")]
        same = f"{len(expected)} leaves are the same bit for bit on 4 processes × 1 devices, {sharded} of them sharded"
        own = [
            "['own/accuracy', 'own/examples', 'own/largest'] 1",
            *["process 1: UserError: evaluate of the experiment: process 1"] * 2,  # other numbers, and none
        ]
        missed = ["waited 1 s at 'the missed one' for process 3 of 4"] * (index != 3)
        assert shown == [f"[{index}] {text}" for text in (same, *own, *missed)]


def test_ten_and_ten_steps_in_two_processes_are_twenty_to_the_bit(in_two, tmp_path):
    workdir, whole = tmp_path / "run", in_two[0]
    shutil.copytree(whole, workdir)
    shutil.rmtree(workdir / "checkpoints" / "20")
    flags = ("--processes=2", "--devices=2", "--config.evaluation.every_steps=10", f"--workdir={workdir}")
    shown = finished(rehearse(CONFIG, *flags)).stdout
    assert shown.count("resumed from step 10") == 1
    found, expected = arrays(workdir), arrays(whole)
    assert found.keys() == expected.keys()
    for path in found:
        np.testing.assert_array_equal(found[path], expected[path], err_msg=path)
    assert (workdir / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_evaluate_finds_the_processes_that_open_mpi_started_and_shows_what_training_found(in_two, running):
    port = free_port()
    for index in range(2):
        environment = {
            "OMPI_MCA_orte_hnp_uri": "4096.0;tcp://127.0.0.1:1",
            "OMPI_COMM_WORLD_SIZE": "2",
            "OMPI_COMM_WORLD_RANK": str(index),
            "OMPI_COMM_WORLD_LOCAL_RANK": str(index),
            "JAX_COORDINATOR_PORT": str(port),
            "XLA_FLAGS": xla_flags(devices=2),
        }
        running.append(Group("-m", "trainer", "evaluate", f"--workdir={in_two[0]}", **environment))
    first, second = map(finished, running)
    last = list(read_rows(in_two[0] / "metrics.jsonl"))[-1]
    shown = dict(line.split(": ") for line in first.stdout.splitlines() if line.startswith("test "))
    assert shown["test loss"] == f"{last['test/loss']:.4f}"
    assert shown["test examples"] == str(EXAMPLES)
    assert "test " not in second.stdout


def test_an_evaluation_of_the_experiments_own_gives_what_one_process_gives(rows, in_one):
    names = ["own/accuracy", "own/largest", "own/examples"]
    found, expected = ([row for row in run if names[0] in row] for run in (rows, in_one))
    assert [row["step"] for row in found] == [10, 20]
    np.testing.assert_allclose(values(found, *names), values(expected, *names), rtol=2e-5, atol=0)
    # The model and the examples are those of the main evaluation.
    np.testing.assert_allclose(values(found, "own/accuracy"), values(found, "test/accuracy"), rtol=1e-6)


def test_a_report_shows_parameters_that_are_sharded_over_processes(in_two):
    saved, folder = arrays(in_two[0]), in_two[0] / "reports" / "20"
    assert sorted(path.name for path in folder.iterdir()) == ["kernel.png", "weights.npz"]
    found, expected = np.load(folder / "weights.npz"), np.histogram(saved["params/head/kernel"].astype(np.float64), 30)
    np.testing.assert_array_equal(found["counts"], expected[0])
    np.testing.assert_array_equal(found["edges"], expected[1])
    pixels = np.asarray(Image.open(folder / "kernel.png"))
    np.testing.assert_allclose(pixels, np.clip(saved["params/dense/kernel"], 0, 1) * 255, atol=0.51)
    assert len(np.unique(pixels)) > 20


def test_predict_in_two_processes_writes_every_example_once_as_one_process_does(in_two, running, tmp_path):
    flags = ("predict", f"--workdir={in_two[0]}", f"--coordinator=127.0.0.1:{free_port()}", "--processes=2")
    for index in range(2):
        own = (f"--output={tmp_path}/two.npz", f"--process={index}")
        running.append(Group("-m", "trainer", *flags, *own, XLA_FLAGS=xla_flags(devices=2)))
    first, second = map(finished, running)
    wrote = [line for group in (first, second) for line in group.stdout.splitlines() if "Gloo" not in line]
    assert wrote == [f"wrote {tmp_path}/two.npz: {EXAMPLES} examples, step 20 of {in_two[0]}"]
    assert command(["predict", f"--workdir={in_two[0]}", f"--output={tmp_path}/one.npz"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.npz", "two.npz"]
    found, expected = np.load(tmp_path / "two.npz"), np.load(tmp_path / "one.npz")
    np.testing.assert_array_equal(found["id"], np.arange(EXAMPLES))
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-6, err_msg=name)
