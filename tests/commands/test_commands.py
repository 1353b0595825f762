"""The command line: mistakes are one line and leave no trace, and each command says what it should."""

import dataclasses
import importlib.util
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import xla_flags
from tests.tasks import Task
from trainer import config, train
from trainer.commands import run
from trainer.commands.arguments import load_config
from trainer.data import ArraySource, stack
from trainer.data.mixture import Mixture
from trainer.metrics import Mean
from trainer.observe.log import read_rows
from trainer.workdir import Workdir

ROOT = Path(__file__).parents[2]
DIGITS = "--config=configs/digits.py"
CURVES = "; its curves: tensorboard --logdir {}" if importlib.util.find_spec("tensorboard") else ""


@dataclasses.dataclass
class Linear(Task):
    """A task of one matrix, in a file that is edited between two launches."""

    def shapes(self):
        return {"kernel": (8, 3)}

    def init(self, key, batch):
        return {"params": {name: jnp.ones(shape) for name, shape in self.shapes().items()}}

    def loss(self, variables, batch, *, key, train):
        logits = batch["x"] @ variables["params"]["kernel"]  # the line to blame
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return {"loss": Mean.of(losses, batch["mask"])}, {}


@dataclasses.dataclass
class NarrowKernel(Linear):
    def shapes(self):
        return {"kernel": (5, 3)}


@dataclasses.dataclass
class Diverging(Linear):
    def init(self, key, batch):
        return {"params": {"kernel": jnp.full((8, 3), jnp.nan)}}


class FailingAt(ArraySource):
    """A source of which one example cannot be read."""

    def __init__(self, arrays, index):
        super().__init__(arrays)
        self.index = index

    def take(self, indices):
        if self.index in indices:
            raise OSError("the disk is gone")
        return super().take(indices)


@dataclasses.dataclass
class FailingEvaluation(Linear):
    """A task of which one example of the test split cannot be read."""

    at: int = 0

    def source(self, split):
        arrays = super().source(split).arrays
        return FailingAt(arrays, self.at) if split == "test" else ArraySource(arrays)


class Flipping:
    """Examples that the host flips at random."""

    def __init__(self, arrays):
        self.arrays, self.rng = arrays, np.random.default_rng(0)

    def __len__(self):
        return len(self.arrays["label"])

    def __getitem__(self, index):
        return {"x": self.arrays["x"][index] * self.rng.choice([-1, 1]), "label": self.arrays["label"][index]}


@dataclasses.dataclass
class HostRandomness(Linear):
    def source(self, split):
        return Flipping(super().source(split).arrays)


@dataclasses.dataclass
class RandomPart(Linear):
    """A mixture whose second part is random."""

    def source(self, split):
        arrays = super().source(split).arrays
        return Mixture({"fixed": (ArraySource(arrays), 1), "random": (Flipping(arrays), 1)})


@dataclasses.dataclass
class RandomTestSplit(Linear):
    def source(self, split):
        arrays = super().source(split).arrays
        return Flipping(arrays) if split == "test" else ArraySource(arrays)


@dataclasses.dataclass
class NarrowTestSplit(Linear):
    def source(self, split):
        arrays = super().source(split).arrays
        return ArraySource(arrays | {"x": arrays["x"][:, :6]} if split == "test" else arrays)


def config_file(folder: Path, experiment: str) -> str:
    """A config of one step of an experiment, such as `Task(noise=0.1)`."""
    file = folder / "config.py"
    imports = "from tests.commands.test_commands import *\nfrom trainer import Run\n"
    file.write_text(f"{imports}\ndef get_config():\n    return Run({experiment}, total_steps=1, batch_size=8)\n")
    return f"--config={file}"


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def trained(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of three steps of a small MLP on digits, with checkpoints at 2 and 3."""
    run = load_config(str(ROOT / "configs/digits.py"))
    run.experiment = dataclasses.replace(run.experiment, data_dir=str(data_dir), model="mlp", widths=(16,), hidden=None)
    run.total_steps = 3
    run.optimizer.schedule.warmup, run.optimizer.schedule.final = 1, 1e-4
    run.evaluation, run.checkpoint = config.Evaluation(), config.Checkpoint(every_steps=2)
    workdir = tmp_path_factory.mktemp("trained") / "run"
    train(run, workdir)
    return workdir


@pytest.fixture
def workdir(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained workdir."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every path below `folder` with its bytes, None for a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def one_line(stderr: str) -> str:
    """The message of a mistake, which is all that stderr has."""
    assert stderr.startswith("error: ")
    assert stderr.endswith("\n")
    assert stderr.count("\n") == 1
    return stderr.removeprefix("error: ").rstrip("\n")


def mistake(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message that a wrong command line is answered with, and nothing else."""
    assert run(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return one_line(captured.err)


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The standard output of a correct command line."""
    assert run(list(arguments)) == 0
    return capsys.readouterr().out


def shell(command: str, *, tfds: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A line typed in the root of the repository, where `python` is this interpreter, on one device."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    settings = {
        "PATH": path,
        "XLA_FLAGS": xla_flags(),
        "JAX_PLATFORMS": "cpu",
        "TFDS_DATA_DIR": str(tfds),
    } | environment
    return subprocess.run(
        command, shell=True, cwd=ROOT, env=kept | settings | environment, capture_output=True, text=True, timeout=300
    )


MISTAKES = {
    "no-such-config": (
        ["train", "--config=configs/digts.py"],
        "no config file 'configs/digts.py'; did you mean 'configs/digits.py'?",
    ),
    "no-get_config": (
        ["train", "--config=trainer/errors.py"],
        "config file 'trainer/errors.py' has no function get_config",
    ),
    "no-config": (["train"], "there is no workdir {new}; a new one needs --config=FILE"),
    "command": (["trian", DIGITS], "no command 'trian'; did you mean 'train'?"),
    "flag": (["evaluate", "--stepp=3"], "unknown flag --stepp; did you mean '--step'?"),
    "flag-of-another-command": (["train", DIGITS, "--step=3"], "unknown flag --step"),
    "flag-abbreviated": (["train", "--conf=configs/digits.py"], "unknown flag --conf; did you mean '--config'?"),
    "flag-without-value": (["train", "--config"], "argument --config: expected one argument"),
    "argument": (["train", DIGITS, "total_steps=3"], "unknown flag total_steps"),
    "field": (["train", DIGITS, "--config.batchsize=8"], "config has no field 'batchsize'; did you mean 'batch_size'?"),
    "field-of-experiment": (
        ["train", DIGITS, "--config.experiment.width=8"],
        "config.experiment has no field 'width'; did you mean 'widths'?",
    ),
    "field-with-value-apart": (
        ["train", DIGITS, "--config.sed", "3"],
        "config has no field 'sed'; did you mean 'seed'?",
    ),
    "field-without-value": (["train", DIGITS, "--config.seed"], "config.seed has no value: int is expected"),
    "type": (["train", DIGITS, "--config.total_steps=abc"], "config.total_steps is 'abc'; int is expected"),
    "type-apart": (["train", DIGITS, "--config.optimizer.b1", "x"], "config.optimizer.b1 is 'x'; float is expected"),
    "type-of-none": (["train", DIGITS, "--config.seed=None"], "config.seed is 'None'; int is expected"),
    "type-of-optional": (
        ["train", DIGITS, "--config.evaluation.every_steps=often"],
        "config.evaluation.every_steps is 'often'; int | None is expected",
    ),
    "type-of-dict": (
        ["train", DIGITS, "--config.optimizer.groups=plain"],
        "config.optimizer.groups is dict[str, Group], which no flag can set: set it in the config file",
    ),
    "field-of-none": (
        ["train", DIGITS, "--config.optimizer.groups.plain.schedule.peak=1"],
        "config.optimizer.groups.plain.schedule is None and has no field 'peak'; create it first: in the config file, ",
    ),
    "type-of-item": (["train", DIGITS, "--config.experiment.widths=a"], "experiment.widths is ('a',); tuple[int, ...]"),
    "type-of-group": (
        ["train", DIGITS, "--config.optimizer=adam"],
        "config.optimizer is a group of settings",
    ),
    "range": (["train", DIGITS, "--config.batch_size=0"], "batch_size is 0; it must be at least 1"),
    "choice": (
        ["train", DIGITS, "--config.parallel.strategy=pmapp"],
        "parallel.strategy is 'pmapp'; did you mean 'pmap'?",
    ),
    "nothing-to-evaluate": (["evaluate", DIGITS], "workdir {new} holds no checkpoint"),
    "nothing-to-inspect": (["inspect"], "there is no workdir {new}; a new one needs --config=FILE"),
    "nothing-to-prepare": (["prepare"], "there is no workdir {new}; a new one needs --config=FILE"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_on_the_command_line_is_one_line_and_leaves_nothing(name, capsys, tmp_path):
    arguments, message = MISTAKES[name]
    new = tmp_path / "new"
    found = mistake(capsys, arguments[0], f"--workdir={new}", *arguments[1:])
    assert found.startswith(message.format(new=new))
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch_size=6", "batch_size 6 does not divide over 8 batch shards: it must be a multiple of 8"),
        (
            "evaluation.batch_size=6",
            "evaluation.batch_size 6 does not divide over 8 batch shards: it must be a multiple of",
        ),
        ("parallel.devices=9", "parallel.devices is 9, but there are 8; for fake CPU devices set XLA_FLAGS="),
        ("loading.split=trian", "data set 'digits' has no split 'trian'; did you mean 'train'?"),
        ("checkpoint.best_metric=test/accurcy", "checkpoint.best_metric 'test/accurcy' is not evaluated; did you mean"),
    ],
)
def test_run_that_cannot_be_built_is_one_line_and_leaves_nothing(override, message, capsys, data_dir, tmp_path):
    where = [f"--config.experiment.data_dir={data_dir}", f"--workdir={tmp_path}/new"]
    assert mistake(capsys, "train", DIGITS, *where, f"--config.{override}").startswith(message)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_command_that_needs_a_workdir_says_so(command, capsys):
    assert mistake(capsys, command, DIGITS) == "give --workdir=DIR, the folder that the run is kept in"


@pytest.mark.parametrize(("experiment", "width"), [("NarrowKernel", 8), ("NarrowTestSplit", 6)])
def test_model_that_does_not_fit_its_batch_is_one_line_with_the_place_and_the_batch(
    experiment, width, capsys, tmp_path
):
    line = Path(__file__).read_text().partition("# the line to blame")[0].count("\n") + 1
    message = mistake(capsys, "train", config_file(tmp_path, f"{experiment}()"), f"--workdir={tmp_path}/new")
    assert message.startswith(f"the model does not fit its batch ({__file__}:{line}): TypeError: dot_general ")
    assert f"; the batch has x float32[8, {width}], label int32[8], mask float32[8] (" in message
    assert not (tmp_path / "new").exists()


def test_argument_for_a_config_that_takes_none_is_one_line(capsys, tmp_path):
    assert "get_config" in mistake(capsys, "train", f"{DIGITS}:small", f"--workdir={tmp_path}/new")


def test_unprepared_data_set_is_one_line_with_the_command_that_prepares_it(capsys, tmp_path):
    missing = f"--config.experiment.data_dir={tmp_path}/no data"
    message = mistake(capsys, "train", DIGITS, missing, f"--workdir={tmp_path}/new")
    assert message.startswith(f"data set 'digits' is not prepared in {tmp_path}/no data; prepare it with: ")
    command = shlex.split(message.partition("prepare it with: ")[2])
    assert command == ["python", "-m", "trainer", "prepare", DIGITS, missing]
    assert contents(tmp_path) == {}


def test_command_that_prepares_has_the_values_that_were_given_as_arguments_of_their_own(workdir, capsys, tmp_path):
    missing = f"--config.experiment.data_dir={tmp_path}/none"
    apart = [argument for flag in (DIGITS, missing, f"--workdir={tmp_path}/new") for argument in flag.split("=")]
    message = mistake(capsys, "train", *apart)
    assert message.endswith(f"; prepare it with: python -m trainer prepare {DIGITS} {missing}")
    message = mistake(capsys, "evaluate", "--workdir", str(workdir), *missing.split("="))
    assert message.endswith(f"; prepare it with: python -m trainer prepare --workdir={workdir} {missing}")


def test_unprepared_data_set_of_a_kept_run_is_prepared_from_its_workdir(workdir, capsys, tmp_path):
    missing = f"--config.experiment.data_dir={tmp_path}/none"
    message = mistake(capsys, "evaluate", f"--workdir={workdir}", missing)
    assert message.endswith(f"; prepare it with: python -m trainer prepare --workdir={workdir} {missing}")


def test_workdir_of_another_config_is_left_alone(workdir, capsys, data_dir):
    before = contents(workdir)
    where = [f"--config.experiment.data_dir={data_dir}", f"--workdir={workdir}"]
    message = mistake(capsys, "train", DIGITS, *where)
    assert message.startswith(
        f"workdir {workdir} holds a run with other settings: experiment.model was 'mlp', is 'cnn'"
    )
    carried = f"--init-from={workdir} --config.init_from.optimizer_state=carried"
    end = f"; choose another --workdir (to begin there from this state: {carried}), or go on with these settings "
    end += "from step 3 with --accept-changes"
    assert message.endswith(end)
    assert contents(workdir) == before


@pytest.mark.parametrize("command", ["train", "evaluate", "inspect"])
def test_kept_run_with_another_seed_is_another_run(command, workdir, capsys):
    before = contents(workdir)
    message = mistake(capsys, command, f"--workdir={workdir}", "--config.seed=1")
    assert message.startswith(f"workdir {workdir} holds a run with other settings: seed was 0, is 1;")
    assert contents(workdir) == before


def test_folder_with_foreign_files_is_left_alone(capsys, data_dir, tmp_path):
    (tmp_path / "thesis.tex").write_text("chapter 1")
    (tmp_path / ".gitignore").touch()
    message = mistake(capsys, "train", DIGITS, f"--config.experiment.data_dir={data_dir}", f"--workdir={tmp_path}")
    assert message == f"workdir {tmp_path} holds files but no run (no config.json): choose a new folder"
    assert contents(tmp_path) == {"thesis.tex": b"chapter 1", ".gitignore": b""}


def test_folder_with_the_hidden_leftovers_of_a_killed_launch_is_used(capsys, tmp_path):
    file, workdir = config_file(tmp_path, "Linear()"), tmp_path / "run"
    workdir.mkdir()
    (workdir / ".config.json.tmp").write_text("{")
    assert output(capsys, "train", file, f"--workdir={workdir}").splitlines()[-1].startswith(f"done: {workdir} has ")


def test_workdir_that_is_a_file_is_left_alone(capsys, data_dir, tmp_path):
    (tmp_path / "notes").write_text("x")
    data = f"--config.experiment.data_dir={data_dir}"
    message = mistake(capsys, "train", DIGITS, data, f"--workdir={tmp_path}/notes")
    assert message == f"workdir {tmp_path}/notes is not a folder"
    assert contents(tmp_path) == {"notes": b"x"}


def test_workdir_below_a_file_is_one_line(capsys, tmp_path):
    file = config_file(tmp_path, "Linear()")
    mistake(capsys, "train", file, f"--workdir={tmp_path}/config.py/run")


def test_workdir_that_cannot_be_written_is_one_line_and_nothing_on_standard_output(capsys, tmp_path):
    (tmp_path / "run" / ".lock").mkdir(parents=True)  # so that opening it fails for root as well
    message = mistake(capsys, "train", config_file(tmp_path, "Linear()"), f"--workdir={tmp_path}/run")
    assert message == f"nothing can be written in workdir {tmp_path}/run: Is a directory"


@pytest.mark.parametrize("command", ["evaluate", "inspect", "prepare", "train"])
def test_damaged_config_of_a_workdir_is_taken_from_its_checkpoint(command, workdir, capsys):
    whole = output(capsys, command, f"--workdir={workdir}")
    (workdir / "config.json").write_text('{"class": ')
    assert output(capsys, command, f"--workdir={workdir}").splitlines()[-2:] == whole.splitlines()[-2:]


@pytest.mark.parametrize("command", ["train", "evaluate", "inspect", "prepare"])
def test_damaged_config_of_a_workdir_without_a_checkpoint_is_one_line(command, workdir, capsys):
    shutil.rmtree(workdir / "checkpoints")
    (workdir / "config.json").write_text('{"class": ')
    before = contents(workdir)
    assert mistake(capsys, command, f"--workdir={workdir}").startswith(f"{workdir}/config.json is not valid JSON: ")
    assert contents(workdir) == before


def test_run_that_another_process_trains_is_left_alone(workdir, capsys):
    before = contents(workdir)
    with Workdir(workdir).locked():
        who = f"process {os.getpid()} on {socket.gethostname()}"
        message = mistake(capsys, "train", f"--workdir={workdir}")
        assert message == f"another process is training in workdir {workdir} ({who})"
    assert contents(workdir) == before


def test_run_that_another_process_trains_keeps_its_settings(workdir):
    before = contents(workdir)
    with Workdir(workdir).locked():
        assert run(["train", f"--workdir={workdir}", "--config.logging.every_steps=1"]) == 2
    assert contents(workdir) == before


def test_workdir_of_a_model_that_was_edited_since_is_left_alone(capsys, monkeypatch, tmp_path):
    file, workdir = config_file(tmp_path, "Linear()"), tmp_path / "run"
    output(capsys, "train", file, f"--workdir={workdir}")
    before = contents(workdir)
    monkeypatch.setattr(Linear, "shapes", lambda self: {"kernel": (8, 3), "bias": (3,)})
    message = mistake(capsys, "train", file, f"--workdir={workdir}")
    assert message.startswith("the checkpoint at step 1 does not fit this run: params/bias is missing there, ")
    assert contents(workdir) == before


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("7", "there is no checkpoint of step '7'; there are 2, 3, latest, best"),
        ("last", "there is no checkpoint of step 'last'; there are 2, 3, latest, best"),
        ("best", "no best checkpoint is kept: the run has no checkpoint.best_metric"),
    ],
)
def test_checkpoint_that_is_not_there_is_one_line(step, message, workdir, capsys):
    before = contents(workdir)
    assert mistake(capsys, "evaluate", f"--workdir={workdir}", f"--step={step}") == message
    assert contents(workdir) == before


def test_run_without_a_checkpoint_yet_is_not_evaluated(workdir, capsys):
    for step in ("2", "3"):
        shutil.rmtree(workdir / "checkpoints" / step)
    assert mistake(capsys, "evaluate", f"--workdir={workdir}") == f"workdir {workdir} holds no checkpoint"
    shutil.rmtree(workdir / "checkpoints")
    assert mistake(capsys, "evaluate", f"--workdir={workdir}") == f"workdir {workdir} holds no checkpoint"


def test_traceback_is_shown_on_request_only(capsys, tmp_path):
    arguments = ["train", "--traceback", "--config=missing.py", f"--workdir={tmp_path}/new"]
    assert run(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("Traceback (most recent call last):\n")
    assert error.splitlines()[-1].startswith("error: no config file 'missing.py'")


def test_run_that_diverges_ends_with_code_1_and_one_line(capsys, tmp_path):
    file = config_file(tmp_path, "Diverging()")
    assert run(["train", file, f"--workdir={tmp_path}/run"]) == 1
    assert one_line(capsys.readouterr().err).startswith("the loss of step 1 is nan; ")


def test_evaluate_prints_what_training_logged_and_writes_nothing(workdir, capsys):
    before = contents(workdir)
    printed = output(capsys, "evaluate", f"--workdir={workdir}")
    *_, last = read_rows(workdir / "metrics.jsonl")
    assert printed.splitlines() == [
        f"test accuracy: {last['test/accuracy']:.4f}",
        f"test loss: {last['test/loss']:.4f}",
        "test examples: 359",
        f"step 3 of {workdir}{CURVES.format(workdir)}",
    ]
    assert contents(workdir) == before


def test_evaluate_names_the_command_for_curves_where_tensorboard_is_installed(workdir, capsys, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tensorboard", None)  # as if it were not installed
        assert output(capsys, "evaluate", f"--workdir={workdir}").splitlines()[-1] == f"step 3 of {workdir}"
    (tmp_path / "path" / "tensorboard").mkdir(parents=True)
    (tmp_path / "path" / "tensorboard" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "path")
    last = output(capsys, "evaluate", f"--workdir={workdir}").splitlines()[-1]
    assert last == f"step 3 of {workdir}; its curves: tensorboard --logdir {workdir}"


def test_evaluate_takes_an_earlier_step_and_another_split(workdir, capsys):
    printed = output(capsys, "evaluate", f"--workdir={workdir}", "--step=2", "--config.evaluation.split", "train[:100]")
    accuracy, loss, examples, last = printed.splitlines()
    assert re.fullmatch(r"train\[:100\] accuracy: 0\.\d{4}", accuracy)
    assert re.fullmatch(r"train\[:100\] loss: \d\.\d{4}", loss)
    assert examples == "train[:100] examples: 100"
    assert last == f"step 2 of {workdir}{CURVES.format(workdir)}"


@pytest.mark.parametrize("step", ["latest", "best"])
def test_evaluate_takes_a_split_that_does_not_have_the_best_metric(step, capsys, tmp_path):
    workdir, every = f"--workdir={tmp_path}/run", "every_steps=1"
    best = [f"--config.evaluation.{every}", f"--config.checkpoint.{every}", "--config.checkpoint.best_metric=test/loss"]
    output(capsys, "train", config_file(tmp_path, "Linear()"), workdir, *best)
    loss, examples, last = output(capsys, "evaluate", workdir, "--split=train", f"--step={step}").splitlines()
    assert re.fullmatch(r"train loss: \d\.\d{4}", loss)
    assert examples == "train examples: 50"
    said = ", the best by test/loss" if step == "best" else ""
    assert last == f"step 1 of {tmp_path}/run{said}{CURVES.format(tmp_path / 'run')}"


def tried(printed: str) -> dict[str, str]:
    """The table of a dry run: what was tried, and its result, without the seconds."""
    header, *lines, end = printed.splitlines()
    assert (header.split(), end) == (["tried", "result", "seconds"], "nothing of this dry run is kept")
    rows = [re.fullmatch(r"(.+?)  +(.+?)  +\d+\.\d", line) for line in lines]
    return {row[1]: row[2] for row in rows if row}


def test_dry_run_tries_the_first_steps_an_evaluation_a_save_and_a_restore_and_leaves_nothing(
    capsys, monkeypatch, data_dir, tmp_path
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    small = [
        f"--config.experiment.{field}" for field in (f"data_dir={data_dir}", "model=mlp", "widths=16,", "hidden=None")
    ]
    arguments = [DIGITS, *small, "--config.logging.every_steps=1"]
    result = tried(output(capsys, "train", "--dry-run", *arguments, f"--workdir={tmp_path}/run"))
    assert contents(tmp_path) == {"tmp": None}
    assert list(result) == ["model and data", "3 of 1,000 steps", "evaluation", "save", "restore"]
    assert result["model and data"] == "1,438 examples to train on, 359 to evaluate on"
    assert re.fullmatch(r"test accuracy: 0\.\d{4}, test loss: \d\.\d{4} \(128 examples\)", result["evaluation"])
    assert int(result["save"].removesuffix(" bytes").replace(",", "")) > 3 * 4 * (64 * 16 + 16 + 16 * 10 + 10)
    assert result["restore"] == "every array equals the saved one, bit for bit"
    # The steps are those of the whole run, whose warm-up takes 50 steps.
    settings = [
        "--config.total_steps=3",
        "--config.optimizer.schedule.run_steps=1000",
        "--config.evaluation.every_steps=3",
    ]
    output(capsys, "train", *arguments, *settings, "--config.checkpoint.every_steps=3", f"--workdir={tmp_path}/run")
    losses = ", ".join(f"{row['train/loss']:.4f}" for row in read_rows(tmp_path / "run" / "metrics.jsonl"))
    assert result["3 of 1,000 steps"] == f"loss {losses}; the run's own schedules"


def test_dry_run_needs_no_workdir_and_takes_runs_of_fewer_steps(capsys, tmp_path):
    result = tried(output(capsys, "train", "--dry-run", config_file(tmp_path, "Linear()")))
    assert [name for name in result if "steps" in name] == ["1 of 1 steps"]


def test_dry_run_fails_with_an_evaluation_that_fails(capsys, tmp_path):
    with pytest.raises(OSError, match="the disk is gone"):
        run(["train", "--dry-run", config_file(tmp_path, "FailingEvaluation(at=3)")])
    assert capsys.readouterr().out == ""
    # Only two batches are tried.
    assert tried(output(capsys, "train", "--dry-run", config_file(tmp_path, "FailingEvaluation(at=17)")))


@pytest.mark.parametrize(
    ("experiment", "code", "message"),
    [
        ("NarrowKernel()", 2, "the model does not fit its batch ("),
        ("HostRandomness()", 2, "entry 'x' of the data differs each time an example is read; "),
        ("RandomPart()", 2, "entry 'x' of the data differs each time an example is read; "),
        ("Diverging()", 1, "the loss of step 1 is nan; "),
    ],
)
def test_dry_run_fails_as_the_run_would_and_prints_nothing_else(experiment, code, message, capsys, tmp_path):
    file = config_file(tmp_path, experiment)
    for arguments in (["--dry-run"], [f"--workdir={tmp_path}/run"]):
        assert run(["train", file, *arguments]) == code
        captured = capsys.readouterr()
        assert one_line(captured.err).startswith(message)
    assert run(["train", file, "--dry-run"]) == code
    assert capsys.readouterr().out == ""


def test_dry_run_takes_a_random_split_that_the_run_does_not_load(capsys, tmp_path):
    source = RandomTestSplit().source("test")
    size = sum(array.nbytes for array in stack([source[0]]).values())
    flags = [f"--config.loading.in_memory_bytes={size * (len(source) - 1)}"]
    file = config_file(tmp_path, "RandomTestSplit()")
    assert tried(output(capsys, "train", "--dry-run", file, *flags))
    output(capsys, "train", file, *flags, f"--workdir={tmp_path}/run")
    flags += ["--config.evaluation.max_examples=8"]  # these would be in memory
    for command in (["--dry-run"], [f"--workdir={tmp_path}/other"]):
        assert run(["train", file, *flags, *command]) == 2
        assert "differs each time an example is read" in one_line(capsys.readouterr().err)


def test_dry_run_of_a_run_that_carries_a_state_on_tries_its_first_steps(capsys, tmp_path):
    file = config_file(tmp_path, "Task(noise=0.1)")
    old = ["--config.parallel.devices=1", "--config.total_steps=2", f"--workdir={tmp_path}/old"]
    output(capsys, "train", file, *old)
    flags = [file, "--config.parallel.devices=1", "--config.logging.every_steps=1", f"--init-from={tmp_path}/old"]
    flags += ["--config.init_from.optimizer_state=carried", "--config.total_steps=7"]
    result = tried(output(capsys, "train", "--dry-run", *flags))
    output(capsys, "train", *flags, f"--workdir={tmp_path}/run")
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "train/loss" in row]
    assert [row["step"] for row in rows] == [3, 4, 5, 6, 7]
    losses = ", ".join(f"{row['train/loss']:.4f}" for row in rows[:3])
    assert result["3 of 7 steps"] == f"loss {losses}; the run's own schedules"
    code = run(["train", "--dry-run", *flags, "--config.total_steps=2"])
    assert code == 2
    assert "is already at step 2" in one_line(capsys.readouterr().err)


def test_inspect_shows_settings_labels_devices_and_checkpoints_and_writes_nothing(workdir, capsys):
    before = contents(workdir)
    printed = output(capsys, "inspect", f"--workdir={workdir}")
    settings = (workdir / "config.json").read_text()
    labels = (workdir / "params.txt").read_text()
    assert printed.startswith(f"{settings}\n{labels}\n")
    rest = printed.removeprefix(f"{settings}\n{labels}\n").splitlines()
    parameters = 64 * 16 + 16 + 16 * 10 + 10
    assert rest[0].startswith("devices: 8 × cpu, strategy data, jax ")
    assert rest[1:] == [
        "examples: 1,438 to train on, 359 to evaluate on",
        # Parameters and two moments of 4 bytes; the step and the count of the optimizer.
        f"state: {3 * 4 * parameters + 2 * 4:,} bytes with the optimizer's moments",
        "memory and operations of the two steps: inspect --compile",
        "checkpoints: 2, 3",
    ]
    assert contents(workdir) == before


def test_inspect_shows_a_run_before_it_is_launched(capsys, data_dir, tmp_path):
    where = [f"--config.experiment.data_dir={data_dir}", f"--workdir={tmp_path}/new"]
    printed = output(capsys, "inspect", DIGITS, *where, "--config.total_steps=300")
    kept = config.from_json(printed[: printed.index("\n}\n") + 2])
    assert kept.total_steps == kept.optimizer.schedule.run_steps == 300
    assert "checkpoints" not in printed.splitlines()[-1]
    assert contents(tmp_path) == {}


def test_prepare_changes_nothing_the_second_time(capsys, data_dir):
    before = contents(data_dir)
    printed = output(capsys, "prepare", DIGITS, f"--config.experiment.data_dir={data_dir}")
    assert printed == "the data is prepared\n"
    assert contents(data_dir) == before


def test_prepare_says_when_there_is_nothing_to_prepare(capsys, tmp_path):
    assert output(capsys, "prepare", config_file(tmp_path, "Task()")) == "Task has no data to prepare\n"


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["help"]])
def test_help_lists_every_command(arguments, capsys):
    printed = output(capsys, *arguments)
    files = {file.stem for file in (ROOT / "trainer/commands").glob("*.py")} - {"__init__", "arguments"}
    assert set(re.findall(r"^  ([\w-]+)  ", printed, re.MULTILINE)) == {file.replace("_", "-") for file in files}


def test_no_command_at_all_prints_the_usage_and_is_a_mistake(capsys):
    assert run([]) == 2
    assert capsys.readouterr().out.startswith("usage: python -m trainer COMMAND ")


RESUME = {"--accept-changes", "--from-step", "--init-from"}
GROUP = {"--coordinator", "--process", "--processes", "--wait", "--heartbeat"}


@pytest.mark.parametrize(
    ("command", "own"),
    [
        (
            "train",
            {"--dry-run", "--profile", *RESUME, "--check-determinism", "--trace", "--until", "--compile-once", *GROUP},
        ),
        ("evaluate", {"--step", "--split", *GROUP}),
        ("generate", {"--prompt", "--length", "--temperature", "--top-k", "--seed", "--step"}),
        ("inspect", {"--probe", "--compile", "--verify"}),
        ("prepare", set()),
        (
            "sweep",
            {"--grid", "--random", "--trials", "--search-seed", "--metric", "--mode", "--halving", "--first-rung"}
            | {"--jobs", "--cell", "--compile-once", "--report"},
        ),
        ("rehearse", {"--processes", "--devices", "--command", "--profile", "--step"}),
    ],
)
def test_help_of_a_command_explains_its_flags(command, own, capsys):
    try:
        code: Any = run([command, "--help"])
    except SystemExit as stop:
        code = stop.code
    assert code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: python -m trainer {command} --config=FILE[:arg] --workdir=DIR ")
    assert set(re.findall(r"^  (?:-h, )?(--[\w-]+)", printed, re.MULTILINE)) == own | {
        "--help",
        "--config",
        "--workdir",
        "--compilation-cache",
        "--traceback",
    }


def test_help_answers_within_a_second(tmp_path):
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        result = shell("python -m trainer --help", tfds=tmp_path)
        seconds.append(time.perf_counter() - start)
        assert (result.returncode, result.stderr) == (0, "")
    assert min(seconds) < 1


@pytest.mark.parametrize("arguments", [["--help"], ["trian"]])
def test_usage_is_shown_without_importing_jax(arguments, tmp_path):
    code = f"import sys; from trainer.commands import run; run({arguments}); sys.exit('jax' in sys.modules)"
    assert shell(f"python -c {shlex.quote(code)}", tfds=tmp_path).returncode == 0


def test_output_closed_by_its_reader_is_no_error_message():
    reader, writer = os.pipe()
    os.close(reader)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    result = subprocess.run(
        [sys.executable, "-m", "trainer", "--help"], env=environment, stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)
    assert (result.returncode, result.stderr) == (141, b"")


def test_mistake_typed_into_a_shell_is_one_line(tmp_path):
    result = shell(f"python -m trainer train {DIGITS} --workdir={tmp_path}/new --config.sed=3", tfds=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert one_line(result.stderr).startswith("config has no field 'sed'; did you mean 'seed'?")
    assert contents(tmp_path) == {}


@pytest.mark.slow
def test_batch_that_does_not_divide_over_the_devices_is_one_line_in_a_shell(data_dir, tmp_path):
    command = f"python -m trainer train {DIGITS} --workdir={tmp_path}/new --config.batch_size=6"
    result = shell(command, tfds=data_dir, XLA_FLAGS=xla_flags(devices=4))
    assert result.returncode == 2
    assert one_line(result.stderr) == "batch_size 6 does not divide over 4 batch shards: it must be a multiple of 4"
    assert contents(tmp_path) == {}


@pytest.mark.slow
def test_checkpoint_that_is_not_there_is_one_line_in_a_shell(trained, data_dir):
    result = shell(f"python -m trainer evaluate --workdir={trained} --step=7", tfds=data_dir)
    assert result.returncode == 2
    assert one_line(result.stderr).startswith("there is no checkpoint of step '7'")


@pytest.mark.slow
def test_command_that_the_error_suggests_prepares_the_data_and_training_starts(tmp_path):
    small = "--config.experiment.widths=4,4 --config.experiment.hidden=8 --config.optimizer.schedule.warmup=0"
    data, workdir = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    launch = f"python -m trainer train {DIGITS} {small} --config.total_steps=2 --workdir={workdir}"
    refused = shell(launch, tfds=data)
    assert refused.returncode == 2
    assert contents(data) == {}
    assert not workdir.exists()
    command = one_line(refused.stderr).partition("prepare it with: ")[2]
    assert command.startswith(f"python -m trainer prepare {DIGITS} ")
    prepared = shell(command, tfds=data)
    assert prepared.returncode == 0, prepared.stderr
    started = shell(launch, tfds=data)
    assert (started.returncode, started.stderr) == (0, "")
    assert [row["step"] for row in read_rows(workdir / "metrics.jsonl")] == [2]


@pytest.mark.slow
def test_dry_run_typed_into_a_shell_runs_whatever_the_warm_up(data_dir, tmp_path):
    small = "--config.experiment.widths=4,4 --config.experiment.hidden=8"
    result = shell(f"python -m trainer train --dry-run {DIGITS} {small}", tfds=data_dir, TMPDIR=str(tmp_path))
    assert (result.returncode, result.stderr) == (0, "")
    assert tried(result.stdout)["restore"] == "every array equals the saved one, bit for bit"
    assert contents(tmp_path) == {}
