"""The Python code of docs/ runs and gives what the pages say, and the files that they name are there."""

import dataclasses
import functools
import importlib
import math
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import PartitionSpec

from trainer import Run, TrainState, UserError, config, train
from trainer.commands.arguments import make_parser, parse_flags, resolve_arguments
from trainer.config import resolve
from trainer.observe.log import read_rows
from trainer.optim.fused import ScaleByBeliefState
from trainer.program import build_program

ROOT = Path(__file__).parents[1]
ADABELIEF = (ROOT / "docs" / "adabelief.md").read_text()
MIGRATE = (ROOT / "docs" / "migrate.md").read_text()
# The Python blocks of docs/migrate.md by the file name that introduces each.
FILES = dict(re.findall(r"`(\w+\.py)`[^`]*:\n\n```python\n(.*?)```", MIGRATE, re.DOTALL))


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", ADABELIEF, re.DOTALL)


def test_settings_of_cifar_are_a_config_that_resolves():
    (text,) = [block for block in blocks() if block.startswith("Optimizer(") and "boundaries" in block]
    optimizer = eval(text, vars(config))
    assert optimizer.schedule.boundaries == (150,)
    assert optimizer.groups["all"].weight_decay == 5e-4


def test_migration_example_carries_the_state_over():
    (text,) = [block for block in blocks() if "from_optax" in block]
    names: dict = {}
    exec(text, names)
    assert isinstance(names["state"], ScaleByBeliefState)
    assert int(optax.tree.get(names["state"], "count")) == 2


def test_floors_are_those_of_the_formula():
    found = re.findall(r"^  \| (1e-\d+)[^|]*\| ([\d.e-]+) \|$", ADABELIEF, re.MULTILINE)
    assert len(found) == 4
    for eps_root, floor in found:
        assert math.sqrt(float(eps_root) / (1 - 0.999)) == pytest.approx(float(floor), rel=0.02)


def test_fields_of_a_group_are_those_that_there_are():
    table = ADABELIEF.split("| field of `Group` |")[1].split("\n\n")[0]
    named = set(re.findall(r"`(\w+)`", "\n".join(line.split("|")[1] for line in table.splitlines()[2:])))
    assert named == set(vars(config.Group()))


@pytest.mark.parametrize("target", sorted(set(re.findall(r"(?:configs|tests|trainer)/[\w/]+\.py", ADABELIEF))))
def test_files_that_are_named_are_there(target):
    assert (ROOT / target).is_file()


@dataclasses.dataclass
class Migration:
    """The files of docs/migrate.md in a folder, imported as modules, and the names of its old program after it ran."""

    folder: Path
    old: dict[str, Any]
    modules: dict[str, types.ModuleType]

    def train(self, run: Run) -> tuple[TrainState, list[dict[str, Any]]]:
        """The final state of a run, and its rows of metrics."""
        workdir = self.folder / f"run_{type(run.experiment).__name__}"
        state = train(run, workdir, verbose=False)
        return state, list(read_rows(workdir / "metrics.jsonl"))


@pytest.fixture(scope="module")
def migration(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Migration]:
    folder = tmp_path_factory.mktemp("migrate")
    named = FILES["clusters.py"].replace("axis_name=replica_axis()", 'axis_name="batch"')
    for name, text in {**FILES, "named.py": named}.items():
        (folder / name).write_text(text)
    old: dict[str, Any] = {"__name__": "old"}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.chdir(folder)
        exec(FILES["old.py"], old)
        names = ["clusters", "config", "sown", "finetune", "wide", "named"]
        for name in names:  # put back when the tests are done
            patch.setitem(sys.modules, name, types.ModuleType(name))
            del sys.modules[name]
        yield Migration(folder, old, {name: importlib.import_module(name) for name in names})


def test_every_block_of_the_migration_page_is_a_file_that_is_run():
    assert set(FILES) == {"old.py", "clusters.py", "config.py", "sown.py", "finetune.py", "wide.py"}
    assert MIGRATE.count("```python") == len(FILES) + 1  # and lines for a model that may not be changed


@pytest.fixture(scope="module")
def rows(migration: Migration) -> list[dict[str, Any]]:
    """The metrics of every step of the page's config."""
    run = migration.modules["config"].get_config()
    run.logging.every_steps = 1
    return migration.train(run)[1]


def test_the_experiment_learns_what_the_old_program_learns(migration, rows):
    assert migration.old["accuracy"] > 0.8
    assert rows[-1]["test/accuracy"] == pytest.approx(migration.old["accuracy"], abs=0.05)
    assert rows[-1]["test/examples"] == len(migration.old["test_data"]["label"])


def test_the_config_has_the_old_programs_schedule(migration, rows):
    expected = [migration.old["schedule"](step) for step in range(migration.old["STEPS"])]
    np.testing.assert_allclose([row["train/learning_rate"] for row in rows], expected, rtol=1e-5, atol=1e-9)


def test_the_labels_decay_the_parameters_of_the_old_programs_mask(migration):
    params = build_program(resolve(migration.modules["config"].get_config())).param_table
    mask = flatten_dict(migration.old["decay_mask"](migration.old["trained"]["params"]), sep="/")
    assert {p.path: p.weight_decay for p in params.rows} == {
        path: "0.01" if decays else "0" for path, decays in mask.items()
    }


def test_an_axis_that_the_model_names_itself_gives_the_advice_of_the_page(migration):
    run = Run(migration.modules["named"].Clusters(), total_steps=1, batch_size=8)
    with pytest.raises(UserError, match=r"named\.py:\d+.*axis_name=replica_axis\(\)"):
        build_program(resolve(run))
    assert "the advice to write `axis_name=replica_axis()`" in MIGRATE.replace("\n", " ")


def test_the_lines_for_a_model_that_names_an_axis_give_the_numbers_of_one_that_names_none(migration):
    (lines,) = re.findall(r"```python\n(def run.*?)```", MIGRATE, re.DOTALL)
    named, plain = migration.old["Net"](), migration.modules["clusters"].Net()
    x, key = migration.modules["clusters"].Clusters().source("test").arrays["x"], jax.random.key(0)
    variables = jax.jit(functools.partial(plain.init, train=False))(key, x)

    @functools.partial(jax.jit, static_argnums=1)
    def both(variables: Any, training: bool) -> Any:
        names: dict = {"jax": jax, "variables": variables, "train": training, "batch": {"image": x}}
        names["model"] = types.SimpleNamespace(apply=functools.partial(named.apply, rngs={"dropout": key}))
        exec(lines, names)
        mutable = ["batch_stats"] if training else []
        expected = plain.apply(variables, x, train=training, rngs={"dropout": key}, mutable=mutable)
        return (names["logits"], names["collections"]), expected

    for training in (True, False):
        found, expected = both(variables, training)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)
    with pytest.raises(NameError, match="unbound axis name: batch"):
        named.apply(variables, x, train=True, rngs={"dropout": key}, mutable=["batch_stats"])


def test_sown_losses_count_and_are_logged(migration):
    sparse = migration.modules["sown"].Sparse()
    state, rows = migration.train(Run(sparse, total_steps=3, batch_size=64))
    assert state.collections == {}
    assert rows[-1]["train/sown"] > 0
    variables, batch = {"params": state.params}, {**sparse.source("test").arrays, "mask": jnp.ones(320)}
    key = jax.random.key(0)
    with_sown, _ = sparse.loss(variables, batch, key=key, train=True)
    logits = migration.modules["sown"].SparseNet().apply(variables, batch["x"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    expected = losses.mean() + with_sown["sown"].compute()
    assert with_sown["loss"].compute() == pytest.approx(float(expected), rel=1e-5)


def test_fine_tuning_starts_from_the_old_programs_weights_and_moves_the_head_alone(migration):
    state, rows = migration.train(migration.modules["finetune"].get_config())
    loaded: Any = flatten_dict(migration.old["trained"]["params"], sep="/")
    trained: Any = flatten_dict(state.params, sep="/")
    assert {path for path in trained if not np.array_equal(trained[path], loaded[path])} == {"head/bias", "head/kernel"}
    assert rows[-1]["test/accuracy"] > 0.8


def test_logical_axes_are_sharded_as_the_rules_say(migration):
    state, _ = migration.train(migration.modules["wide"].get_config())
    assert state.params["dense"]["kernel"].sharding.spec == PartitionSpec(None, "tensor")
    assert state.params["head"]["kernel"].sharding.spec == PartitionSpec("tensor", None)


def test_settings_that_the_migration_page_names_are_there():
    calls = re.findall(r"`((?:Schedule|Logging|Checkpoint|Group)\([^`]*\))`", MIGRATE)
    assert len(calls) >= 4
    for call in calls:
        eval(call, vars(config))
    for setting, owner in re.findall(r"`(\w+=[^`]+)` in (?:a )?`(\w+)`", MIGRATE):
        fields = {field.name for field in dataclasses.fields(getattr(config, owner))}
        assert setting.split("=")[0] in fields


def test_settings_of_the_guarantees_are_understood(monkeypatch):
    monkeypatch.chdir(ROOT)
    flags = re.findall(r"--config\.[\w.]+=[^ `]+", (ROOT / "docs" / "guarantees.md").read_text())
    assert len(flags) > 8
    parser = make_parser("train", "")
    run = resolve_arguments(*parse_flags(parser, ["--config=configs/digits.py", *flags])).run
    assert (run.numerics.on_nonfinite, run.numerics.max_skips, run.watch.grace_seconds) == ("skip", 10, 60.0)
