"""Three models of Flax's examples, unchanged, as experiments of a user in a folder outside the repository."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.flax_models import fetch
from tests import xla_flags

ROOT = Path(__file__).parents[1]
# Small, but with every layer of each model.
SMALL: dict[str, dict[str, int]] = {
    "vae": {"total_steps": 60, "experiment.latents": 4},
    "resnet": {"total_steps": 30, "experiment.filters": 8, "optimizer.schedule.warmup": 5},
    "lm1b": {
        "total_steps": 30,
        "batch_size": 16,
        "experiment.width": 32,
        "experiment.length": 16,
        "optimizer.schedule.warmup": 5,
    },
}
ALL = {"logging.every_steps": 1, "evaluation.max_examples": 256}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: the three experiments, and each model's file from the source distribution of Flax."""
    place = tmp_path_factory.mktemp("user")
    fetch(place)
    return place


@pytest.mark.parametrize("name", SMALL)
def test_the_experiment_of_a_user_is_short_and_imports_nothing_of_this_repository_but_the_harness(name):
    text = (ROOT / "tests" / "flax_examples" / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 60
    statements = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not any(node.level for node in statements if isinstance(node, ast.ImportFrom))
    names = {node.module or "" for node in statements if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in statements if isinstance(node, ast.Import) for alias in node.names}
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert {"trainer", "experiments", "tests"} <= packages
    assert {name.partition(".")[0] for name in names} & packages == {"trainer"}


def tiles(file: Path) -> np.ndarray:
    """The images [N, 28, 28] of a grid, from 0 to 1."""
    pixels = np.asarray(Image.open(file)) / 255
    rows, columns = (size // 28 for size in pixels.shape)
    return pixels.reshape(rows, 28, columns, 28).swapaxes(1, 2).reshape(-1, 28, 28)


def call(folder: Path, *arguments: str, devices: int = 1) -> str:
    """The output of a command in the user's folder."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": xla_flags(devices)}
    command = [sys.executable, "-m", "trainer", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(folder: Path, name: str, workdir: str, settings: dict[str, int], devices: int = 1) -> list[float]:
    """The loss of each step of a run."""
    flags = [f"--config.{setting}={value}" for setting, value in (ALL | settings).items()]
    call(folder, "train", f"--config={name}.py", f"--workdir={workdir}", *flags, devices=devices)
    lines = (folder / workdir / "metrics.jsonl").read_text().splitlines()
    return [row["train/loss"] for row in map(json.loads, lines) if "train/loss" in row]


@pytest.mark.parametrize("name", ["vae", "lm1b", pytest.param("resnet", marks=pytest.mark.exhaustive)])
def test_a_model_of_flax_trains_unchanged_on_one_device_and_on_four(name, folder):
    assert not folder.resolve().is_relative_to(ROOT)
    one = losses(folder, name, f"{name}-1", SMALL[name])
    four = losses(folder, name, f"{name}-4", SMALL[name] | {"total_steps": 6}, devices=4)
    assert sum(one[-5:]) < 0.9 * sum(one[:5])
    assert four[0] == pytest.approx(one[0], rel=1e-4)
    assert "test loss: " in call(folder, "evaluate", f"--workdir={name}-1")  # by the workdir alone
    if name == "vae":
        written = sorted(path.name for path in (folder / "vae-1" / "reports" / "60").iterdir())
        assert written == ["reconstructions.png", "samples.png"]
        images, found = np.split(tiles(folder / "vae-1" / "reports" / "60" / "reconstructions.png"), 2)
        assert ((found - images) ** 2).mean() < 0.8 * ((images.mean(0) - images) ** 2).mean()
        assert tiles(folder / "vae-1" / "reports" / "60" / "samples.png").std() > 0.1


def test_a_resnet_of_flax_trains_unchanged_in_a_few_steps_of_few_images(folder):
    settings = {"total_steps": 12, "batch_size": 16, "experiment.filters": 8, "optimizer.schedule.warmup": 2}
    found = losses(folder, "resnet", "resnet", settings | {"evaluation.batch_size": 16, "evaluation.max_examples": 32})
    assert sum(found[-5:]) < 0.9 * sum(found[:5])
