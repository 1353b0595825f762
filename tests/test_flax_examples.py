"""Three models of Flax's examples, unchanged, as experiments of a user in a folder outside the repository."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.flax_models import fetch
from tests import xla_flags

ROOT = Path(__file__).parents[1]
# Small, but with every layer of each model.
SMALL = {
    "vae": ("--config.total_steps=60", "--config.experiment.latents=4"),
    "resnet": ("--config.total_steps=30", "--config.experiment.filters=8", "--config.optimizer.schedule.warmup=5"),
    "lm1b": ("--config.total_steps=30", "--config.experiment.width=32", "--config.optimizer.schedule.warmup=5"),
}
ALL = ("--config.logging.every_steps=1", "--config.evaluation.max_examples=256")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: the three experiments, and each model's file from the source distribution of Flax."""
    place = tmp_path_factory.mktemp("user")
    fetch(place)
    return place


def call(folder: Path, *arguments: str, devices: int = 1) -> str:
    """The output of a command in the user's folder."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": xla_flags(devices)}
    command = [sys.executable, "-m", "trainer", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["vae", "lm1b", pytest.param("resnet", marks=pytest.mark.exhaustive)])
def test_a_model_of_flax_trains_unchanged_on_one_device_and_on_four(name, folder):
    assert len((folder / f"{name}.py").read_text().splitlines()) <= 60
    losses = []
    for devices in (1, 4):
        run = (f"--config={name}.py", f"--workdir={name}-{devices}", *SMALL[name])
        call(folder, "train", *run, *ALL, devices=devices)
        lines = (folder / f"{name}-{devices}" / "metrics.jsonl").read_text().splitlines()
        losses.append([row["train/loss"] for row in map(json.loads, lines) if "train/loss" in row])
    one, four = losses
    assert sum(one[-5:]) < 0.9 * sum(one[:5])
    assert four[0] == pytest.approx(one[0], rel=1e-4)
    assert "test loss: " in call(folder, "evaluate", f"--workdir={name}-1")  # by the workdir alone
    if name == "vae":
        written = sorted(path.name for path in (folder / "vae-1" / "reports" / "60").iterdir())
        assert written == ["reconstructions.png", "samples.png"]
