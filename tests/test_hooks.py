"""Hooks: when each is called and with what, how one stops a run, how one fails, and that none changes a number."""

import dataclasses
import re
import shutil
import socket
from io import StringIO
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests.launched import launch
from tests.tasks import Task, make_run
from trainer import config, train
from trainer.checkpoint import Store
from trainer.errors import HostError, UserError
from trainer.hooks import HOOK_METHODS, EarlyStopping, Hook, Plot
from trainer.observe.log import read_rows
from trainer.observe.progress import Progress


def run_of(total_steps: int = 12, **settings: Any) -> config.Run:
    settings.setdefault("evaluation", config.Evaluation(batch_size=8, every_steps=2))
    return make_run(
        total_steps,
        parallel=config.Parallel(devices=1),
        checkpoint=config.Checkpoint(every_steps=5),
        logging=config.Logging(every_steps=3),
        **settings,
    )


def bits(state) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The final state and the rows of a run without hooks."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    state = launch(run_of(), folder)
    return bits(state), list(read_rows(folder / "metrics.jsonl"))


class Recorded:
    """Notes every call."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, dict[str, float]]] = []
        self.states: dict[int, int] = {}

    def __getattr__(self, name):
        if name not in HOOK_METHODS:
            raise AttributeError(name)

        def note(event):
            self.calls.append((name, event.step, dict(event.metrics)))
            if name == "on_step":
                self.states[event.step] = int(event.state.step)

        return note

    def __dir__(self):
        return HOOK_METHODS


def test_each_moment_is_called_with_its_step_and_its_metrics_and_no_number_changes(tmp_path, plain):
    hook = Recorded()
    state = train(run_of(), tmp_path / "run", verbose=False, hooks=[hook])
    assert (bits(state), list(read_rows(tmp_path / "run" / "metrics.jsonl"))) == plain
    steps = {name: [step for moment, step, _ in hook.calls if moment == name] for name in HOOK_METHODS}
    assert steps == {
        "on_start": [0],
        "on_step": list(range(1, 13)),
        "on_log": [3, 6, 9, 12],
        "on_evaluate": [2, 4, 6, 8, 10, 12],
        "on_save": [5, 10, 12],
        "on_end": [12],
    }
    assert (hook.calls[0][0], hook.calls[-1][0]) == ("on_start", "on_end")
    assert hook.states == {step: step for step in range(1, 13)}
    for name, kind in (("on_log", "train/"), ("on_evaluate", "test/"), ("on_step", "train/")):
        found = {step: metrics for moment, step, metrics in hook.calls if moment == name}
        written = {row["step"]: {key: row[key] for key in row if key.startswith(kind)} for row in plain[1]}
        written = {step: metrics for step, metrics in written.items() if metrics}
        assert written
        assert {step: metrics for step, metrics in found.items() if step in written} == written


@pytest.mark.parametrize("moment", ["on_step", "on_log", "on_evaluate", "on_save"])
def test_a_hook_stops_the_run_evaluated_and_saved_and_another_launch_goes_on_bit_for_bit(tmp_path, plain, moment):
    hook = type("Stop", (), {moment: lambda self, event: event.stop("enough") if event.step >= 5 else None})()
    stream = StringIO()
    state = launch(run_of(), tmp_path / "run", progress=Progress(12, stream), hooks=[hook])
    last = int(state.step)
    # A row is written when later steps are in flight.
    assert last == {"on_step": 5, "on_evaluate": 6, "on_save": 5}.get(moment, last) <= 10
    assert f"stopped at step {last}: enough" in stream.getvalue()
    rows = list(read_rows(tmp_path / "run" / "metrics.jsonl"))
    assert moment == "on_save" or any("test/loss" in row for row in rows if row["step"] == last)
    assert (tmp_path / "run" / "checkpoints" / str(last)).is_dir()
    assert bits(launch(run_of(), tmp_path / "run")) == plain[0]


class FailedError(Exception):
    pass


@pytest.mark.parametrize(
    ("moment", "error"),
    [*((moment, FailedError) for moment in HOOK_METHODS), ("on_step", SystemExit), ("on_evaluate", KeyboardInterrupt)],
)
def test_an_exception_in_a_hook_ends_the_run_with_its_newest_state_saved(tmp_path, plain, moment, error):
    def fail(self, event):
        if event.step >= 4 or moment == "on_start":
            raise error("of the user")

    hook, folder = type("Failing", (), {moment: fail})(), tmp_path / "run"
    with pytest.raises(error, match="of the user") as raised:
        launch(run_of(), folder, hooks=[hook])
    (note,) = raised.value.__notes__
    if moment == "on_start":
        assert note == "a hook ended the run; no step was complete"
    else:
        assert re.fullmatch(r"a hook ended the run; step \d+ is saved", note)
        step = int(note.split()[-3])
        assert step == {"on_step": 4, "on_evaluate": 4, "on_save": 5, "on_end": 12}.get(moment, step) >= 4
        assert (folder / "checkpoints" / str(step)).is_dir()
    assert bits(launch(run_of(), folder)) == plain[0]
    assert sorted(read_rows(folder / "metrics.jsonl"), key=str) == sorted(plain[1], key=str)


class Blocks:
    """Puts a file where the checkpoints go after step 1, so that no save can begin, and removes it after a step."""

    def __init__(self, workdir: Path, last: int = 100) -> None:
        self.file, self.last = workdir / "checkpoints", last

    def on_step(self, event):
        if event.step == 1:
            self.file.write_text("in the way")
        if event.step == self.last:
            self.file.unlink()


def test_a_hook_that_exits_says_what_is_saved(tmp_path):
    def leave(self, event):
        raise SystemExit(7)

    stream = StringIO()
    with pytest.raises(SystemExit) as raised:
        launch(
            run_of(), tmp_path / "run", progress=Progress(12, stream), hooks=[type("Leaves", (), {"on_log": leave})()]
        )
    assert raised.value.code == 7
    assert re.search(r"^a hook ended the run; step \d+ is saved$", stream.getvalue(), re.MULTILINE)


def test_a_hook_that_raises_because_the_loss_is_not_finite_keeps_its_error_and_the_step_is_kept_for_replay(tmp_path):
    def fail(self, event):
        if not np.isfinite(event.metrics["train/loss"]):
            raise FailedError("the loss is not finite")

    hook, folder = type("Careful", (), {"on_step": fail})(), tmp_path / "run"
    run = dataclasses.replace(run_of(), experiment=Task(explode_at=3))
    with pytest.raises(FailedError, match="the loss is not finite") as raised:
        train(run, folder, verbose=False, hooks=[hook])
    (note,) = raised.value.__notes__
    assert note.startswith("a hook ended the run; the newest state is not saved: the loss of step 3 is inf")
    assert f"trainer replay {folder}/diverged/3" in note
    assert len(list((folder / "diverged").iterdir())) == 1


def test_a_save_that_cannot_begin_calls_no_hook_and_one_that_is_the_last_must_succeed(tmp_path, plain):
    run = run_of()
    run.checkpoint.on_error = "continue"
    for workdir, last in ((tmp_path / "freed", 7), (tmp_path / "blocked", 100)):
        hook, stream = Recorded(), StringIO()
        options: Any = {"progress": Progress(12, stream), "hooks": [hook, Blocks(workdir, last)]}
        if last == 7:
            assert bits(launch(run, workdir, **options)) == plain[0]
        else:
            with pytest.raises(HostError, match=r"checkpoint 12 cannot be written: .*; there is no checkpoint yet"):
                launch(run, workdir, **options)
        steps = {name: [step for moment, step, _ in hook.calls if moment == name] for name in ("on_save", "on_end")}
        assert steps == ({"on_save": [10, 12], "on_end": [12]} if last == 7 else {"on_save": [], "on_end": []})
        assert "warning: checkpoint 5 cannot be written: " in stream.getvalue()
        assert "the run goes on" in stream.getvalue()


def test_a_failed_hook_says_that_the_newest_state_is_not_saved(tmp_path):
    run, folder = run_of(), tmp_path / "run"
    run.checkpoint.on_error = "continue"
    with pytest.raises(FailedError) as raised:
        launch(run, folder, hooks=[Blocks(folder), BreaksAt(7)])
    (note,) = raised.value.__notes__
    assert note.startswith("a hook ended the run; the newest state is not saved: checkpoint 7 cannot be written: ")


class BreaksAt:
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, event):
        if event.step == self.step:
            raise FailedError


def stopping() -> EarlyStopping:
    return EarlyStopping("test/loss", patience=3, min_delta=0.05)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> list[bytes]:
    """The final state of a run that nothing disturbs until it is stopped early."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    state = launch(run_of(200), folder, hooks=[stopping()])
    assert 8 <= int(state.step) < 200
    losses = [row["test/loss"] for row in read_rows(folder / "metrics.jsonl") if "test/loss" in row]
    assert int(state.step) == 2 * expected_stop(losses, 3, 0.05)
    return bits(state)


@pytest.mark.parametrize("broken", [[3], [6], [5, 7, 8]], ids=str)
def test_early_stopping_stops_a_resumed_run_where_it_stops_an_undisturbed_one(tmp_path, stopped, broken):
    run = run_of(200)
    for step in broken:
        with pytest.raises(FailedError):
            launch(run, tmp_path / "run", hooks=[stopping(), BreaksAt(step)])
    assert bits(launch(run, tmp_path / "run", hooks=[stopping()])) == stopped
    once_more = Recorded()
    assert bits(launch(run, tmp_path / "run", hooks=[stopping(), once_more])) == stopped
    assert [name for name, _, _ in once_more.calls] == ["on_start", "on_end"]


def test_early_stopping_forgets_the_evaluations_that_a_kill_undid(tmp_path, stopped):
    run, folder = run_of(200), tmp_path / "run"
    with pytest.raises(FailedError):
        launch(run, folder, hooks=[stopping(), BreaksAt(9)])
    shutil.rmtree(folder / "checkpoints" / "9")  # as if the kill had come before it was written
    assert {6, 8} <= {row["step"] for row in read_rows(folder / "metrics.jsonl") if "test/loss" in row}
    assert bits(launch(run, folder, hooks=[stopping()])) == stopped


def expected_stop(losses: list[float], patience: int, min_delta: float) -> int:
    """The number of the evaluation, counted from 1, at which training stops: a loop of its own."""
    for count in range(1, len(losses) + 1):
        best, at = np.inf, 0
        for number, loss in enumerate(losses[:count], 1):
            if loss < best - min_delta:
                best, at = loss, number
        if count - at >= patience:
            return count
    return len(losses)


def test_early_stopping_of_a_metric_that_should_grow(tmp_path):
    hook = EarlyStopping("test/accuracy", patience=2, mode="max", min_delta=0.5)
    stream = StringIO()
    state = launch(run_of(100), tmp_path / "run", progress=Progress(100, stream), hooks=[hook])
    assert int(state.step) == 6  # the first evaluation is the best one, as no other is better by a half
    assert re.search(
        r"stopped at step 6: test/accuracy did not improve on 0\.\d+ in 2 evaluations, up to step 6", stream.getvalue()
    )


def test_a_metric_that_is_not_evaluated_is_named_with_the_nearest(tmp_path):
    with pytest.raises(UserError, match=r"metric 'test/los' is not evaluated; did you mean 'test/loss'\?"):
        launch(run_of(), tmp_path / "run", hooks=[EarlyStopping("test/los", patience=1)])


def test_early_stopping_looks_at_its_own_evaluation_among_several(tmp_path):
    run = run_of(100, evaluations={"quick": config.Evaluation(every_steps=1, max_examples=4)})
    state = launch(run, tmp_path / "run", hooks=[EarlyStopping("test/loss", patience=2, min_delta=9.0)])
    assert int(state.step) == 6
    unknown = r"metric 'quik/loss' names the evaluation 'quik', which the run does not have; did you mean 'quick'\?"
    with pytest.raises(UserError, match=unknown):
        launch(run, tmp_path / "other", hooks=[EarlyStopping("quik/loss", patience=2)])


class Split(Task):
    """Splits with slashes in their names."""

    def source(self, split: str) -> Any:
        return super().source(split.partition("/")[0])


def test_early_stopping_finds_an_evaluation_with_a_slash_in_its_name(tmp_path):
    evaluation = config.Evaluation("test/hard", batch_size=8, every_steps=2)
    run = run_of(100, experiment=Split(), evaluation=evaluation)
    hooks = [EarlyStopping("test/hard/loss", patience=2, min_delta=9.0)]
    assert int(launch(run, tmp_path / "run", hooks=hooks).step) == 6


def test_a_run_that_another_evaluation_stops_is_evaluated_in_full(tmp_path):
    evaluations = {"quick": config.Evaluation(every_steps=3, max_examples=4)}
    hooks = [EarlyStopping("quick/loss", patience=1, min_delta=9.0)]
    for _ in range(2):
        state = launch(
            run_of(100, evaluation=config.Evaluation(batch_size=8), evaluations=evaluations),
            tmp_path / "run",
            hooks=hooks,
        )
        assert int(state.step) == 6
        rows = list(read_rows(tmp_path / "run" / "metrics.jsonl"))
        assert {"test/loss", "quick/loss"} <= rows[-1].keys()
        assert rows[-1]["step"] == 6


@dataclasses.dataclass
class Given(Task):
    """Evaluates to given numbers."""

    values: tuple[float | None, ...] = ()

    def evaluate(self, name, variables, batches):
        made = len(list((CALLS[0] / "metrics.jsonl").read_text().split('"test/loss"'))) - 1
        value = self.values[made]
        return {"loss": float("nan") if value is None else value}


CALLS: list[Path] = []


@pytest.mark.parametrize("broken", [None, 3, 5])
def test_a_nan_counts_in_a_resumed_run_as_it_does_in_an_undisturbed_one(tmp_path, broken):
    CALLS[:] = [tmp_path / "run"]
    values = (1.0, None, 1.1, 0.5, 0.4, 0.3)
    run = run_of(12, experiment=Given(values=values))
    run.checkpoint.every_steps = 2
    hooks = [EarlyStopping("test/loss", patience=2)]
    if broken is not None:
        with pytest.raises(FailedError):
            launch(run, tmp_path / "run", hooks=[*hooks, BreaksAt(broken)])
    assert int(launch(run, tmp_path / "run", hooks=hooks).step) == 6


class Misspelt:
    def on_evalute(self, event):
        pass


@pytest.mark.parametrize(
    ("hook", "text"),
    [
        (Hook, "hook Hook is a class; pass an instance: Hook"),
        (Misspelt(), r"has a method on_evalute, which nothing calls; did you mean 'on_evaluate'\?"),
        (print, "has none of the methods on_start, on_step"),
        (None, "hooks is a Recorded; a list of hooks is expected"),
    ],
    ids=["class", "misspelt", "no method", "no list"],
)
def test_an_object_that_nothing_would_call_is_no_hook(tmp_path, hook, text):
    hooks: Any = Recorded() if hook is None else [hook]
    with pytest.raises(UserError, match=text):
        launch(run_of(), tmp_path / "run", hooks=hooks)
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"patience": 0}, "patience is 0; it must be at least 1"),
        ({"patience": 1, "min_delta": -1.0}, "min_delta is -1.0; it must be at least 0"),
        ({"patience": 1, "mode": "mix"}, r"mode is 'mix'; did you mean 'min'\?"),
    ],
    ids=str,
)
def test_early_stopping_names_a_wrong_argument(arguments, text):
    with pytest.raises(UserError, match=text):
        EarlyStopping("test/loss", **arguments)


def test_a_plot_has_the_values_of_all_launches(tmp_path, monkeypatch):
    first: list[Any] = []  # the first image of each display
    updates: list[Any] = []
    monkeypatch.setattr("IPython.display.display", lambda image, display_id: first.append(image) or Shown(updates))
    for _ in range(2):
        plot = Plot("train/loss", "test/loss")
        with pytest.raises(FailedError):
            launch(run_of(), tmp_path / "run", hooks=[plot, BreaksAt(5), BreaksAt(9)])
    assert len(first) == 2
    del first[:], updates[:]
    calls, plot = Recorded(), Plot("train/loss", "test/loss")
    launch(run_of(), tmp_path / "run", hooks=[calls, plot])
    drawn = [name for name, _, metrics in calls.calls if name in ("on_log", "on_evaluate") and metrics]
    assert (len(first), len(updates)) == (1, len(drawn) - 1)
    assert updates
    assert len({image.data for image in (*first, *updates)}) == len(drawn)  # each shows more
    (axes,) = plot.figure().axes
    rows = list(read_rows(tmp_path / "run" / "metrics.jsonl"))
    for line, name in zip(axes.lines, plot.metrics, strict=True):
        expected = [(row["step"], row[name]) for row in rows if name in row]
        np.testing.assert_array_equal(np.stack(line.get_data(), 1), expected)
        assert line.get_label() == name


class Shown:
    """A display as IPython gives it, whose drawing can be replaced."""

    def __init__(self, updates: list) -> None:
        self.updates = updates

    def update(self, image) -> None:
        self.updates.append(image)


@pytest.mark.slow
def test_two_processes_stop_early_at_one_step_also_after_a_hook_failed_in_both_or_in_one(tmp_path):
    from tests.multiprocess.conftest import Group, free_port

    shown: list[list[str]] = []
    for breaks, only, workdirs in (
        ("5", [], ["resumed"]),
        ("7", ["--only=1"], ["resumed"]),
        ("0", [], ["resumed", "whole"]),
    ):
        flags = (f"--coordinator=127.0.0.1:{free_port()}", "--processes=2", *only)
        folders = [str(tmp_path / name) for name in workdirs]
        groups = [Group("-m", "tests.hooked", breaks, *folders, *flags, f"--process={i}") for i in range(2)]
        codes = [group.end() for group in groups]
        assert codes == ([0, 0] if breaks == "0" else [1, 1]), groups[0].stderr
        if only:  # the other process names the one that ended both
            assert groups[1].stderr.count("RuntimeError: of the hook") == 1
            failed = f"error: process 1 on {socket.gethostname()} failed: RuntimeError: of the hook; the run ends\n"
            assert groups[0].stderr == failed
            assert Store(tmp_path / "resumed" / "checkpoints", config.Checkpoint()).steps()[-1] in (4, 6)
        shown += [[line for line in group.stdout.splitlines() if line.startswith("step")] for group in groups]
    assert shown[:4] == [[], [], [], []]
    ((resumed, whole), others) = shown[4:]
    assert [resumed, whole] == others
    assert resumed == whole
    assert re.fullmatch(r"step \d+ of 200: [0-9a-f]{64}", whole)
    step = int(whole.split()[1])
    assert 8 <= step < 200
    assert Path(tmp_path, "resumed", "checkpoints", str(step)).is_dir()
