"""A damaged, foreign or changed workdir: the run goes on from a good checkpoint, or says in one line why not."""

import dataclasses
import gc
import json
import re
import shutil
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.tasks import Task, make_run
from trainer import config
from trainer.errors import HostError, UserError
from trainer.loop import train_program
from trainer.observe.progress import Progress
from trainer.program import Program, build_program

RUN = make_run(
    12,
    parallel=config.Parallel(devices=2),
    checkpoint=config.Checkpoint(every_steps=4, keep_last=3),
    evaluation=config.Evaluation(every_steps=4),
)
RUN.optimizer.schedule.final = 1e-3  # so that a longer run is possible


@pytest.fixture(scope="module")
def program() -> Program:
    return build_program(config.resolve(RUN))


def launch(program: Program, folder: Path, **options) -> tuple[str, dict[str, bytes], list[dict]]:
    """The output of a launch, the arrays of its last state, and the rows of its metrics."""
    shown = StringIO()
    state = train_program(program, folder, Progress(12, shown), **options)
    leaves = {jax.tree_util.keystr(k): np.asarray(x).tobytes() for k, x in jax.tree_util.tree_leaves_with_path(state)}
    return shown.getvalue(), leaves, rows(folder)


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(program, tmp_path_factory):
    """A finished run, its last state and its rows."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    _, state, metrics = launch(program, folder)
    return folder, state, metrics


@pytest.fixture
def folder(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir() if path.name.isdecimal())


def flip_arrays(step: Path) -> None:
    for file in step.rglob("d/*"):  # TensorStore's data; some of it may be metadata
        data = bytearray(file.read_bytes())
        for i in range(0, len(data), 7):
            data[i] ^= 16
        file.write_bytes(data)


def copied(step: Path) -> None:
    shutil.rmtree(step)
    shutil.copytree(step.with_name("4"), step)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "arrays flipped": flip_arrays,
    "metadata empty": lambda step: (step / "metadata" / "metadata").write_text(""),
    "metadata gone": lambda step: shutil.rmtree(step / "metadata"),
    "arrays gone": lambda step: shutil.rmtree(step / "state"),
    "everything gone": lambda step: [shutil.rmtree(path) for path in step.iterdir() if path.is_dir()],
    "manifest cut": lambda step: (step / "state" / "manifest.ocdbt").write_bytes(b"\0"),
    "Orbax's metadata nested": lambda step: (step / "state" / "_METADATA").write_text("[" * 900 + "]" * 900),
    "copy of another step": copied,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_bad_newest_checkpoint_is_moved_aside_and_the_run_ends_as_if_it_had_not_been(
    damage, folder, program, finished
):
    damage(folder / "checkpoints" / "12")
    content = {
        p.relative_to(folder / "checkpoints"): p.read_bytes() for p in (folder / "checkpoints" / "12").rglob("d/*")
    }
    shown, state, metrics = launch(program, folder)
    assert "resumed from step 8" in shown
    assert f"checkpoint 12 is not used and was moved to {folder}/set_aside/12-unused" in shown
    assert state == finished[1]
    assert metrics == finished[2]
    assert steps(folder) == ["12", "4", "8"]
    aside = folder / "set_aside" / "12-unused"
    assert {Path("12") / p.relative_to(aside): p.read_bytes() for p in aside.rglob("d/*")} == content


def test_several_bad_checkpoints_are_passed_over(folder, program, finished):
    flip_arrays(folder / "checkpoints" / "12")
    DAMAGE["metadata gone"](folder / "checkpoints" / "8")
    shown, state, metrics = launch(program, folder)
    assert "resumed from step 4" in shown
    assert (state, metrics) == finished[1:]
    assert sorted(p.name for p in (folder / "set_aside").iterdir()) == ["12-unused", "8-unused"]


def test_without_a_good_checkpoint_nothing_is_touched(folder, program):
    for step in ("12", "8", "4"):
        flip_arrays(folder / "checkpoints" / step)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}
    with pytest.raises(
        UserError, match=r"no checkpoint of workdir .* can be used, and all are kept as they are: 12: "
    ) as e:
        launch(program, folder)
    assert "\n" not in str(e.value)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"} == before


@pytest.mark.parametrize("change", [{"seed": 1}, {"experiment": Task(noise=0.5)}], ids=["seed", "experiment"])
def test_a_step_of_another_run_is_not_taken(change, folder, program, finished, tmp_path):
    other = dataclasses.replace(RUN, **change)
    launch(build_program(config.resolve(other)), tmp_path / "other")
    shutil.rmtree(folder / "checkpoints" / "12")
    shutil.copytree(tmp_path / "other" / "checkpoints" / "12", folder / "checkpoints" / "12")
    shown, state, metrics = launch(program, folder)
    assert "resumed from step 8" in shown
    assert "moved to" in shown
    assert f"it belongs to another run: {next(iter(change))}" in shown
    assert (state, metrics) == finished[1:]


def test_a_run_goes_on_from_an_earlier_step_when_told(folder, program, finished):
    shown, state, metrics = launch(program, folder, from_step=4)
    assert "resumed from step 4" in shown
    assert (state, metrics) == finished[1:]
    assert sorted(p.name for p in (folder / "set_aside").iterdir()) == ["12-later", "8-later"]


def test_a_step_that_is_not_there_is_refused_with_those_that_are(folder, program):
    with pytest.raises(UserError, match="--from-step is 5, which is no checkpoint; there are 4, 8, 12"):
        launch(program, folder, from_step=5)
    assert not (folder / "set_aside").exists()


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"a": 1}', "[" * 900])
def test_a_lost_or_damaged_config_is_written_again(content, folder, program, finished):
    kept = (folder / "config.json").read_text()
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    shown, state, _ = launch(program, folder)
    assert "is written again from the checkpoint and the command" in shown
    assert state == finished[1]
    assert (folder / "config.json").read_text() == kept


class TestAcceptedChanges:
    """A run whose settings were changed goes on only when that is accepted, and remembers it."""

    def changed(self, **settings) -> Program:
        run = dataclasses.replace(RUN, total_steps=16, **settings)
        run = dataclasses.replace(run, optimizer=settings.get("optimizer", kept_schedule(RUN.optimizer)))
        return build_program(config.resolve(run))

    def test_it_is_refused_in_one_line_that_names_the_flag(self, folder):
        with pytest.raises(UserError, match=r"batch_size was 16, is 8; choose another --workdir .*, or go on with"):
            launch(self.changed(batch_size=8), folder)

    def test_it_is_recorded_and_accepted_for_ever(self, folder):
        program = self.changed(batch_size=8)
        shown, *_, metrics = launch(program, folder, accept_changes=True)
        assert "note: accepted from step 12 on: batch_size was 16, is 8" in shown
        assert {"step": 12, "accepted": ["batch_size was 16, is 8"]} in metrics
        kept = json.loads((folder / "config.json").read_text())
        assert kept["$accepted"][0]["changes"] == ["batch_size was 16, is 8"]
        content = json.loads((folder / "checkpoints" / "16" / "metadata" / "metadata").read_text())["content"]
        assert content["accepted"] == ["batch_size was 16, is 8"]
        # The newest checkpoint is lost: the one before has the old settings, and is still a checkpoint of this run.
        shutil.rmtree(folder / "checkpoints" / "16")
        shown, *_ = launch(program, folder, accept_changes=True)
        assert "resumed from step 12" in shown

    def test_moments_that_still_fit_are_kept(self, folder, program):
        before = program.init()
        groups = RUN.optimizer.groups | {"plain": config.Group(frozen=True)}
        optimizer = kept_schedule(dataclasses.replace(RUN.optimizer, groups=groups))
        run = dataclasses.replace(RUN, total_steps=12, optimizer=optimizer)
        state = train_program(build_program(config.resolve(run)), folder, Progress(12, StringIO()), accept_changes=True)
        moved = {jax.tree_util.keystr(k): x for k, x in jax.tree_util.tree_leaves_with_path(state.opt_state)}
        kernels = [path for path in moved if "mu" in path and "kernel" in path]
        assert kernels
        assert all(np.any(np.asarray(moved[path])) for path in kernels)
        assert not np.array_equal(state.params["head"]["bias"], before.params["head"]["bias"])

    def test_other_parameters_are_refused_although_changes_are_accepted(self, folder):
        with pytest.raises(UserError, match=r"checkpoint at step 12 does not fit this run: .*params/norm/scale"):
            launch(self.changed(experiment=Task(batch_norm=False)), folder, accept_changes=True)

    def test_other_examples_are_another_run(self, folder):
        program = self.changed(experiment=Shifted())
        program = dataclasses.replace(program, run=self.changed().run)  # the same settings, with other data
        with pytest.raises(UserError, match="trained on other examples: as many as then, but with other content"):
            launch(program, folder)
        shown, *_ = launch(program, folder, accept_changes=True)
        assert "the training examples: as many as then, but with other content" in shown

    def test_another_experiment_is_told_by_its_settings_and_not_by_its_examples_alone(self, folder):
        with pytest.raises(UserError, match=r"holds a run with other settings: experiment .*; the training examples"):
            launch(self.changed(experiment=Shifted()), folder)


@dataclasses.dataclass
class Shifted(Task):
    def source(self, split):
        source = super().source(split)
        source.arrays["x"] = source.arrays["x"] + np.float32(1)
        return source


def kept_schedule(optimizer: config.Optimizer) -> config.Optimizer:
    return dataclasses.replace(optimizer, schedule=dataclasses.replace(optimizer.schedule, run_steps=12))


def test_harmless_changes_are_shown_and_accepted(folder, program):
    run = dataclasses.replace(program.run, logging=config.Logging(every_steps=3))
    shown, *_ = launch(dataclasses.replace(program, run=run), folder)
    assert "note: since the checkpoint, logging.every_steps was 1, is 3 (harmless)" in shown


def test_an_evaluation_that_a_kill_prevented_is_made_by_the_next_launch(folder, program, finished):
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:-1]))
    assert "test/loss" in lines[-1]
    shown, _, metrics = launch(program, folder)
    assert "step 12 was not yet evaluated on 'test': evaluating it now" in shown
    assert metrics == finished[2]


# Orbax leaves coroutines of a failed save behind, which Python reports when they are collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("change", ["moved", "removed", "replaced"])
def test_a_workdir_that_is_taken_away_is_noticed_and_the_state_saved_beside_it(change, program, finished, tmp_path):
    folder = tmp_path / "run"

    class Taking(Progress):
        def update(self, step, loss, examples_per_second, seconds_left):
            if step == 5:
                folder.rename(tmp_path / "moved")
                if change == "removed":
                    shutil.rmtree(tmp_path / "moved")
                if change == "replaced":
                    folder.mkdir()

    with pytest.raises(
        HostError, match="was moved, removed or replaced while the run trained in it; the state of"
    ) as error:
        train_program(program, folder, Taking(12, StringIO()))
    step = re.findall(r"the state of step (\d+)", str(error.value))[0]
    del error  # its traceback keeps them
    gc.collect()
    (beside,) = tmp_path.glob("run.rescued-*")
    shown, state, _ = launch(program, beside)
    assert f"resumed from step {step}" in shown
    assert state == finished[1]


def test_a_state_that_is_not_finite_is_not_said_to_be_saved_beside_a_workdir_that_is_gone(tmp_path):
    folder = tmp_path / "run"
    # Loss and gradient of the first step are finite; the step itself leaves float32.
    groups = {"decayed": config.Group(weight_decay=1e3), "plain": config.Group()}
    optimizer = dataclasses.replace(RUN.optimizer, groups=groups, schedule=config.Schedule(peak=3e38))
    run = dataclasses.replace(RUN, optimizer=optimizer, checkpoint=config.Checkpoint(every_steps=1))

    class Taking(Progress):
        def update(self, step, loss, examples_per_second, seconds_left):
            folder.rename(tmp_path / "moved")

    with pytest.raises(HostError, match="the state of step 1 holds NaN or Inf and is not saved"):
        train_program(build_program(config.resolve(run)), folder, Taking(12, StringIO()))
    assert [path.name for path in tmp_path.iterdir()] == ["moved"]
