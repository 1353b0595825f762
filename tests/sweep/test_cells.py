"""The cells of a sweep: which there are, what they are called, and which mistakes are found."""

import dataclasses
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest

from tests.tasks import Task, make_run
from trainer import config
from trainer.commands.arguments import override
from trainer.errors import UserError
from trainer.sweep.cells import Cell, constants, draw, groups_of, make_cells, split_values

PEAK = "optimizer.schedule.peak"


@dataclasses.dataclass
class Wide(Task):
    """A task with settings of several types."""

    widths: tuple[int, ...] = (16,)
    name: str = "points"
    limit: int | None = None
    data_seed: int = 0
    peak: float = 1.0


def cells_of(grid: Any = None, random: Any = None, **settings: Any) -> list[Cell]:
    sweep = config.Sweep(grid=grid or {}, random=random or {}, **settings)
    return make_cells(make_run(20, experiment=Wide()), sweep, override)[0]


def test_cells_are_the_combinations_and_the_last_setting_changes_fastest():
    cells = cells_of({PEAK: "1e-3,3e-3", "seed": "0,1,2"})
    assert [cell.index for cell in cells] == list(range(6))
    assert [(cell.settings[PEAK], cell.settings["seed"]) for cell in cells] == [
        (peak, seed) for peak in (1e-3, 3e-3) for seed in (0, 1, 2)
    ]
    for cell in cells:
        assert cell.run.optimizer.schedule.peak == cell.settings[PEAK]
        assert cell.run.seed == cell.settings["seed"]
        assert cell.run.evaluation.batch_size == 8  # the rest is that of the config


def test_a_name_says_the_settings_whatever_their_order_and_form():
    (first, *_) = cells_of({PEAK: "1e-3", "seed": "3"})
    (second, *_) = cells_of({"seed": (3,), PEAK: (0.001,)})
    assert first.name == second.name == "optimizer.schedule.peak=0.001,seed=3"


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"experiment.widths": "(32, 64),(16,)"}, ["experiment.widths=32x64", "experiment.widths=16"]),
        ({"experiment.widths": ((32, 64), (8,))}, ["experiment.widths=32x64", "experiment.widths=8"]),
        ({"experiment.limit": "None,3"}, ["experiment.limit=None", "experiment.limit=3"]),
        ({"experiment.batch_norm": (True, False)}, ["experiment.batch_norm=True", "experiment.batch_norm=False"]),
        ({"optimizer.name": "adam,optax.lion"}, ["optimizer.name=adam", "optimizer.name=optax.lion"]),
    ],
)
def test_values_of_every_type_are_those_of_flags(values, names):
    assert [cell.name for cell in cells_of(values)] == names


def test_names_of_values_that_no_folder_can_have_stay_apart():
    long = ("x" * 300, "x" * 299, "é" * 180, "é" * 179, "語" * 100)  # é is two bytes in UTF-8, 語 is three
    cells = cells_of({"experiment.name": ("a/b", "a:b", "a_b", *long)})
    names = [cell.name for cell in cells]
    assert len(set(names)) == 8
    assert all("/" not in name and ":" not in name and len(name.encode()) <= 255 for name in names)
    assert names[2] == "experiment.name=a_b"
    (short,) = cells_of({"experiment.name": ("é" * 20,)})
    assert short.name == "experiment.name=" + "é" * 20


def test_cells_that_differ_in_their_seed_are_one_group():
    cells = cells_of({"seed": "0,1", PEAK: "1e-3,3e-3"})
    groups = groups_of(cells)
    assert list(groups) == [((PEAK, 1e-3),), ((PEAK, 3e-3),)]
    assert [[cell.run.seed for cell in group] for group in groups.values()] == [[0, 1], [0, 1]]


def test_a_draw_depends_on_nothing_but_its_seed_its_number_and_its_path():
    one = cells_of(random={PEAK: "1e-4:1e-2:log"}, trials=3)
    more = cells_of({"seed": "0,1"}, {"optimizer.b1": "0.8:0.99", PEAK: "1e-4:1e-2:log"}, trials=5)
    assert [cell.settings[PEAK] for cell in one] == [cell.settings[PEAK] for cell in more[:6:2]]
    assert [cell.settings[PEAK] for cell in more[::2]] == [cell.settings[PEAK] for cell in more[1::2]]  # for each seed
    other = cells_of(random={PEAK: "1e-4:1e-2:log"}, trials=3, search_seed=1)
    assert {cell.settings[PEAK] for cell in one}.isdisjoint(cell.settings[PEAK] for cell in other)


@pytest.mark.parametrize(
    ("text", "scale"), [("1e-4:1e-2", lambda x: x), ("1e-4:1e-2:log", math.log)], ids=["uniform", "log"]
)
def test_draws_fill_their_range_evenly(text, scale):
    run = make_run(20)
    drawn = [float(draw(run, PEAK, text, 0, trial)) for trial in range(400)]
    assert all(1e-4 <= number <= 1e-2 for number in drawn)
    position = [(scale(number) - scale(1e-4)) / (scale(1e-2) - scale(1e-4)) for number in drawn]
    counts, _ = np.histogram(position, 8, (0, 1))
    assert counts.min() >= 25  # 50 are expected, and 3.8 standard deviations less are 25
    assert all(float(f"{number:.4g}") == number for number in drawn)


def test_draws_of_an_integer_setting_are_integers_and_reach_both_ends():
    run = make_run(20)
    assert {draw(run, "batch_size", "2:5", 0, trial) for trial in range(100)} == {"2", "3", "4", "5"}
    counts = Counter(int(draw(run, "batch_size", "1:8:log", 0, trial)) for trial in range(400))
    assert set(counts) == set(range(1, 9))
    assert counts[1] > 2 * counts[4]  # log 2 − log 1 of the scale, against log 5 − log 4


@pytest.mark.parametrize("text", ["1.5:4.5", "1.5:4.5:log"])
def test_draws_of_an_integer_setting_lie_in_a_range_whose_ends_are_no_integers(text):
    run = make_run(20)
    assert {draw(run, "batch_size", text, 0, trial) for trial in range(100)} == {"2", "3", "4"}


def test_draws_that_repeat_a_cell_are_left_out_and_counted():
    sweep = config.Sweep(random={"optimizer.name": "adam,sgd"}, trials=10)
    cells, duplicate_count = make_cells(make_run(20), sweep, override)
    assert {cell.name for cell in cells} == {"optimizer.name=adam", "optimizer.name=sgd"}
    assert (len(cells), duplicate_count) == (2, 8)


def test_only_numbers_of_the_optimizer_and_the_seed_are_no_constants_of_the_program():
    shared = {
        "seed": "1",
        PEAK: "1",
        "optimizer.schedule.final": "0.1",
        "optimizer.groups.decayed.weight_decay": "0.2",
    }
    (cell,) = cells_of(shared)
    assert constants(cell) == ()
    (cell,) = cells_of(shared | {"experiment.data_seed": "3", "experiment.peak": "2", "batch_size": "8"})
    assert constants(cell) == (("batch_size", 8), ("experiment.data_seed", 3), ("experiment.peak", 2.0))


def test_commas_in_brackets_are_no_separators():
    assert split_values(" 1, (2, 3),[4,(5,6)] ") == ["1", "(2, 3)", "[4,(5,6)]"]
    assert split_values("") == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "nothing varies: give --grid PATH=VALUE,VALUE, or get_sweep"),
        ({"grid": {"sed": "0,1"}}, "config has no field 'sed'; did you mean 'seed'?"),
        (
            {"grid": {"optimizer.schedule.peek": "1"}},
            "config.optimizer.schedule has no field 'peek'; did you mean 'peak'?",
        ),
        ({"grid": {"optimizer.schedule": "1"}}, "config.optimizer.schedule is a group of settings; set one of "),
        ({"grid": {"seed": "0,x"}}, "config.seed is 'x'; int is expected"),
        ({"grid": {"seed": "0,,1"}}, "config.seed is ''; int is expected"),
        ({"grid": {"seed": ()}}, "--grid seed has no values"),
        ({"grid": {"seed": "0,1,0"}}, "--grid seed has the value 0 twice"),
        (
            {"grid": {PEAK: "1e-3,0.001"}},
            "--grid optimizer.schedule.peak has the value 0.001 twice, as 1e-3 and as 0.001",
        ),
        ({"grid": {"batch_size": "16,0"}}, "cell batch_size=0: batch_size is 0; it must be at least 1"),
        ({"grid": {"microbatches": "1,3"}}, "cell microbatches=3: batch_size 16 does not divide into 3 microbatches"),
        (
            {"grid": {"seed": "0"}, "random": {"seed": "0:9"}},
            "seed is in the grid and drawn at random; give one of them",
        ),
        ({"random": {"sed": "0:9"}}, "config has no field 'sed'; did you mean 'seed'?"),
        (
            {"random": {PEAK: "1e-2:1e-4"}},
            "--random optimizer.schedule.peak=1e-2:1e-4 is no range: LOW < HIGH is expected",
        ),
        ({"random": {PEAK: "0:1:log"}}, "--random optimizer.schedule.peak=0:1:log is no range: 0 < LOW < HIGH is exp"),
        (
            {"random": {"batch_size": "0.2:0.8"}},
            "--random batch_size=0.2:0.8 is a range without an integer, and config.batch_size is an integer",
        ),
        (
            {"random": {"batch_size": "0.2:0.8:log"}},
            "--random batch_size=0.2:0.8:log is a range without an integer",
        ),
        ({"random": {PEAK: "1e-3"}}, "--random optimizer.schedule.peak=1e-3 has nothing to draw from: LOW:HIGH, "),
        ({"random": {PEAK: "1e-3:2:lin"}}, "--random optimizer.schedule.peak=1e-3:2:lin has nothing to draw from"),
        (
            {"random": {"optimizer.name": "adam,adm"}, "trials": 9},
            "cell optimizer.name=adm: optimizer.name is 'adm'; did",
        ),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value)[:40],
)
def test_a_mistake_is_one_line(settings, message):
    with pytest.raises(UserError) as error:
        make_cells(make_run(20), config.Sweep(**settings), override)
    assert str(error.value).startswith(message)


def test_the_run_that_cells_are_made_from_stays_as_it_was():
    run = make_run(20)
    before = config.to_json(run)
    make_cells(run, config.Sweep(grid={PEAK: "1,2", "optimizer.groups.decayed.weight_decay": "0.5,0.6"}), override)
    assert config.to_json(run) == before
