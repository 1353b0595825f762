"""A run is checked once, with the path of every mistake."""

import copy
import dataclasses
import re
from typing import Any

import pytest

from tests.config.nested import FIXED, FREE, NESTED, Inner, NestedTask, changed, differences, setting_of
from tests.tasks import Task, make_run
from trainer import config
from trainer.errors import UserError


def test_resolve_fills_what_none_stands_for():
    run = config.resolve(make_run(30, evaluation=config.Evaluation(), batch_size=24))
    assert run.optimizer.schedule.run_steps == 30
    assert run.evaluation.batch_size == 24


def test_resolve_keeps_what_is_given():
    run = make_run(30, evaluation=config.Evaluation(batch_size=8))
    run.optimizer.schedule.run_steps = 50
    assert config.resolve(run) == run


def test_resolve_does_not_modify_its_argument():
    run = make_run(evaluation=config.Evaluation())
    before = copy.deepcopy(run)
    resolved = config.resolve(run)
    resolved.optimizer.groups["plain"].weight_decay = 1.0
    assert run == before


def test_resolving_twice_changes_nothing():
    assert config.resolve(NESTED) == NESTED


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("total_steps", 0, "is 0; it must be at least 1"),
        ("batch_size", "many", "is 'many'; int is expected"),
        ("seed", -1, "is -1; it must be at least 0"),
        ("microbatches", 1.5, "is 1.5; int is expected"),
        ("optimizer", None, "is None; Optimizer is expected"),
        ("optimizer.name", "adabelif", "is 'adabelif'; did you mean 'adabelief'"),
        ("optimizer.b1", 1.0, "is 1.0; it must be below 1"),
        ("optimizer.b2", 1, "is 1; it must be below 1"),
        ("optimizer.eps", float("nan"), "is nan; a finite number is expected"),
        ("optimizer.schedule.peak", float("inf"), "is inf; a finite number is expected"),
        ("optimizer.schedule.name", "cosin", "is 'cosin'; did you mean 'cosine'"),
        ("optimizer.schedule.unit", "epoch", "is 'epoch'; did you mean 'epochs'"),
        ("optimizer.schedule.warmup", -1, "is -1; it must be at least 0"),
        ("optimizer.schedule.factor", 10, "is 10; it must be at most 1"),
        ("optimizer.schedule.boundaries", (1, "2"), r"is \(1, '2'\); tuple\[float, ...\] is expected"),
        ("optimizer.labels", [(".*", "plain")], "is a list; a setting is a number"),
        ("optimizer.labels", ((".*", 3),), r"is \(.*; tuple\[tuple\[str, str\], ...\] is expected"),
        ("optimizer.groups.decayed.weight_decay", -0.1, "is -0.1; it must be at least 0"),
        ("optimizer.groups.plain.weight_decay", "0", r"is '0'; float is expected"),
        ("loading.threads", 0, "is 0; it must be at least 1"),
        ("evaluation.every_steps", 2.0, r"is 2.0; int \| None is expected"),
        ("checkpoint.best_mode", "largest", "is 'largest'"),
        ("checkpoint.best_metric", "test/loss", "'test/loss' needs an evaluation at every checkpoint"),
        ("parallel.strategy", "pmapp", "is 'pmapp'; did you mean 'pmap'"),
        ("parallel.rules", ((".*", "data"),), "is .* is expected"),
        ("experiment.widths", (1.5,), r"is \(1.5,\); tuple\[int, ...\] is expected"),
        ("experiment.inner.rate", "fast", r"is 'fast'; float | None is expected"),
    ],
)
def test_wrong_value_is_refused_with_the_path_of_its_setting(path, value, message):
    run = changed(make_run(experiment=NestedTask()), path, value)
    with pytest.raises(UserError, match=f"^{path} {message}") as error:
        config.resolve(run)
    assert "\n" not in str(error.value)


def test_wrong_item_of_a_long_tuple_is_always_refused():
    run = changed(make_run(experiment=NestedTask()), "experiment.widths", (*range(10_000), "x"))
    with pytest.raises(UserError, match=r"^experiment\.widths "):
        config.resolve(run)


def test_whole_number_is_accepted_for_a_float():
    assert config.resolve(changed(make_run(), "optimizer.schedule.peak", 1)).optimizer.schedule.peak == 1


def test_batch_that_does_not_divide_into_microbatches_is_refused():
    with pytest.raises(UserError, match="batch_size 16 does not divide into 3 microbatches"):
        config.resolve(make_run(microbatches=3))


def test_best_metric_needs_an_evaluation_at_every_checkpoint():
    run = make_run(
        evaluation=config.Evaluation(every_steps=4),
        checkpoint=config.Checkpoint(every_steps=10, best_metric="test/loss"),
    )
    with pytest.raises(UserError, match=r"checkpoint.every_steps \(10\) must be a multiple of .* \(4\)"):
        config.resolve(run)
    run.checkpoint.every_steps = 12
    assert config.resolve(run).checkpoint.best_metric == "test/loss"


@pytest.mark.parametrize("wrong", [{"total_steps": 3}, None, Task()], ids=["dict", "none", "experiment"])
def test_config_that_is_no_run_is_refused(wrong):
    with pytest.raises(UserError, match=r"get_config\(\) must return a trainer\.config\.Run, not "):
        config.resolve(wrong)


def test_experiment_without_the_protocol_is_refused():
    with pytest.raises(UserError, match="experiment is Inner, which is not a dataclass with init, loss and source"):
        config.resolve(changed(make_run(), "experiment", Inner()))


@pytest.mark.parametrize("path", FIXED + FREE)
def test_path_of_every_setting_is_known(path):
    owner, name, _ = config.setting_at(NESTED, path)
    assert (owner, name) == setting_of(NESTED, path)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("total_step", "config has no field 'total_step'; did you mean 'total_steps'?"),
        ("optimizer.schedul.peak", "config.optimizer has no field 'schedul'; did you mean 'schedule'?"),
        (
            "optimizer.groups.decaid.weight_decay",
            "config.optimizer.groups has no field 'decaid'; did you mean 'decayed'?",
        ),
        ("experiment.inner.nams", "config.experiment.inner has no field 'nams'; did you mean 'names'?"),
        ("seed.x", "config.seed is 0 and has no field 'x'"),
        ("optimizer..name", "config.optimizer has no field ''"),
    ],
)
def test_unknown_path_gets_the_nearest_name(path, message):
    with pytest.raises(UserError) as error:
        config.setting_at(NESTED, path)
    assert str(error.value).startswith(message)


# Schedules for runs of 20 and of 40 steps, and whether they differ.
LONGER = {
    "constant": (config.Schedule("constant"), False),
    "warm-up": (config.Schedule("constant", warmup=5), False),
    "warm-up-in-percent": (config.Schedule("constant", warmup=5, unit="percent"), True),
    "percent-of-nothing": (config.Schedule("constant", unit="percent"), False),
    "inverse_sqrt": (config.Schedule("inverse_sqrt", warmup=5), False),
    "inverse_sqrt-in-percent": (config.Schedule("inverse_sqrt", warmup=5, unit="percent"), True),
    "step": (config.Schedule("step", boundaries=(10,)), False),
    "step-in-epochs": (config.Schedule("step", boundaries=(1.5,), unit="epochs"), False),
    "step-in-percent": (config.Schedule("step", boundaries=(50,), unit="percent"), True),
    "linear-to-the-end": (config.Schedule("linear"), True),
    "linear-to-an-end": (config.Schedule("linear", end=20), False),
    "cosine-to-the-end": (config.Schedule("cosine", warmup=1, unit="epochs"), True),
    "cosine-to-an-end": (config.Schedule("cosine", warmup=1, end=8, unit="epochs"), False),
    "cosine-in-percent": (config.Schedule("cosine", end=90, unit="percent"), True),
    "polynomial-to-the-end": (config.Schedule("polynomial", power=2), True),
    "polynomial-to-an-end": (config.Schedule("polynomial", power=2, end=30), False),
    "wsd-to-the-end": (config.Schedule("wsd", descent=5), True),
    "wsd-to-an-end": (config.Schedule("wsd", descent=80, end=320, unit="examples"), False),
    "made-for-30": (config.Schedule("cosine", final=1e-4, warmup=10, unit="percent", run_steps=30), False),
}


@pytest.mark.parametrize(("schedule", "differs"), LONGER.values(), ids=LONGER)
def test_more_steps_are_another_run_only_when_the_schedule_follows_them(schedule, differs):
    kept, asked = (config.resolve(make_run(steps, optimizer=config.Optimizer(schedule=schedule))) for steps in (20, 40))
    assert differences(config.to_json(kept), asked) == ["optimizer.schedule.run_steps was 20, is 40"] * differs


@pytest.mark.parametrize(("schedule", "differs"), LONGER.values(), ids=LONGER)
def test_length_of_the_run_is_written_down_when_the_schedule_follows_it(schedule, differs):
    resolved = config.resolve(make_run(20, optimizer=config.Optimizer(schedule=schedule))).optimizer.schedule
    assert resolved == dataclasses.replace(schedule, run_steps=20 if differs else schedule.run_steps)


PER_EXAMPLE = " (in steps: 0.0625 per example)"
CUT_SHORT = "; to try a few steps of a run give --until, or set optimizer.schedule.run_steps to its full length"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"name": "cosine", "boundaries": (10,)},
            "boundaries is (10,), which a schedule named 'cosine' does not use (used by step)",
        ),
        (
            {"name": "linear", "factor": 0.5},
            "factor is 0.5, which a schedule named 'linear' does not use (used by step)",
        ),
        (
            {"name": "polynomial", "descent": 5},
            "descent is 5, which a schedule named 'polynomial' does not use (used by wsd)",
        ),
        (
            {"name": "cosine", "power": 2.0},
            "power is 2.0, which a schedule named 'cosine' does not use (used by polynomial)",
        ),
        (
            {"name": "constant", "final": 0.1},
            "final is 0.1, which a schedule named 'constant' does not use (used by linear, cosine, polynomial, wsd)",
        ),
        (
            {"name": "inverse_sqrt", "end": 10},
            "end is 10, which a schedule named 'inverse_sqrt' does not use (used by linear, cosine, polynomial, wsd)",
        ),
        ({"name": "step"}, "boundaries is empty; a step schedule needs the steps after which it steps down"),
        ({"name": "wsd", "unit": "epochs"}, "descent is None; a wsd schedule needs the epochs of its descent"),
        ({"name": "polynomial", "power": 0}, "power is 0; it must be above 0"),
        ({"name": "cosine", "final": 0.5}, "final is 0.5; a cosine descent ends at or below its peak, 0.3"),
        ({"name": "wsd", "final": 0.5, "descent": 1}, "final is 0.5; a wsd descent ends at or below its peak, 0.3"),
        ({"name": "linear", "warmup": 2.5}, "warmup has 2.5 steps; a whole number is expected"),
        ({"name": "linear", "end": 99.5, "unit": "examples"}, "end has 99.5 examples; a whole number is expected"),
        ({"name": "step", "boundaries": (5, 7.5)}, "boundaries has 7.5 steps; a whole number is expected"),
        ({"name": "linear", "end": 101, "unit": "percent"}, "end is 101 percent; a run has at most 100 percent"),
        (
            {"name": "step", "boundaries": (50, 150), "unit": "percent"},
            "boundaries is 150 percent; a run has at most 100 percent",
        ),
        ({"name": "linear", "warmup": 20}, f"warmup is 20 steps, but the whole schedule has only 20 steps{CUT_SHORT}"),
        (
            {"name": "constant", "warmup": 20},
            f"warmup is 20 steps, but the whole schedule has only 20 steps{CUT_SHORT}",
        ),
        (
            {"name": "cosine", "warmup": 320, "unit": "examples"},
            f"warmup is 320 examples, but the whole schedule has only 20 steps{PER_EXAMPLE}{CUT_SHORT}",
        ),
        (
            {"name": "cosine", "warmup": 100, "unit": "percent"},
            f"warmup is 100 percent, but the whole schedule has only 20 steps (in steps: 0.2 per percent){CUT_SHORT}",
        ),
        (
            {"name": "cosine", "warmup": 2, "end": 1.5, "unit": "epochs"},
            "warmup is 2 epochs, but the whole schedule has only 1.5 epochs",
        ),
        (
            {"name": "wsd", "warmup": 6, "descent": 15},
            f"descent is 15 steps, but the warm-up leaves only 14 of 20 steps{CUT_SHORT}",
        ),
        (
            {"name": "wsd", "warmup": 51, "descent": 51, "unit": "percent"},  # 10.2 steps each, which fit once rounded
            f"descent is 51 percent, but the warm-up leaves only 10 of 20 steps (in steps: 0.2 per percent){CUT_SHORT}",
        ),
        (
            {"name": "wsd", "warmup": 1, "descent": 2, "end": 2.5, "unit": "epochs"},
            "descent is 2 epochs, but the warm-up leaves only 1.5 of 2.5 epochs",
        ),
        (
            {"name": "step", "boundaries": (10, 10)},
            "boundaries is (10, 10) steps; they must ascend, the first above the warm-up (0 steps)",
        ),
        (
            {"name": "step", "boundaries": (2, 1), "unit": "epochs"},
            "boundaries is (2, 1) epochs; they must ascend, the first above the warm-up (0 epochs)",
        ),
        (
            {"name": "step", "boundaries": (0, 10)},
            "boundaries is (0, 10) steps; they must ascend, the first above the warm-up (0 steps)",
        ),
        (
            {"name": "step", "boundaries": (-1,)},
            "boundaries is (-1,) steps; they must ascend, the first above the warm-up (0 steps)",
        ),
        (
            {"name": "step", "boundaries": (5,), "warmup": 5},
            "boundaries is (5,) steps; they must ascend, the first above the warm-up (5 steps)",
        ),
        (
            {"name": "step", "boundaries": (5, 20)},
            f"boundaries is (5, 20) steps, but the run has only 20 steps{CUT_SHORT}",
        ),
        (
            {"name": "step", "boundaries": (50, 100), "unit": "percent"},
            f"boundaries is (50, 100) percent, but the run has only 20 steps (in steps: 0.2 per percent){CUT_SHORT}",
        ),
    ],
)
def test_schedule_that_contradicts_itself_is_refused_in_one_line(settings, message):
    run = make_run(20, optimizer=config.Optimizer(schedule=config.Schedule(**{"peak": 0.3} | settings)))
    with pytest.raises(UserError) as error:
        config.resolve(run)
    assert str(error.value) == f"optimizer.schedule.{message}"


@pytest.mark.parametrize(
    ("every", "unit", "message"),
    [
        (150, "percent", "is 150 percent; a run has at most 100 percent"),
        (2, "percent", "has 2 percent, which rounds to 0 steps (in steps: 0.2 per percent)"),
        (24.5, "examples", "has 24.5 examples; a whole number is expected"),
        (8, "examples", f"has 8 examples, which rounds to 0 steps{PER_EXAMPLE}"),
        (0.1, "epochs", "has 0.1 epochs, which rounds to 0 steps (in steps: 3.125 per epoch)"),
    ],
)
def test_interval_of_an_evaluation_is_refused_where_a_schedule_refuses_such_a_time(every, unit, message):
    evaluation, main = config.Evaluation(every=every, unit=unit), config.Evaluation()
    schedule = config.Schedule(warmup=every, unit=unit)
    named, own = make_run(20, evaluations={"often": evaluation}), make_run(20, evaluation=evaluation)
    for call, path in (
        (lambda: config.evaluations_in_steps(named, 50), "evaluations.often.every"),
        (lambda: config.evaluations_in_steps(own, 50), "evaluation.every"),
        (lambda: config.schedule_in_steps(schedule, "schedule", make_run(20, evaluation=main), 50), "schedule.warmup"),
    ):
        with pytest.raises(UserError) as error:
            call()
        assert str(error.value) == f"{path} {message}"


@pytest.mark.parametrize(
    ("every", "unit", "steps"),
    [(1, "epochs", 3), (2, "epochs", 6), (0.3, "epochs", 1), (40, "examples", 2), (100, "percent", 20)],
)
def test_interval_of_an_evaluation_is_rounded_to_whole_steps_once(every, unit, steps):
    run = make_run(20, evaluation=config.Evaluation(every=every, unit=unit))  # 3.125 steps an epoch
    assert config.evaluations_in_steps(run, 50)["test"].every_steps == steps


@pytest.mark.parametrize("name", ["schedule", "decay_schedule"])
def test_schedule_of_a_group_is_resolved(name):
    path = f"optimizer.groups.plain.{name}"
    resolved = config.resolve(changed(make_run(20), path, config.Schedule("cosine")))
    assert resolved == changed(config.resolve(make_run(20)), path, config.Schedule("cosine", run_steps=20))


@pytest.mark.parametrize("name", ["schedule", "decay_schedule"])
@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (config.Schedule("cosine", warmup=30), "warmup is 30 steps, but the whole schedule has only 20 steps"),
        (config.Schedule("constant", end=30), "end is 30, which a schedule named 'constant' does not use"),
        (config.Schedule("constant", peak=-1.0), "peak is -1.0; it must be at least 0"),
        (config.Schedule("cosin"), "name is 'cosin'; did you mean 'cosine'"),
    ],
)
def test_wrong_schedule_of_a_group_is_refused_with_its_path(name, schedule, message):
    path = f"optimizer.groups.plain.{name}"
    with pytest.raises(UserError, match=f"^{path}.{message}"):
        config.resolve(changed(make_run(20), path, schedule))


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "wsd", "warmup": 5, "descent": 15},
        {"name": "wsd", "warmup": 0.1, "descent": 0.2, "end": 0.3, "unit": "epochs"},  # 0.1 + 0.2 > 0.3 in floats
        {"name": "wsd", "warmup": 33.3, "descent": 66.7, "unit": "percent"},
        {"name": "linear", "final": 0.3},
        {"name": "cosine", "end": 100, "unit": "percent"},
        {"name": "cosine", "end": 50, "warmup": 30},
        {"name": "constant", "warmup": 30, "run_steps": 40},
        {"name": "step", "boundaries": (10, 30), "run_steps": 40},
        {"name": "step", "boundaries": (5, 300), "unit": "epochs"},  # how many the run has is not known yet
    ],
    ids=str,
)
def test_schedule_at_the_edge_of_what_fits_is_accepted(settings):
    config.resolve(make_run(20, optimizer=config.Optimizer(schedule=config.Schedule(**{"peak": 0.3} | settings))))


DESCENTS: dict[str, dict[str, Any]] = {
    "linear": {},
    "cosine": {"warmup": 2},
    "polynomial": {"power": 2.0},
    "wsd": {"descent": 5},
}


def longer(schedule: config.Schedule, path: str = "optimizer.schedule") -> config.Run:
    """A run of 20 steps with a schedule at a path."""
    return changed(
        make_run(20, optimizer=dataclasses.replace(make_run().optimizer, schedule=config.Schedule())), path, schedule
    )


@pytest.mark.parametrize("path", ["optimizer.schedule", "optimizer.groups.plain.schedule"])
@pytest.mark.parametrize("name", DESCENTS)
def test_learning_rate_that_is_0_for_the_rest_of_the_run_is_refused_with_the_ways_out(name, path):
    with pytest.raises(UserError) as error:
        config.resolve(longer(config.Schedule(name, run_steps=12, **DESCENTS[name]), path))
    assert str(error.value) == (
        f"{path} is 0 from step 13 to the last step, 20, because its run_steps is 12: to stretch the {name} over all "
        "steps, choose a new --workdir and leave run_steps out; to keep run_steps, set a final above 0; or, if 0 is "
        "meant, set the end at which it is reached"
    )


@pytest.mark.parametrize(
    "settings",
    [{"final": 1e-6}, {"end": 12}, {"peak": 0.0}, {"run_steps": 20}, {"run_steps": 30}],
    ids=["final", "end", "peak-0", "whole", "cut-short"],
)
@pytest.mark.parametrize("name", DESCENTS)
def test_learning_rate_of_0_that_is_asked_for_is_accepted(name, settings):
    config.resolve(longer(config.Schedule(name, **{"run_steps": 12} | DESCENTS[name] | settings)))


def test_weight_decay_may_be_0_for_the_rest_of_the_run():
    config.resolve(longer(config.Schedule("cosine", run_steps=12), "optimizer.groups.plain.decay_schedule"))


def optimizer_with(**fields: Any) -> config.Run:
    return make_run(optimizer=dataclasses.replace(make_run().optimizer, **fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eps": 1e-40}, "optimizer.eps is 1e-40, which is 0 in float32"),
        ({"eps_root": 1e-40}, "optimizer.eps_root is 1e-40, which is 0 in float32"),
        ({"eps": 0.0, "eps_root": 0.0}, "optimizer.eps and optimizer.eps_root are both 0: "),
        ({"rectify": True, "amsgrad": True}, "optimizer.rectify and optimizer.amsgrad cannot be combined"),
        ({"sgd_fallback": False}, "optimizer.sgd_fallback is False, which has an effect only if optimizer.rectify"),
        ({"rectify": True, "name": "adam"}, "optimizer.rectify works with adabelief only, but the run uses adam"),
        ({"mu_dtype": "float16"}, "optimizer.mu_dtype is 'float16'"),
        ({"clip_norm": 0.0}, "optimizer.clip_norm is 0.0; it must be above 0"),
        ({"ema_decay": 1.0}, "optimizer.ema_decay is 1.0; it must be below 1"),
    ],
)
def test_optimizer_settings_that_contradict_each_other_are_refused(fields, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        config.resolve(optimizer_with(**fields))


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (
            config.Group(frozen=True, clip_norm=1.0),
            "optimizer.groups.plain is frozen, so its clip_norm, 1.0, does nothing",
        ),
        (
            config.Group(weight_decay=0.1, decay_schedule=config.Schedule()),
            "optimizer.groups.plain has a weight_decay and a decay_schedule; give one of them",
        ),
        (
            config.Group(optimizer="sgd", nu_dtype="bfloat16"),
            "optimizer.groups.plain has a nu_dtype, but sgd has no second moment",
        ),
        (
            config.Group(clip_norm=0.0),
            "optimizer.groups.plain.clip_norm is 0.0; it must be above 0",
        ),
        (config.Group(every_steps=0), "optimizer.groups.plain.every_steps is 0; it must be at least 1"),
    ],
)
def test_group_settings_that_contradict_each_other_are_refused(group, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        config.resolve(optimizer_with(groups={"decayed": config.Group(), "plain": group}))


def test_amsgrad_of_a_group_with_another_optimizer_is_refused():
    groups = {"decayed": config.Group(), "plain": config.Group(optimizer="sgd")}
    with pytest.raises(UserError, match=r"^optimizer\.amsgrad works with adabelief only, but the run uses sgd"):
        config.resolve(optimizer_with(amsgrad=True, groups=groups))


def test_a_run_in_which_nothing_is_trained_is_refused():
    groups = {"decayed": config.Group(frozen=True), "plain": config.Group(frozen=True)}
    with pytest.raises(UserError, match=r"^every group of optimizer\.groups is frozen"):
        config.resolve(optimizer_with(groups=groups))
