"""A run as JSON: the same run again, compared without importing its classes, and found again in its config file."""

import copy
import dataclasses
import json
import sys

import pytest

from tests.config.nested import FIXED, FREE, NESTED, Inner, NestedTask, another, changed, differences, setting_of
from tests.tasks import Task, make_run
from trainer import config
from trainer.errors import UserError

KEPT = config.to_json(NESTED)
TASK = "tests.config.nested:NestedTask"


@dataclasses.dataclass
class Trap:
    def __post_init__(self):
        raise AssertionError("a class from a stranger's JSON was made")


class Outer:
    @dataclasses.dataclass
    class Inside(Task):
        pass


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


def test_value_that_json_cannot_hold_is_named():
    with pytest.raises(UserError, match=r"^experiment\.inner\.rate is a complex; a setting is a number"):
        config.to_json(changed(NESTED, "experiment.inner.rate", 1j))


@pytest.mark.parametrize(
    ("path", "unknown", "known"),
    [
        ((), "batchsize", "batch_size"),
        (("optimizer",), "labls", "labels"),
        (("optimizer", "groups", "plain"), "decay", "weight_decay"),
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
    ("new", "message"), [("-1", "seed is -1; it must be at least 0"), ('"0"', "seed is '0'; int is expected")]
)
def test_json_with_a_wrong_value_is_refused_when_it_is_resolved(new, message):
    run = config.from_json(KEPT.replace('"seed": 0', f'"seed": {new}', 1))
    with pytest.raises(UserError, match=f"^{message}"):
        config.resolve(run)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (TASK, "tests.config.nested:Gone", "tests.config.nested:Gone is not a dataclass any more"),
        (TASK, "tests.config.nested:copy", "tests.config.nested:copy is not a dataclass any more"),
        (TASK, "tests.gone:Task", "Task: No module named 'tests.gone': run from the folder"),
        ("{", "", "it is not a run as `to_json` writes it"),
    ],
)
def test_json_that_is_no_run_any_more_is_refused_in_one_line(old, new, message):
    with pytest.raises(UserError, match=message) as error:
        config.from_json(config.to_json(NESTED).replace(old, new, 1))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["[]", "{}", "null"])
def test_json_of_something_else_is_not_a_run(text):
    with pytest.raises(UserError, match=r"^it is not the JSON of a Run$"):
        config.from_json(text)


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


def test_run_does_not_differ_from_its_copy():
    assert differences(KEPT, copy.deepcopy(NESTED)) == []


@pytest.mark.parametrize("path", FIXED)
def test_setting_that_makes_the_run_is_named_when_it_changes(path):
    found = differences(KEPT, changed(NESTED, path, another(getattr(*setting_of(NESTED, path)))))
    assert [text.split(" was ")[0] for text in found] == [path]


@pytest.mark.parametrize("path", FREE)
def test_setting_that_may_change_makes_no_difference(path):
    assert differences(KEPT, changed(NESTED, path, another(getattr(*setting_of(NESTED, path))))) == []


def test_every_changed_setting_is_named_with_both_values():
    run = changed(changed(changed(NESTED, "seed", 1), "optimizer.b1", 0.5), "logging.every_steps", 7)
    assert differences(KEPT, run) == ["seed was 0, is 1", "optimizer.b1 was 0.9, is 0.5"]


def test_other_groups_and_another_experiment_are_differences():
    groups = changed(NESTED, "optimizer.groups", {"plain": config.Group()})
    assert [text.split(" was ")[0] for text in differences(KEPT, groups)] == ["optimizer.groups"]
    task = differences(KEPT, changed(NESTED, "experiment", Task()))
    assert task == ["experiment was tests.config.nested:NestedTask, is tests.tasks:Task"]


def edited(path: str, **changes: object) -> str:
    """The kept JSON with fields of the object at a path changed, or removed where the change is None."""
    kept = json.loads(KEPT)
    node = kept
    for name in path.split(".") if path else []:
        node = node[name]
    for name, value in changes.items():
        node.pop(name) if value is None else node.__setitem__(name, value)
    return json.dumps(kept)


@pytest.mark.parametrize(
    ("kept", "found"),
    [
        (edited("experiment", depth=3), []),  # it is gone, so nothing can be asked of it
        (edited("optimizer", beta=[0.9]), ["optimizer.beta was (0.9,), is no setting any more"]),
        (edited("optimizer", b1=None), []),  # it had the default
        (edited("experiment", label=None), []),
        (edited("", loading=None), []),
        (edited("experiment", inner=None), ["experiment.inner.rate was None, is 0.1"]),
        (edited("", experiment=None), ["experiment was None, is tests.config.nested:NestedTask"]),
        (edited("optimizer", b1=[1]), ["optimizer.b1 was (1,), is 0.9"]),
        (
            edited("experiment", **{"$class": "gone.module:Task"}),
            ["experiment was gone.module:Task, is tests.config.nested:NestedTask"],
        ),
    ],
)
def test_older_or_damaged_json_is_a_difference_and_no_failure(kept, found):
    assert differences(kept, NESTED) == found


@pytest.mark.parametrize(
    ("kept", "reason"),
    [
        ("[]", "it is not the JSON of a Run"),
        ('{"model_type": "gpt2"}', "it is not the JSON of a Run"),
        ("null", "it is not the JSON of a Run"),
    ],
)
def test_json_of_no_run_is_refused(kept, reason):
    with pytest.raises(UserError, match=reason):
        differences(kept, NESTED)


def test_settings_that_change_no_update_are_harmless_and_shown():
    kept, asked = json.loads(edited("experiment", depth=3)), changed(NESTED, "logging.every_steps", 7)
    found = config.changed_settings(kept, asked)
    assert [change for change in found if change.harmless] == [
        ("experiment.depth was 3, is no setting any more", True),
        ("logging.every_steps was 1, is 7", True),
    ]


def test_setting_that_is_gone_is_left_out_of_the_run():
    assert config.from_json(edited("experiment", depth=3)) == NESTED


@pytest.mark.parametrize("path", ["optimizer", "experiment.inner", "loading"])
def test_no_class_but_settings_and_the_experiment_is_made(path):
    text = edited(path, **{"$class": "tests.config.test_encoding:Trap"})
    with pytest.raises(UserError, match=r"names the class 'tests\.config\.test_encoding:Trap', which is neither"):
        config.from_json(text)
    with pytest.raises(UserError, match="neither"):
        config.from_json(edited(path, **{"$class": "antigravity:Module"}))
    assert "antigravity" not in sys.modules


def test_an_experiment_must_be_one():
    with pytest.raises(UserError, match="Trap is no experiment: it has no init"):
        config.from_json(edited("experiment", **{"$class": "tests.config.test_encoding:Trap"}))


def test_class_that_cannot_be_imported_is_only_compared():
    @dataclasses.dataclass
    class Hidden(Task):
        depth: int = 2

    run = config.resolve(make_run(experiment=Hidden()))
    kept = config.to_json(run)
    assert differences(kept, run) == []
    assert differences(kept, changed(run, "experiment.depth", 3)) == ["experiment.depth was 2, is 3"]
    with pytest.raises(UserError, match="Hidden was defined in a script, a notebook or a function"):
        config.from_json(kept)


def test_class_inside_a_class_is_found_again():
    run = config.resolve(make_run(experiment=Outer.Inside()))
    assert config.from_json(config.to_json(run)) == run


def test_types_as_text_that_cannot_be_found_are_one_line():
    @dataclasses.dataclass
    class Hidden(Task):
        depth: "Nowhere" = 2  # noqa: F821 # pyrefly: ignore[unknown-name] - the mistake

    with pytest.raises(UserError, match=r"Hidden has a field of a type that cannot be found: name 'Nowhere'"):
        config.resolve(make_run(experiment=Hidden()))


def test_whole_number_is_the_same_float():
    run = changed(NESTED, "optimizer.schedule.peak", 1)
    assert differences(config.to_json(run), changed(run, "optimizer.schedule.peak", 1.0)) == []
