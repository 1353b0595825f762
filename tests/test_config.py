"""A run's description: checked once with the path of every mistake, kept as JSON, and compared when it is resumed."""

import copy
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.tasks import Task, make_run
from trainer import config
from trainer.errors import UserError


@dataclasses.dataclass
class Inner:
    rate: float | None = None
    names: tuple[str, ...] = ("a", "b")


@dataclasses.dataclass
class NestedTask(Task):
    """A task whose own settings are tuples, dicts and dataclasses."""

    widths: tuple[int, ...] = (16, 32)
    axes: tuple[tuple[str | None, ...], ...] = ((None, "data"), ())
    table: dict[str, tuple[float, ...]] = dataclasses.field(default_factory=lambda: {"x/y": (0.5,), "z": ()})
    inner: Inner = dataclasses.field(default_factory=Inner)
    label: str = "Käse\n"
    data_dir: str = config.setting("", may_change=True)


def setting_of(run: config.Run, path: str) -> tuple[Any, str]:
    """The owner and the name of the field at a path."""
    *owners, name = path.split(".")
    node: Any = run
    for owner in owners:
        node = node[owner] if isinstance(node, dict) else getattr(node, owner)
    return node, name


def changed(run: config.Run, path: str, value: Any) -> config.Run:
    run = copy.deepcopy(run)
    owner, name = setting_of(run, path)
    setattr(owner, name, value)
    return run


def settings(node: Any, prefix: str = "", may_change: bool = False) -> Iterator[tuple[str, bool]]:
    """(path, may change) of every setting that holds no other settings."""
    for field in dataclasses.fields(node):
        value, path = getattr(node, field.name), prefix + field.name
        free = may_change or field.metadata.get("may_change", False)
        children = value.items() if isinstance(value, dict) else [("", value)]
        groups = [(name, child) for name, child in children if dataclasses.is_dataclass(child)]
        if not groups:
            yield path, free
        for name, child in groups:
            yield from settings(child, f"{path}.{name}." if name else f"{path}.", free)


NESTED = config.resolve(make_run(experiment=NestedTask(inner=Inner(rate=0.1))))
FIXED = [path for path, free in settings(NESTED) if not free]
FREE = [path for path, free in settings(NESTED) if free]


def another(value: Any) -> Any:
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case str():
            return value + "x"
        case tuple():
            return (*value, "x")
        case dict():
            return value | {"x": ()}
    raise AssertionError(value)


@pytest.mark.parametrize(
    "run",
    [make_run(), NESTED, make_run(experiment=NestedTask(widths=(), inner=Inner(names=())))],
    ids=["small", "resolved", "empty-tuples"],
)
def test_json_round_trip_is_identity(run):
    assert config.from_json(config.to_json(run)) == run


@pytest.mark.parametrize("path", FIXED + FREE)
def test_json_keeps_every_setting(path):
    run = changed(NESTED, path, another(getattr(*setting_of(NESTED, path))))
    assert json.loads(config.to_json(run)) != json.loads(config.to_json(NESTED))


def test_setting_that_is_not_in_the_json_takes_its_default():
    kept = json.loads(config.to_json(NESTED))
    del kept["loading"], kept["experiment"]["widths"]
    assert config.from_json(json.dumps(kept)) == NESTED


def test_experiment_defined_inside_a_function_is_refused_in_one_line():
    @dataclasses.dataclass
    class Hidden(Task):
        pass

    with pytest.raises(UserError, match="experiment is a Hidden defined where it cannot be imported again") as error:
        config.to_json(make_run(experiment=Hidden()))
    assert "\n" not in str(error.value)


def test_value_that_json_cannot_hold_is_named():
    with pytest.raises(UserError, match=r"^experiment\.inner\.rate is a complex; a setting is a number"):
        config.to_json(changed(NESTED, "experiment.inner.rate", 1j))


@pytest.mark.parametrize(
    ("path", "unknown", "known"),
    [
        ((), "batchsize", "batch_size"),
        (("optimizer",), "labls", "labels"),
        (("optimizer", "groups", "plain"), "decay", "weight_decay"),
        (("experiment", "inner"), "rates", "rate"),
    ],
)
def test_unknown_field_in_json_gets_the_nearest_name(path, unknown, known):
    kept = json.loads(config.to_json(NESTED))
    node = kept
    for name in path:
        node = node[name]
    node[unknown] = node.pop(known)
    with pytest.raises(UserError, match=f"has no field '{unknown}' any more; did you mean '{known}'"):
        config.from_json(json.dumps(kept))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("tests.test_config:Inner", "tests.test_config:Gone", "tests.test_config:Gone is not a dataclass any more"),
        ("tests.test_config:Inner", "tests.test_config:copy", "tests.test_config:copy is not a dataclass any more"),
        ("tests.test_config:Inner", "tests.gone:Inner", "Inner: module 'tests.gone' cannot be imported"),
        ('"seed": 0', '"seed": -1', "seed is -1; it must be at least 0"),
        ('"seed": 0', '"seed": "0"', "seed is '0'; int is expected"),
        ("{", "", "it is not a run as `to_json` writes it"),
    ],
)
def test_json_that_is_no_run_any_more_is_refused_in_one_line(old, new, message):
    with pytest.raises(UserError, match=message) as error:
        config.from_json(config.to_json(NESTED).replace(old, new, 1))
    assert "\n" not in str(error.value)


def test_json_without_a_required_setting_is_refused():
    kept = json.loads(config.to_json(NESTED))
    del kept["total_steps"]
    with pytest.raises(UserError, match="total_steps"):
        config.from_json(json.dumps(kept))


def test_label_may_have_any_name():
    run = make_run()
    run.optimizer.labels = ((r".*/kernel", "class"), (".*", "plain"))
    run.optimizer.groups = {"class": config.Group(0.1), "plain": config.Group()}
    assert config.from_json(config.to_json(run)) == run


def test_resolve_fills_what_zero_stands_for():
    run = config.resolve(make_run(30, evaluation=config.Evaluation(batch_size=0), batch_size=24))
    assert run.optimizer.schedule.decay_steps == 30
    assert run.evaluation.batch_size == 24


def test_resolve_keeps_what_is_given():
    run = make_run(30, evaluation=config.Evaluation(batch_size=8))
    run.optimizer.schedule.decay_steps = 50
    assert config.resolve(run) == run


def test_resolve_leaves_decay_steps_of_a_constant_schedule_alone():
    run = make_run(30)
    run.optimizer.schedule = config.Schedule("constant")
    assert config.resolve(run).optimizer.schedule.decay_steps == 0


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
        ("optimizer.schedule.warmup_steps", 20, "is 20, but the whole schedule has only 20 steps"),
        ("optimizer.labels", [(".*", "plain")], "is a list; a setting is a number"),
        ("optimizer.labels", ((".*", 3),), r"is \(.*; tuple\[tuple\[str, str\], ...\] is expected"),
        ("optimizer.groups.decayed.weight_decay", -0.1, "is -0.1; it must be at least 0"),
        ("optimizer.groups.plain.weight_decay", "0", "is '0'; float is expected"),
        ("loading.threads", 0, "is 0; it must be at least 1"),
        ("evaluation.every_steps", 2.0, "is 2.0; int is expected"),
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
    config.check_path(NESTED, path)


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
        config.check_path(NESTED, path)
    assert str(error.value).startswith(message)


def test_run_does_not_differ_from_its_copy():
    assert config.differences(NESTED, copy.deepcopy(NESTED)) == []


@pytest.mark.parametrize("path", FIXED)
def test_setting_that_makes_the_run_is_named_when_it_changes(path):
    found = config.differences(NESTED, changed(NESTED, path, another(getattr(*setting_of(NESTED, path)))))
    assert [text.split(" was ")[0] for text in found] == [path]


@pytest.mark.parametrize("path", FREE)
def test_setting_that_may_change_makes_no_difference(path):
    assert config.differences(NESTED, changed(NESTED, path, another(getattr(*setting_of(NESTED, path))))) == []


def test_every_changed_setting_is_named_with_both_values():
    run = changed(changed(changed(NESTED, "seed", 1), "optimizer.b1", 0.5), "logging.every_steps", 7)
    assert config.differences(NESTED, run) == ["seed was 0, is 1", "optimizer.b1 was 0.9, is 0.5"]


def test_other_groups_and_another_experiment_are_differences():
    groups = changed(NESTED, "optimizer.groups", {"plain": config.Group()})
    assert [text.split(" was ")[0] for text in config.differences(NESTED, groups)] == ["optimizer.groups"]
    assert config.differences(NESTED, changed(NESTED, "experiment", Task())) == ["experiment was NestedTask, is Task"]


def test_whole_number_is_the_same_float():
    run = changed(NESTED, "optimizer.schedule.peak", 1)
    assert config.differences(run, changed(run, "optimizer.schedule.peak", 1.0)) == []


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (config.Schedule("constant"), []),
        (config.Schedule("cosine"), ["optimizer.schedule.decay_steps was 20, is 40"]),
        (config.Schedule("cosine", decay_steps=20), []),
    ],
    ids=["constant", "cosine-to-the-end", "cosine-of-its-own-length"],
)
def test_more_steps_are_another_run_only_when_the_schedule_ends_with_it(schedule, expected):
    kept, asked = (
        config.resolve(make_run(steps, optimizer=config.Optimizer(schedule=copy.deepcopy(schedule))))
        for steps in (20, 40)
    )
    assert config.differences(kept, asked) == expected
