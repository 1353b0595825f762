"""Training as one call: resuming, diverging, refusing."""

import dataclasses
import json
import os
import signal
from io import StringIO
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests.launched import StopsAt, launch
from tests.tasks import Task, make_run
from trainer import config
from trainer.checkpoint import Store
from trainer.compilation import AheadCompiled
from trainer.data.order import Order
from trainer.distributed import Interrupted
from trainer.errors import DivergedError, UserError
from trainer.loop import train
from trainer.metrics import Mean
from trainer.observe.progress import Progress
from trainer.params import ParamTable
from trainer.workdir import Workdir

TASK = Task(dropout=0.5, noise=0.3)


def quietly(run: config.Run, workdir: Path, **options: Any):
    """The final state of a run, and what it showed."""
    shown = StringIO()
    return launch(run, workdir, Progress(run.total_steps, shown), **options), shown.getvalue()


def rows(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def settings(**changes):
    return {
        "experiment": TASK,
        "parallel": config.Parallel(devices=2),
        "checkpoint": config.Checkpoint(every_steps=5),
        "optimizer": dataclasses.replace(make_run().optimizer, schedule=config.Schedule(peak=1e-2)),
    } | changes


# Settings of groups that a resumed run could get wrong.
EVERYTHING = {
    "decayed": config.Group(weight_decay=0.1, mu_dtype="bfloat16", nu_dtype="bfloat16", clip_norm=1.0),
    "plain": config.Group(every_steps=3, optimizer="adam", decay_schedule=config.Schedule("inverse_sqrt", peak=0.1)),
}


@pytest.mark.parametrize("strategy", ["data", "pmap"])
def test_ten_and_ten_steps_are_twenty_to_the_bit(strategy, tmp_path):
    parallel = config.Parallel(strategy, devices=2)
    optimizer = dataclasses.replace(settings()["optimizer"], groups=EVERYTHING)
    whole, _ = quietly(make_run(20, **settings(parallel=parallel, optimizer=optimizer)), tmp_path / "whole")
    quietly(make_run(10, **settings(parallel=parallel, optimizer=optimizer)), tmp_path / "parts")
    parts, shown = quietly(make_run(20, **settings(parallel=parallel, optimizer=optimizer)), tmp_path / "parts")
    assert "resumed from step 10" in shown
    assert_equal(parts, whole)
    # The first launch evaluated at its own end; all else is the same.
    training = [[row for row in rows(tmp_path / d) if "train/loss" in row] for d in ("whole", "parts")]
    assert training[0] == training[1]
    assert [row["step"] for row in training[0]] == list(range(1, 21))


def test_either_strategy_resumes_the_other(tmp_path):
    task = dataclasses.replace(TASK, dropout=0.0)
    finals = {}
    for first, second in (("data", "data"), ("data", "pmap"), ("pmap", "data")):
        for hooks, strategy in (([StopsAt(5)], first), ([], second)):
            run = make_run(10, **settings(experiment=task, parallel=config.Parallel(strategy, devices=2)))
            state, shown = quietly(run, tmp_path / f"{first}-{second}", hooks=hooks)
            assert int(state.step) == (5 if hooks else 10)
        assert "resumed from step 5" in shown
        finals[first, second] = state
    for mixed in (("data", "pmap"), ("pmap", "data")):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), finals[mixed], finals["data", "data"]
        )


def test_a_finished_run_is_left_as_it_is(tmp_path):
    run = make_run(2, **settings())
    first, _ = quietly(run, tmp_path / "run")
    before = {p: p.read_bytes() for p in (tmp_path / "run").glob("*.json*")}
    again, shown = quietly(run, tmp_path / "run")
    assert "nothing is left to do" in shown
    assert_equal(first, again)
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").glob("*.json*")}


@pytest.mark.parametrize("strategy", ["data", "pmap"])
def test_an_infinite_loss_stops_the_run_and_names_its_step(strategy, tmp_path):
    bad = int(Order(200, 0)(np.arange(9 * 16, 10 * 16)).min())  # in the tenth batch
    task = dataclasses.replace(TASK, examples=200, explode_at=bad)
    run = make_run(20, **settings(experiment=task, parallel=config.Parallel(strategy, devices=2)))
    with pytest.raises(
        DivergedError, match="loss of step 10 is inf; the run is stopped, the last checkpoint is that of"
    ) as e:
        quietly(run, tmp_path / "run")
    assert f"recomputed, the loss is inf again; python -m trainer replay {tmp_path}/run/diverged/10" in str(e.value)
    about = json.loads((tmp_path / "run" / "diverged" / "10" / "step.json").read_text())
    assert bad in about["ids"]
    assert (about["step"], about["has_state"]) == (10, True)
    store = Store(tmp_path / "run" / "checkpoints", run.checkpoint)
    assert "--config.numerics.on_nonfinite=skip would drop such updates" in str(e.value)
    assert store.steps() == [5]  # step 10 was due to be saved, and was not
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, 10))
    assert store.metadata(5).step == 5


def test_a_state_that_is_not_finite_is_never_saved(tmp_path):
    # Loss and gradient of the first step are finite; the step itself leaves float32.
    groups = {"decayed": config.Group(weight_decay=1e3), "plain": config.Group()}
    optimizer = dataclasses.replace(make_run().optimizer, groups=groups, schedule=config.Schedule(peak=3e38))
    run = make_run(3, **settings(optimizer=optimizer, checkpoint=config.Checkpoint(every_steps=1)))
    with pytest.raises(DivergedError, match="state after step 1 holds NaN or Inf") as error:
        quietly(run, tmp_path / "run")
    assert "on_nonfinite" not in str(error.value)  # which looks at loss and gradient only
    assert Store(tmp_path / "run" / "checkpoints", run.checkpoint).steps() == []


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_step_in_hand(signum, tmp_path):
    run = make_run(20, **settings())

    class Signalling(Progress):
        def update(self, step, loss, examples_per_second, seconds_left):
            if step == 12:
                os.kill(os.getpid(), signum)

    with pytest.raises(Interrupted, match=signal.Signals(signum).name) as stopped:
        launch(run, tmp_path / "run", Signalling(run.total_steps, StringIO()))
    step = Store(tmp_path / "run" / "checkpoints", run.checkpoint).steps()[-1]
    assert f"step {step}," in str(stopped.value)
    assert 12 <= step <= 16
    assert stopped.value.signum == signum
    whole, _ = quietly(run, tmp_path / "whole")
    resumed, _ = quietly(run, tmp_path / "run")
    assert_equal(resumed, whole)
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


def test_only_one_process_trains_in_a_workdir(tmp_path):
    run = make_run(2, **settings())
    quietly(run, tmp_path / "run")
    with Workdir(tmp_path / "run").locked(), pytest.raises(UserError, match="another process is training"):
        quietly(run, tmp_path / "run")


def test_another_configs_workdir_is_refused_and_left_alone(tmp_path):
    quietly(make_run(2, **settings()), tmp_path / "run")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(UserError, match="batch_size was 16, is 32; choose another --workdir"):
        quietly(make_run(2, **settings(batch_size=32)), tmp_path / "run")
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}


def test_code_that_changed_the_parameters_is_noticed(tmp_path, monkeypatch):
    quietly(make_run(2, **settings()), tmp_path / "run")
    monkeypatch.setattr("trainer.program.param_table", lambda params, labels, *a: ParamTable((), config.Optimizer()))
    with pytest.raises(UserError, match="other settings: dense/kernel is no parameter any more"):
        train(make_run(4, **settings()), tmp_path / "run", verbose=False)


@dataclasses.dataclass
class Misbehaving(Task):
    """A task whose loss or source is not what the protocol says."""

    what: str = ""

    def loss(self, variables, batch, *, key, train):
        metrics, collections = super().loss(variables, batch, key=key, train=train)
        loss = metrics["loss"]
        wrong: dict[str, Any] = {
            "plain loss": ({"loss": loss.total / loss.weight}, collections),
            "vector": ({"loss": Mean(batch["mask"], batch["mask"])}, collections),
            "no loss": ({"nll": loss}, collections),
            "metrics only": metrics,
        }
        return wrong.get(self.what, (metrics, collections))

    def source(self, split) -> Any:
        wrong: dict[str, Any] = {
            "generator": (row for row in [{}]),
            "empty": [],
            "tuples": [(np.zeros(8, np.float32), 0)] * 20,
            "ragged": [{"x": np.zeros(8 + (i > 4), np.float32), "label": 0} for i in range(20)],
        }
        if self.what == "no split":
            return {"train": None}[split + "?"]
        return wrong.get(self.what) if self.what in wrong else super().source(split)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("plain loss", r"metric 'loss' must be a Mean, such as Mean.of\(losses, batch\['mask'\]\)"),
        ("vector", r"metric 'loss' must hold two scalars; its total and weight have shapes \(16,\), \(16,\)"),
        ("no loss", r"a metric named 'loss', not only \['nll'\]"),
        ("metrics only", r"must return a pair of mappings, \(metrics, collections\)"),
        ("generator", r"Misbehaving.source\('train'\) is a generator, which has no length"),
        ("empty", r"Misbehaving.source\('train'\) has no example"),
        ("tuples", "holds examples of type tuple; a mapping from names is expected"),
        ("ragged", r"entry 'x' of the data has examples of different shapes: \(8,\), \(9,\)"),
        ("no split", r"Misbehaving.source\('train'\): KeyError: 'train\?'; is there such a split\?"),
    ],
)
def test_an_experiment_that_breaks_the_protocol_is_told_how(what, message, tmp_path):
    with pytest.raises(UserError, match=message):
        quietly(make_run(5, experiment=Misbehaving(what=what)), tmp_path / "run")


def test_a_launch_that_died_before_its_first_checkpoint_can_be_launched_again_with_other_settings(tmp_path):
    folder = Workdir(tmp_path / "run")
    with folder.locked():
        folder.write(config.resolve(make_run(2, **settings())), "")
    folder.checkpoints.mkdir()
    (folder.checkpoints / "2.orbax-checkpoint-tmp").mkdir()
    state, _ = quietly(make_run(2, **settings(batch_size=32)), tmp_path / "run")
    assert int(state.step) == 2
    kept = folder.stored_run()
    assert kept is not None
    assert kept.batch_size == 32


def test_more_steps_than_a_schedule_was_made_for_are_refused_with_the_way_out(tmp_path):
    descent = dataclasses.replace(make_run().optimizer.schedule, final=1e-3)  # linear, over the whole run
    optimizer = dataclasses.replace(make_run().optimizer, schedule=descent)
    quietly(make_run(4, **settings(optimizer=optimizer)), tmp_path / "run")
    with pytest.raises(UserError, match=r"total_steps was 4, is 6; .*run_steps was 4, is 6 .*run_steps=4 keeps"):
        quietly(make_run(6, **settings(optimizer=optimizer)), tmp_path / "run")
    schedule = dataclasses.replace(descent, run_steps=4)
    longer = make_run(6, **settings(optimizer=dataclasses.replace(optimizer, schedule=schedule)))
    assert int(quietly(longer, tmp_path / "run")[0].step) == 6
    rates = [row["train/learning_rate"] for row in rows(tmp_path / "run") if "train/loss" in row]
    assert rates[4:] == [np.float32(1e-3).item()] * 2


def test_more_steps_that_would_be_made_at_a_learning_rate_of_0_are_refused(tmp_path):
    optimizer = make_run().optimizer  # a linear descent to 0 over the whole run
    quietly(make_run(4, **settings(optimizer=optimizer)), tmp_path / "run")
    with pytest.raises(UserError, match=r"run_steps was 4, is 6 .*cannot be kept: optimizer.schedule is 0 from step 5"):
        quietly(make_run(6, **settings(optimizer=optimizer)), tmp_path / "run")
    schedule = dataclasses.replace(optimizer.schedule, run_steps=4)
    longer = make_run(6, **settings(optimizer=dataclasses.replace(optimizer, schedule=schedule)))
    with pytest.raises(UserError, match=r"^optimizer.schedule is 0 from step 5 to the last step, 6"):
        quietly(longer, tmp_path / "run")


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((3, 2), "the profile is to begin with step 3, but to end with step 2 before it"),
        ((1, 5), "the profile is to end with step 5, the run ends with 4"),
        ((0, 2), "the profile is to begin with step 0, the run goes on after step 0"),
    ],
)
def test_steps_that_cannot_be_profiled_are_refused(steps, message, tmp_path):
    with pytest.raises(UserError, match=message):
        launch(make_run(4), tmp_path / "run", profile=steps)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "run" / ".lock").mkdir(parents=True)  # so that opening it fails for root as well
    with pytest.raises(UserError, match=f"nothing can be written in workdir {tmp_path}/run: Is a directory"):
        quietly(make_run(4, **settings()), tmp_path / "run")


def test_an_evaluation_is_compiled_once_the_first_step_is_made(monkeypatch, tmp_path):
    """They would compete for the cores of the host."""
    compile_step, written = AheadCompiled.compile, {}

    def note(step):
        written[step] = len(rows(tmp_path)) if (tmp_path / "metrics.jsonl").exists() else 0
        compile_step(step)

    monkeypatch.setattr(AheadCompiled, "compile", note)
    train(make_run(3, experiment=TASK), tmp_path, verbose=False)
    train_step, eval_step = written.values()
    assert train_step == 0
    assert eval_step >= 1
