"""From a command line to a run: settings of None, and a config file that defines its own experiment."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import xla_flags
from tests.tasks import make_run
from trainer import config, train
from trainer.commands import run
from trainer.commands.arguments import load_config, make_parser, parse_flags, resolve_arguments
from trainer.errors import UserError
from trainer.observe.log import read_rows
from trainer.workdir import Workdir

ONE_FILE = '''
"""An experiment and its run in one file."""

import dataclasses

import numpy as np

from tests.tasks import Task
from trainer import Run
from trainer.config import Evaluation, Loading


class Points:
    """A source of its own class, whose examples a worker process makes."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        return {"x": rng.normal(size=8).astype(np.float32), "label": rng.integers(3)}


@dataclasses.dataclass
class Nested:
    count: int = 40


@dataclasses.dataclass
class Own(Task):
    nested: Nested = dataclasses.field(default_factory=Nested)

    def source(self, split):
        return Points(self.nested.count)


def get_config():
    return Run(Own(), total_steps=4, batch_size=8, loading=Loading(in_memory_bytes=0))
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, in which own.py lies."""
    (tmp_path / "own.py").write_text(ONE_FILE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parsed(*flags: str) -> config.Run:
    """The run that flags make of the config of `folder`."""
    options, overrides = parse_flags(make_parser("train", ""), ["--config=own.py", *flags])
    return resolve_arguments(options, overrides).run


@pytest.mark.parametrize("none", ["None", "none"])
@pytest.mark.parametrize("apart", [False, True], ids=["joined", "apart"])
def test_none_unsets_a_setting(none, apart, folder):
    flags = ["--config.evaluation.every_steps=2", "--config.optimizer.clip_norm=1"]
    assert parsed(*flags).optimizer.clip_norm == 1
    last = ["--config.optimizer.clip_norm", none] if apart else [f"--config.optimizer.clip_norm={none}"]
    unset = parsed(*flags, *last, "--config.seed=3")
    assert (unset.optimizer.clip_norm, unset.evaluation.every_steps, unset.seed) == (None, 2, 3)


def test_setting_that_is_none_by_default_can_be_set(folder):
    found = parsed("--config.evaluation.every_steps=50", "--config.checkpoint.best_metric", "test/loss")
    assert (found.evaluation.every_steps, found.checkpoint.best_metric) == (50, "test/loss")


def test_value_apart_of_a_switch_does_not_hide_the_flags_behind_it(folder):
    found = parsed("--config.optimizer.rectify", "true", "--noconfig.optimizer.sgd_fallback", "--config.seed", "3")
    assert (found.optimizer.rectify, found.optimizer.sgd_fallback, found.seed) == (True, False, 3)


def test_none_removes_the_schedule_of_a_group_and_build_makes_one(folder):
    path = "config.optimizer.groups.default.schedule"
    built = parsed(f"--{path}=build", f"--{path}.peak=0.5")
    assert built.optimizer.groups["default"].schedule == config.Schedule(peak=0.5)
    removed = parsed(f"--{path}=build", f"--{path}=None")
    assert removed.optimizer.groups["default"].schedule is None


@pytest.mark.parametrize(("text", "number"), [("1e3", 1000), ("2.5E2", 250), ("1e22", 10**22), ("1e8", 10**8)])
def test_a_whole_number_may_be_in_scientific_notation(text, number, folder):
    if number > 1e20:
        with pytest.raises(UserError, match="total_steps is 10000000000000000000000; it must be at most"):
            parsed(f"--config.total_steps={text}")
    else:
        assert parsed(f"--config.total_steps={text}").total_steps == number


def test_a_fraction_in_scientific_notation_is_no_whole_number(folder):
    with pytest.raises(UserError, match=r"config.total_steps is '1.25e1'; int is expected"):
        parsed("--config.total_steps=1.25e1")


def test_group_with_any_name_can_be_overridden(folder):
    (folder / "own.py").write_text(
        ONE_FILE.replace("batch_size=8,", "batch_size=8, optimizer=OPTIMIZER,").replace(
            "def get_config",
            "from trainer.config import Group, Optimizer\n"
            'OPTIMIZER = Optimizer(labels=((".*", "no-decay"),), groups={"no-decay": Group()})\n'
            "def get_config",
        )
    )
    found = parsed("--config.optimizer.groups.no-decay.weight_decay=0.5")
    assert found.optimizer.groups["no-decay"].weight_decay == 0.5


def test_experiment_in_the_config_file_trains_again_and_is_evaluated_from_the_workdir_alone(folder, capsys):
    assert run(["train", "--config=own.py", "--workdir=run"]) == 0
    assert run(["train", "--config=own.py", "--workdir=run", "--config.total_steps=6"]) == 0
    assert run(["train", "--workdir=run"]) == 0
    assert "resumed from step 6 (finished: nothing is left to do)" in capsys.readouterr().out
    assert run(["evaluate", "--workdir=run"]) == 0
    assert "test examples: 40" in capsys.readouterr().out
    kept = (folder / "run" / "config.json").read_text()
    assert '"$class": "Own",\n    "$file": "own.py",\n    "$sha256": "' in kept


def test_experiment_in_a_config_file_is_found_from_another_folder_only_by_its_absolute_path(folder, monkeypatch):
    for place in ("inside", "outside"):
        (folder / place).mkdir()
    monkeypatch.chdir(folder / "inside")
    assert run(["train", "--config=../own.py", "--workdir=../run"]) == 0
    assert f'"$file": "{folder}/own.py"' in (folder / "run" / "config.json").read_text()
    monkeypatch.chdir(folder / "outside")
    assert run(["evaluate", "--workdir=../run"]) == 0


@pytest.mark.parametrize("command", ["train", "evaluate", "inspect"])
@pytest.mark.parametrize("what", ["changed", "missing", "elsewhere"])
def test_config_file_that_is_not_as_it_was_is_one_line(what, command, folder, capsys, monkeypatch):
    workdir = Workdir(folder / "run")
    workdir.path.mkdir()
    workdir.write(parsed(), "")
    if what == "changed":
        (folder / "own.py").write_text(ONE_FILE + "\n")
        reason = "own.py, which has changed since: give --config=own.py to use the file as it is now"
    elif what == "missing":
        (folder / "own.py").unlink()
        reason = f"own.py, which is missing in the current folder, {folder}"
    else:
        (folder / "sub").mkdir()
        monkeypatch.chdir(folder / "sub")
        reason = f"own.py, which is missing in the current folder, {folder}/sub"
    assert run([command, f"--workdir={workdir.path}"]) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", f"error: {workdir.config_file} cannot be read: Own was defined in {reason}\n")


def test_config_file_that_has_changed_is_used_as_it_is_when_it_is_given(folder, capsys):
    assert run(["train", "--config=own.py", "--workdir=run"]) == 0
    (folder / "own.py").write_text(ONE_FILE.replace("total_steps=4", "total_steps=5"))
    assert run(["train", "--config=own.py", "--workdir=run"]) == 0
    assert [row["step"] for row in read_rows(folder / "run" / "metrics.jsonl")] == [4, 5]
    assert run(["evaluate", "--workdir=run"]) == 0


def test_config_file_that_was_edited_is_read_again_by_the_same_process(folder):
    first: Any = parsed().experiment
    (folder / "own.py").write_text(ONE_FILE.replace("count: int = 40", "count: int = 41"))
    second: Any = parsed().experiment
    assert (first.nested.count, second.nested.count) == (40, 41)


@pytest.mark.parametrize("name", ["random", "1 2", "a.b%c"])
def test_config_file_may_have_the_name_of_a_module_or_any_other(name, folder):
    shutil.move(folder / "own.py", folder / f"{name}.py")
    kept = config.to_json(load_config(f"{name}.py"))
    assert f'"$file": "{name}.py"' in kept
    assert config.to_json(config.from_json(kept)) == kept


def clean(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A Python process of its own on one device."""
    environment = os.environ | {"XLA_FLAGS": xla_flags(), "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.slow
def test_worker_processes_read_a_source_that_the_config_file_defines(folder):
    flags = ["--config=own.py", "--config.logging.every_steps=1"]
    for workers in (0, 1):
        done = clean(
            *("-m", "trainer", "train", *flags, f"--workdir=run{workers}", f"--config.loading.workers={workers}"),
            cwd=folder,
        )
        assert done.returncode == 0, done.stderr
    rows = [list(read_rows(folder / f"run{workers}" / "metrics.jsonl")) for workers in (0, 1)]
    assert [row["step"] for row in rows[1]] == [1, 2, 3, 4]
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_experiment_of_a_script_trains_twice_and_is_not_rebuilt_from_the_workdir_alone(folder, capsys):
    script = ONE_FILE + "\n\nif __name__ == '__main__':\n    from trainer import train\n"
    (folder / "script.py").write_text(script + "    train(get_config(), 'run')\n" * 2)
    done = clean("script.py", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert "resumed from step 4 (finished: nothing is left to do)" in done.stdout
    assert run(["evaluate", "--workdir=run"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: run/config.json cannot be read: Own was defined in a script, a notebook or a ")
    assert message.count("\n") == 1


def test_experiment_of_a_function_trains_twice_and_is_not_rebuilt_from_the_workdir_alone(tmp_path):
    from tests.tasks import Task

    @dataclasses.dataclass
    class Hidden(Task):
        pass

    for _ in range(2):
        assert int(train(make_run(3, experiment=Hidden()), tmp_path / "run", verbose=False).step) == 3
    with pytest.raises(UserError, match="Hidden was defined in a script, a notebook or a function, and cannot be "):
        Workdir(tmp_path / "run").stored_run()
