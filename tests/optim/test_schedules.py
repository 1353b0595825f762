"""Schedules against closed forms in float64, in every unit, and the errors that need the length of the data."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.tasks import make_run
from trainer import config
from trainer.errors import UserError
from trainer.optim import build_schedules


class Length(NamedTuple):
    """Of a run and of its data."""

    total_steps: int
    batch_size: int
    examples: int


LENGTH = Length(total_steps=200, batch_size=16, examples=160)
COUNTS = np.arange(260)

# Of the schedules below, in steps; the run has 200, of which 10 are an epoch and 2 are a percent.
DESCENTS: dict[str, dict[str, Any]] = {
    "linear": {},
    "cosine": {},
    "polynomial": {"power": 2.5},
    "wsd": {"descent": 50},
}
SHAPES: dict[str, dict[str, Any]] = {
    "constant": {},
    "step": {"boundaries": (60, 120, 190)},
    "inverse_sqrt": {},
    **DESCENTS,
}
PER_UNIT = {"steps": 1, "epochs": 10, "examples": 1 / 16, "percent": 2}

each_shape = pytest.mark.parametrize("name", SHAPES)
each_descent = pytest.mark.parametrize("name", DESCENTS)


def make(name: str, **settings: Any) -> config.Schedule:
    """A schedule of a name with the settings above, and others."""
    own: dict[str, Any] = {"peak": 0.3, **({"final": 0.05} if name in DESCENTS else {}), **SHAPES[name]}
    return config.Schedule(name, **own | settings)


def closed_form(schedule: config.Schedule, total_steps: int = LENGTH.total_steps) -> np.ndarray:
    """The values at `COUNTS` of a schedule in steps."""
    t, peak, final = COUNTS.astype(float), schedule.peak, schedule.final
    w, e = schedule.warmup, schedule.end or total_steps
    left = np.clip((e - t) / (e - w), 0, 1)
    match schedule.name:
        case "constant":
            values = np.full(len(t), peak)
        case "linear":
            values = final + (peak - final) * left
        case "cosine":
            values = final + (peak - final) * np.sin(np.pi / 2 * left) ** 2
        case "polynomial":
            values = final + (peak - final) * left**schedule.power
        case "wsd":
            values = final + (peak - final) * np.clip((e - t) / (schedule.descent or 0), 0, 1)
        case "step":
            values = peak * schedule.factor ** sum((t >= boundary).astype(int) for boundary in schedule.boundaries)
        case "inverse_sqrt":
            values = peak * np.sqrt(max(w, 1) / np.maximum(t, max(w, 1)))
        case name:
            raise AssertionError(name)
    return np.where(t < w, peak * t / max(w, 1), values)


def build(schedule: config.Schedule, length: Length = LENGTH) -> optax.Schedule:
    optimizer = config.Optimizer(schedule=schedule)
    run = make_run(length.total_steps, batch_size=length.batch_size, optimizer=optimizer)
    return build_schedules(run, length.examples)["optimizer.schedule"]


def values(schedule: config.Schedule, length: Length = LENGTH, counts: Any = COUNTS) -> np.ndarray:
    """The values at `counts` of the schedule that is built, compiled as in a step."""
    return np.asarray(jax.jit(jax.vmap(build(schedule, length)))(jnp.asarray(counts, jnp.int32)))


@pytest.mark.parametrize("end", [None, 160, 230], ids=["to-the-end", "shorter", "longer"])
@pytest.mark.parametrize("warmup", [0, 1, 40])
@each_shape
def test_values_are_those_of_the_closed_form(name, warmup, end):
    schedule = make(name, warmup=warmup, **{"end": end} if name in DESCENTS else {})
    np.testing.assert_allclose(values(schedule), closed_form(schedule), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "step", "factor": 0.5, "warmup": 59},
        {"name": "step", "factor": 0.0, "boundaries": (1,)},
        {"name": "polynomial", "power": 0.5},
        {"name": "polynomial", "power": 3, "final": 0.0},
        {"name": "wsd", "warmup": 150, "descent": 50},
        {"name": "wsd", "descent": 1, "final": 0.0},
        {"name": "wsd", "descent": 200},
        {"name": "cosine", "final": 0.3},
        {"name": "cosine", "warmup": 199},
    ],
    ids=str,
)
def test_values_of_other_settings_are_those_of_the_closed_form(settings):
    schedule = make(**settings)
    np.testing.assert_allclose(values(schedule), closed_form(schedule), rtol=2e-6, atol=2e-7)


@each_shape
def test_values_under_x64_are_float64(name):
    schedule = make(name, warmup=40)
    with jax.enable_x64(True):
        np.testing.assert_allclose(values(schedule), closed_form(schedule), rtol=1e-14, atol=1e-16)


@each_shape
def test_value_is_a_float32_scalar(name):
    value = jax.eval_shape(build(make(name, warmup=3)), jnp.int32(7))
    assert (value.shape, value.dtype) == ((), jnp.float32)


@pytest.mark.parametrize("unit", PER_UNIT)
@each_shape
def test_units_express_the_same_schedule(name, unit):
    steps = make(name, warmup=40, **{"end": 180} if name in DESCENTS else {})
    times: dict[str, Any] = {
        field: getattr(steps, field) / PER_UNIT[unit] for field in ("warmup", "end", "descent") if getattr(steps, field)
    }
    boundaries = tuple(boundary / PER_UNIT[unit] for boundary in steps.boundaries)
    same = dataclasses.replace(steps, unit=unit, boundaries=boundaries, **times)
    np.testing.assert_array_equal(values(same), values(steps))


@pytest.mark.parametrize(
    ("unit", "boundary", "step"),
    [
        ("epochs", 1, 391),
        ("epochs", 0.5, 195),
        ("epochs", 150, 58594),
        ("examples", 1000, 8),
        ("examples", 50_000 * 150, 58594),
        ("percent", 12.3, 9609),
        ("steps", 58594.0, 58594),
    ],
)
def test_time_is_rounded_to_the_nearest_step(unit, boundary, step):
    length = Length(total_steps=78_125, batch_size=128, examples=50_000)  # 200 epochs of 390.625 steps
    schedule = config.Schedule("step", peak=1.0, unit=unit, boundaries=(boundary,))
    found = values(schedule, length, (0, step - 1, step, step + 1))
    np.testing.assert_allclose(found, [1.0, 1.0, 0.1, 0.1], rtol=1e-6)


def test_paper_divides_by_ten_at_epochs():
    length = Length(total_steps=200 * 391, batch_size=128, examples=391 * 128)
    schedule = config.Schedule("step", peak=1e-3, unit="epochs", boundaries=(150, 175))
    counts = [epoch * 391 + step for epoch in (0, 149, 150, 174, 175, 199) for step in (0, 390)]
    found = values(schedule, length, counts)
    np.testing.assert_allclose(found, np.repeat([1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5], 2), rtol=1e-6)


@each_shape
def test_first_update_of_a_warm_up_has_the_value_0(name):
    assert values(make(name, warmup=40))[0] == 0


@each_shape
def test_warm_up_rises_at_every_update(name):
    assert (np.diff(values(make(name, warmup=40))[:41]) > 0).all()


@each_shape
def test_first_update_without_a_warm_up_has_the_peak(name):
    np.testing.assert_allclose(values(make(name))[0], 0.3, rtol=1e-6)


@each_shape
def test_value_never_rises_after_the_warm_up(name):
    assert (np.diff(values(make(name, warmup=40))[40:]) <= 0).all()


@pytest.mark.parametrize("length", [LENGTH, Length(187, 16, 160)], ids=["200", "187"])
@pytest.mark.parametrize("final", [0.0, 0.1, 0.29, 0.3])
@each_descent
def test_value_is_exactly_final_at_the_end_and_beyond(name, final, length):
    found = values(make(name, warmup=40, final=final), length)
    np.testing.assert_array_equal(found[length.total_steps :], np.float32(final))


def test_wsd_is_exactly_its_peak_between_warm_up_and_descent():
    np.testing.assert_array_equal(values(make("wsd", warmup=40, descent=50))[40:151], np.float32(0.3))


@each_shape
def test_peak_of_0_is_0_everywhere(name):
    final = {"final": 0.0} if name in DESCENTS else {}
    assert not values(make(name, peak=0.0, **final)).any()


def test_power_of_1_is_linear():
    np.testing.assert_allclose(values(make("polynomial", power=1.0)), values(make("linear")), rtol=1e-6)


def test_whole_exponent_gives_the_bits_of_the_same_float():
    whole, real = (values(make("polynomial", power=power, warmup=7)) for power in (5, 5.0))
    np.testing.assert_array_equal(whole, real)


@pytest.mark.parametrize("unit", ["steps", "epochs", "percent"])
@each_shape
def test_run_that_is_cut_short_has_the_values_of_the_whole_run(name, unit):
    times = ("warmup", "descent")
    steps = make(name, warmup=40)
    part: dict[str, Any] = {field: getattr(steps, field) / PER_UNIT[unit] for field in times if getattr(steps, field)}
    part["boundaries"] = tuple(boundary / PER_UNIT[unit] for boundary in steps.boundaries)
    cut = dataclasses.replace(steps, unit=unit, run_steps=200, **part)
    np.testing.assert_array_equal(values(cut, LENGTH._replace(total_steps=30)), values(steps))


def test_wsd_whose_parts_were_both_rounded_up_fits():
    found = values(make("wsd", unit="percent", warmup=50, descent=50), Length(7, 16, 160))
    np.testing.assert_allclose(
        found[:8], [0.0, 0.075, 0.15, 0.225, 0.3, 0.3 - 0.25 / 3, 0.3 - 0.5 / 3, 0.05], rtol=1e-6
    )


CUT_SHORT = "; to try a few steps of a run give --until, or set optimizer.schedule.run_steps to its full length"
ASCEND = "they must ascend, the first above the warm-up"


def refusal(schedule: config.Schedule) -> str:
    """Why a schedule that `resolve` accepts cannot be built for `LENGTH`."""
    run = make_run(LENGTH.total_steps, batch_size=LENGTH.batch_size, optimizer=config.Optimizer(schedule=schedule))
    resolved = config.resolve(run)
    with pytest.raises(UserError) as error:
        build_schedules(resolved, LENGTH.examples)
    return str(error.value)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (
            make("constant", unit="epochs", warmup=0.001),
            "warmup has 0.001 epochs, which rounds to 0 steps (in steps: 10 per epoch)",
        ),
        (
            make("linear", unit="epochs", end=0.04),
            "end has 0.04 epochs, which rounds to 0 steps (in steps: 10 per epoch)",
        ),
    ],
)
def test_epochs_that_are_rounded_to_no_step_are_refused(schedule, message):
    assert refusal(schedule) == f"optimizer.schedule.{message}"


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (
            make("wsd", unit="examples", descent=7),
            "descent has 7 examples, which rounds to 0 steps (in steps: 0.0625 per example)",
        ),
        (
            make("step", unit="percent", boundaries=(0.2, 5)),
            "boundaries has 0.2 percent, which rounds to 0 steps (in steps: 2 per percent)",
        ),
    ],
)
def test_time_that_is_rounded_to_no_step_is_refused_without_the_data(schedule, message):
    with pytest.raises(UserError) as error:
        config.resolve(make_run(LENGTH.total_steps, optimizer=config.Optimizer(schedule=schedule)))
    assert str(error.value) == f"optimizer.schedule.{message}"


@pytest.mark.parametrize(
    ("name", "epochs", "message", "hint"),
    [
        ("constant", {"warmup": 20}, "warmup is 20 epochs, but the whole schedule has only 200 steps", CUT_SHORT),
        ("cosine", {"warmup": 21}, "warmup is 21 epochs, but the whole schedule has only 200 steps", CUT_SHORT),
        (
            "cosine",
            {"warmup": 1.99, "end": 2},
            "warmup is 1.99 epochs, but the whole schedule has only 2 epochs",
            "",
        ),
        (
            "wsd",
            {"warmup": 12, "descent": 9},
            "descent is 9 epochs, but the warm-up leaves only 80 of 200 steps",
            CUT_SHORT,
        ),
        ("step", {"boundaries": (15, 20)}, "boundaries is (15, 20) epochs, but the run has only 200 steps", CUT_SHORT),
        ("step", {"boundaries": (5.01, 5.02)}, f"boundaries is (5.01, 5.02) epochs; {ASCEND} (0 epochs)", ""),
        ("step", {"boundaries": (5,), "warmup": 4.99}, f"boundaries is (5,) epochs; {ASCEND} (4.99 epochs)", ""),
    ],
)
def test_epochs_that_contradict_each_other_or_the_run_are_refused(name, epochs, message, hint):
    schedule = make(name, unit="epochs", **epochs)
    assert refusal(schedule) == f"optimizer.schedule.{message} (in steps: 10 per epoch){hint}"


def test_error_names_the_path_of_the_schedule():
    run = make_run(LENGTH.total_steps)
    run.optimizer.groups["decayed"] = config.Group(decay_schedule=make("constant", unit="epochs", warmup=30))
    with pytest.raises(UserError, match=r"^optimizer\.groups\.decayed\.decay_schedule\.warmup is 30 epochs"):
        build_schedules(config.resolve(run), LENGTH.examples)


@pytest.mark.parametrize(("name", "tested"), [("name", SHAPES), ("unit", PER_UNIT)])
def test_every_choice_is_tested(name, tested):
    choices = {field.name: field.metadata["choices"] for field in dataclasses.fields(config.Schedule)}
    assert set(choices[name]) == set(tested)
