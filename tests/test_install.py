"""The wheel is all that a user needs: their own experiment and config in a folder of their own, and one command."""

import ast
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import trainer
from trainer.observe.log import read_rows

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]

EXPERIMENT = '''
import dataclasses

import flax.linen as nn
import numpy as np

from trainer import ArraySource, Mean


@dataclasses.dataclass
class Line:
    """Points on y = 3 x."""

    slope: float = 3.0

    def init(self, key, batch):
        return nn.Dense(1, name="dense").init(key, batch["x"])

    def loss(self, variables, batch, *, key, train):
        y = nn.Dense(1, name="dense").apply(variables, batch["x"])
        return {"loss": Mean.of(((y - batch["y"]) ** 2)[:, 0], batch["mask"])}, {}

    def source(self, split):
        x = np.linspace(-1, 1, 40 if split == "train" else 10, dtype=np.float32)[:, None]
        return ArraySource({"x": x, "y": self.slope * x})
'''

CONFIG = """
from my_experiment import Line
from trainer.config import Logging, Optimizer, Run, Schedule


def get_config():
    optimizer = Optimizer(schedule=Schedule("constant", peak=0.1))
    return Run(Line(), total_steps=30, batch_size=8, optimizer=optimizer, logging=Logging(every_steps=10))
"""

FROM_PYTHON = """
import trainer
from my_config import get_config
from trainer import train

print(trainer.__file__)
print("final step", int(train(get_config(), "from_python").step))
"""

# Every public name in a place where another type would be reported.
TYPED = """
import dataclasses
from pathlib import Path
from typing import assert_type

import jax.numpy as jnp
import numpy as np
import optax

from my_experiment import Line
from trainer import (
    ArraySource,
    Checkpoint,
    CollectiveError,
    DivergedError,
    Evaluation,
    Experiment,
    Group,
    HostError,
    HuggingFaceSource,
    InitFrom,
    Interrupted,
    Loading,
    Logging,
    Mean,
    Mixture,
    NotPreparedError,
    Numerics,
    Optimizer,
    Parallel,
    ParquetSource,
    Run,
    Schedule,
    Sweep,
    TfdsSource,
    Trained,
    TrainState,
    UserError,
    Watch,
    adabelief,
    evaluate,
    from_optax,
    load,
    replica_axis,
    scale_by_belief,
    setting,
    take,
    train,
)
from trainer.optim.fused import ScaleByBeliefState

experiment: Experiment = Line(slope=2.0)
optimizer = Optimizer(schedule=Schedule("cosine", peak=0.1), groups={"default": Group(frozen=False)})
run = Run(experiment, total_steps=30, optimizer=optimizer)
assert_type(run.optimizer.schedule.peak, float)
assert_type(run.optimizer.groups["default"], Group)
assert_type((run.loading, run.evaluation, run.checkpoint), tuple[Loading, Evaluation, Checkpoint])
assert_type((run.logging, run.parallel), tuple[Logging, Parallel])
assert_type((run.watch, run.numerics, run.init_from), tuple[Watch, Numerics, InitFrom | None])
assert_type(train(run, Path("run"), verbose=False, handle_signals=False), TrainState)
assert_type(replica_axis(), str | None)
assert_type(Mean.of(jnp.ones(3), jnp.ones(3)).compute(), float)
assert_type(len(ArraySource({"x": np.ones(3)})) + len(TfdsSource("mnist", "test", ("image",))), int)
assert_type(len(ParquetSource("data", ("text",))) + len(HuggingFaceSource("data", ("text",))), int)
assert_type(adabelief(1e-3), optax.GradientTransformationExtraArgs)
assert_type(scale_by_belief(b1=0.5), optax.GradientTransformationExtraArgs)
assert_type(from_optax(optax.adabelief(1e-3).init({})), ScaleByBeliefState)
assert_type(evaluate("run", step="best", split="train"), dict[str, float])
assert_type(load("run", "best"), Trained)
assert_type(len(Mixture({"a": (ArraySource({"x": np.ones(3)}), 0.5)})), int)
assert_type(take(ArraySource({"x": np.ones(3)}), np.arange(2)), dict[str, np.ndarray])
assert_type(Sweep(grid={"seed": (0, 1), "batch_size": "32,64"}, halving=3).trials, int)
mistakes: tuple[type[UserError], ...] = (UserError, NotPreparedError)
collective: tuple[type[CollectiveError], ...] = (DivergedError, Interrupted)


@dataclasses.dataclass
class Wide(Line):
    width: int = setting(3, minimum=1)
"""

# A mistake a line, and what is to be said of it.
MISTYPED = {
    "trainer.trian": "No attribute `trian` in module `trainer`",
    'trainer.Run("line", total_steps=1)': "not assignable to parameter `experiment` with type `Experiment`",
    'trainer.Run(Line(), total_steps="1")': "not assignable to parameter `total_steps` with type `int`",
    "trainer.Schedule(peek=0.1)": "Unexpected keyword argument `peek`",
    "trainer.Group(weight_decay=None)": "not assignable to parameter `weight_decay` with type `float`",
    "trainer.train(trainer.Optimizer(), 'run')": "not assignable to parameter `run` with type `Run`",
    "trainer.Mean.single(1).average()": "no attribute `average`",
    "trainer.adabelief(1e-3, decay='both')": "not assignable to parameter `decay`",
}


def call(*command: str | Path, cwd: Path = ROOT, code: int = 0) -> str:
    """The output of a command that ends with an exit code; nothing of this checkout is on its path."""
    hidden = ("PYTHONPATH", "XLA_FLAGS", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    call(*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT)
    (file,) = folder.iterdir()
    return file


@pytest.fixture(scope="module")
def venv(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel installed, and the dependencies of this one."""
    folder = tmp_path_factory.mktemp("user") / "venv"
    call(sys.executable, "-m", "venv", "--without-pip", folder)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", folder / "bin" / "python"]
    call(*pip, "install", "--quiet", "--no-deps", "--no-index", "--find-links", wheel.parent, "belief-trainer")
    outer, inner = (Path(sysconfig.get_path("purelib", vars=paths)) for paths in ({}, {"base": str(folder)}))
    # A plain path: the .pth files that lie there, the editable install of this checkout among them, are not read.
    (inner / "dependencies.pth").write_text(f"{outer}\n")
    return folder


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A user's own folder."""
    (tmp_path / "my_experiment.py").write_text(EXPERIMENT)
    (tmp_path / "my_config.py").write_text(CONFIG)
    return tmp_path


def test_wheel_holds_the_package_trainer_alone(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names} == {"trainer", f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"}
    sources = {file.relative_to(ROOT).as_posix() for file in (ROOT / "trainer").rglob("*.py")}
    assert {name for name in names if name.startswith("trainer/")} == sources | {"trainer/py.typed"}


def type_check(venv: Path, home: Path, *, errors: bool) -> list[str]:
    """The lines that pyrefly prints about the Python files of a user's folder."""
    (home / "pyrefly.toml").write_text('preset = "strict"\n')
    interpreter = f"--python-interpreter-path={venv / 'bin' / 'python'}"
    pyrefly = Path(sysconfig.get_path("scripts")) / "pyrefly"
    return call(
        pyrefly, "check", interpreter, "--output-format=min-text", *home.glob("checked.py"), cwd=home, code=int(errors)
    ).splitlines()


def test_type_checker_knows_every_public_name_in_a_users_project(venv, home):
    (imported,) = [node for node in ast.parse(TYPED).body if getattr(node, "module", "") == "trainer"]
    assert isinstance(imported, ast.ImportFrom)
    assert {alias.name for alias in imported.names} == set(dir(trainer))
    (home / "checked.py").write_text(TYPED)
    assert type_check(venv, home, errors=False) == []


def test_type_checker_reports_each_wrong_use_in_a_users_project(venv, home):
    (home / "checked.py").write_text("\n".join(["import trainer; from my_experiment import Line", *MISTYPED]))
    found = type_check(venv, home, errors=True)
    lines = [int(match[1]) for match in (re.search(r"checked\.py:(\d+):", line) for line in found) if match]
    assert lines == list(range(2, 2 + len(MISTYPED))), found
    for line, expected in zip(found, MISTYPED.values(), strict=True):
        assert expected in line


def test_user_trains_and_evaluates_an_experiment_of_their_own(venv, home):
    trainer = venv / "bin" / "trainer"
    trained = call(trainer, "train", "--config=my_config.py", "--workdir=run", cwd=home)
    assert trained.splitlines()[-1].startswith("done: run has checkpoints/")
    *_, last = read_rows(home / "run" / "metrics.jsonl")
    assert last["step"] == 30
    assert last["test/loss"] < 1.0

    evaluated = call(trainer, "evaluate", "--workdir=run", cwd=home)
    assert evaluated.splitlines()[:2] == [f"test loss: {last['test/loss']:.4f}", "test examples: 10"]

    printed = call(venv / "bin" / "python", "-c", FROM_PYTHON, cwd=home).splitlines()
    assert Path(printed[0]).is_relative_to(venv)
    assert printed[-1] == "final step 30"
    metrics = [(home / run / "metrics.jsonl").read_bytes() for run in ("run", "from_python")]
    assert metrics[0] == metrics[1]
