"""The decay check says what labels do to parameters when gradients do nothing, and notices when that is not so."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from tests.tasks import make_run
from trainer import config
from trainer.commands import run as command
from trainer.optim.decay_check import DecayResult, check_decay, decay_table
from trainer.program import Program, build_program

RULES = ((r".*/kernel", "decayed"), (".*", "plain"))


def compiled(**fields: Any) -> Program:
    return build_program(config.resolve(make_run(optimizer=config.Optimizer(labels=RULES, **fields))))


def check(program: Program, optimizer: Any = None) -> list[DecayResult]:
    """With another optimizer in the place of the program's, if one is given."""
    labels = [param.label for param in program.param_table.rows]
    optimizer = program.optimizer if optimizer is None else optimizer
    return check_decay(program.init().params, labels, program.groups, optimizer, program.run.total_steps)


def results(**fields: Any) -> dict[str, Any]:
    return {result.label: result for result in check(compiled(**fields))}


WARMED = config.Schedule("cosine", peak=0.5, warmup=5)


@pytest.mark.parametrize("name", ["adabelief", "adam", "sgd"])
@pytest.mark.parametrize("decay", ["decoupled", "fixed"])
def test_decayed_leaves_shrink_by_the_stated_factor_and_the_rest_not_at_all(name, decay):
    groups = {"decayed": config.Group(weight_decay=0.2, lr_multiplier=0.5), "plain": config.Group()}
    found = results(name=name, decay=decay, schedule=WARMED, groups=groups)
    assert found["decayed"].factor == pytest.approx(1 - 0.2 * (0.25 if decay == "decoupled" else 1), rel=1e-6)
    assert found["plain"].factor == 1
    assert [result.wrong for result in found.values()] == [(), ()]


def test_probe_looks_where_a_label_decays_most():
    decay = config.Schedule("step", peak=0.2, warmup=3, boundaries=(7,))
    groups = {"decayed": config.Group(decay_schedule=decay, every_steps=4), "plain": config.Group()}
    found = results(schedule=config.Schedule("linear", peak=0.5), groups=groups)
    # Updated at counts 0, 4, 8, …; at 0 the decay is still 0, at 8 it has stepped down.
    assert found["decayed"].step == 5
    assert found["decayed"].factor == pytest.approx(1 - 0.2 * 0.5 * (1 - 4 / 20), rel=1e-6)
    assert found["decayed"].wrong == ()


def test_frozen_leaves_are_untouched():
    groups = {"decayed": config.Group(frozen=True), "plain": config.Group(weight_decay=0.1)}
    found = results(groups=groups)
    assert (found["decayed"].factor, found["decayed"].wrong) == (1, ())


def test_coupled_decay_has_no_factor():
    groups = {"decayed": config.Group(weight_decay=0.1), "plain": config.Group()}
    found = results(decay="coupled", groups=groups)
    assert found["decayed"].factor is None
    assert (found["plain"].factor, found["plain"].wrong) == (1, ())


def sabotaged(optimizer: optax.GradientTransformation, extra: Any) -> optax.GradientTransformation:
    """An optimizer that does a little more than the labels say."""

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        updates, state = optimizer.update(updates, state, params)
        return jax.tree_util.tree_map_with_path(extra, updates, params), state

    return optax.GradientTransformation(optimizer.init, update)


@pytest.mark.parametrize(
    ("extra", "wrong"),
    [
        (lambda path, u, p: u - 1e-6 * p if "bias" in str(path) else u, ("head/bias", "norm/bias")),
        (lambda path, u, p: u * (1 + 1e-2) if "head" in str(path) else u, ("head/kernel",)),
        (lambda path, u, p: jnp.zeros_like(u) if "dense" in str(path) else u, ("dense/kernel",)),
    ],
    ids=["a bias decays", "a decay 1 % too strong", "a kernel does not decay"],
)
def test_probe_names_what_is_not_as_stated(extra, wrong):
    groups = {"decayed": config.Group(weight_decay=0.1), "plain": config.Group()}
    program = compiled(groups=groups)
    found = check(program, sabotaged(program.optimizer, extra))
    assert tuple(path for result in found for path in result.wrong) == wrong


def test_decay_that_the_dtype_of_the_parameters_loses_does_not_hold():
    groups = {"decayed": config.Group(weight_decay=1e-9), "plain": config.Group()}
    found = results(groups=groups)["decayed"]
    assert (found.wrong, found.lost, found.holds) == ((), True, False)
    assert "LOST" in decay_table([found])


def test_factor_that_is_not_positive_does_not_hold():
    groups = {"decayed": config.Group(weight_decay=2.0), "plain": config.Group()}
    assert not results(decay="fixed", groups=groups)["decayed"].holds


def test_command_prints_a_result_for_each_label(data_dir, capsys):
    code = command(["inspect", "--config=configs/digits.py", f"--config.experiment.data_dir={data_dir}", "--probe"])
    assert code == 0
    assert capsys.readouterr().out == (
        "label    arrays  step  factor   result\n"
        "decayed       4    51  0.99998  as stated\n"
        "plain         4    51  1        untouched, as stated\n"
    )
