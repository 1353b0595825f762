"""The wheel is all that a user needs: their own experiment and config in a folder of their own, and one command."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

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


def call(*command: str | Path, cwd: Path = ROOT) -> str:
    """What a command prints, once it has succeeded; nothing of this checkout is on its path."""
    hidden = ("PYTHONPATH", "XLA_FLAGS", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
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
    """An environment with the wheel installed, which takes the dependencies from this one."""
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
    assert {name for name in names if name.startswith("trainer/")} == sources


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
