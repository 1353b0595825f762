"""docs/sweeps.md: its first sweep runs, on fewer cells and steps, and its other commands are understood."""

import csv
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from trainer import config
from trainer.commands import run as command

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "sweeps.md").read_text()
COMMANDS = re.findall(r"^\$ python -m trainer (.*)", PAGE, re.MULTILINE)


@pytest.fixture
def here(tmp_path, monkeypatch, data_dir):
    """A folder with the configs, in which the commands of the page run."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    return tmp_path


@pytest.mark.slow
def test_the_first_sweep_of_the_page_runs_and_shows_what_it_says(here, capsys):
    few = ["--grid=seed=0,1", "--config.total_steps=60", "--config.experiment.hidden=16", "--config.parallel.devices=1"]
    words = [word for word in shlex.split(COMMANDS[0]) if not word.startswith("--grid=seed=")]
    assert command([*words, *few]) == 0
    shown = capsys.readouterr().out
    assert "4 cells in sweeps/digits, 4 for this process, 2 at a time\n" in shown
    (example,) = re.findall(r"^\$ python.*?--jobs=2\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    lines = [line for line in example.splitlines() if line != "..."]
    numbers = re.compile(r"\d[\d,.]*(?:e-\d+)?(?: ± [\d.]+)?|[+-](?=\d)")

    def form(text: str) -> str:
        return re.sub(r" +", " ", numbers.sub("#", text)).strip().replace("+#", "#").replace("-#", "#")

    forms = {form(line) for line in shown.splitlines()}
    assert [line for line in lines if form(line) not in forms] == []
    rows = list(csv.DictReader((here / "sweeps/digits/results.csv").read_text().splitlines()))
    assert [row["cell"] for row in rows] == sorted(
        path.name for path in (here / "sweeps/digits").iterdir() if path.is_dir()
    )
    assert {row["status"] for row in rows} == {"done"}
    assert (here / "sweeps/digits/results.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("number", "cells"), [(0, 6), (1, 20), (2, 9)])
def test_the_commands_of_the_page_have_so_many_cells(number, cells, here, capsys):
    assert command([*shlex.split(COMMANDS[number]), "--report"]) == 0
    counts = re.findall(r"(\d+) open$", capsys.readouterr().out, re.MULTILINE)
    assert sum(map(int, counts)) == cells
    assert len(COMMANDS) == 3


def test_the_config_of_the_page_describes_the_same_sweep(here, capsys):
    (text,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (here / "described.py").write_text(text)
    shown = []
    for words in (["sweep", "--config=described.py", "--workdir=sweeps/digits"], shlex.split(COMMANDS[0])):
        assert command([*words, "--report"]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]


def test_the_draws_of_the_halving_are_those_of_the_page(here, capsys):
    assert command([*shlex.split(COMMANDS[2]), "--report"]) == 0
    drawn = re.findall(r"^ +([\d.]+) +0", capsys.readouterr().out, re.MULTILINE)
    (table,) = re.findall(r"--halving=3\n(.*?)```", PAGE, re.DOTALL)
    rows = re.findall(r"^ +([\d.]+) +1 +[\d.]+ +([\d,]+) ", table, re.MULTILINE)
    assert sorted(drawn) == sorted(peak for peak, _ in rows)
    steps = sorted(int(step.replace(",", "")) for _, step in rows)
    assert steps == [111] * 6 + [333] * 2 + [1000]
    assert f"{sum(steps):,} steps here instead of {9 * 1000:,}" in PAGE


def test_the_command_for_slurm_is_that_of_its_script():
    (line,) = re.findall(r"^sbatch .*slurm_sweep\.sh.*$", PAGE, re.MULTILINE)
    assert f"#   {line}\n" in (ROOT / "deploy" / "slurm_sweep.sh").read_text()


def test_every_field_of_a_sweep_has_its_flag(capsys):
    assert command(["sweep", "--help"]) == 0
    flags = set(re.findall(r"^  --([\w-]+)", capsys.readouterr().out, re.MULTILINE))
    assert {name.replace("_", "-") for name in vars(config.Sweep())} <= flags


def test_the_plot_is_optional(here, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    (here / "sweeps/digits").mkdir(parents=True)
    assert command([*shlex.split(COMMANDS[0]), "--report"]) == 0
    assert "results.csv, no plot: pip install 'belief-trainer[sweep]'\n" in capsys.readouterr().out
    assert [path.name for path in (here / "sweeps/digits").iterdir()] == ["results.csv"]
