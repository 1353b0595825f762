"""The README's own experiment, as written there, by the real command."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()


def files() -> dict[str, str]:
    """Every Python block of the README by the file name that introduces it."""
    return dict(re.findall(r"`(\w+\.py)`[^\n]*:\n\n```python\n(.*?)```", README, re.DOTALL))


def test_the_example_is_short():
    lines = [line for text in files().values() for line in text.splitlines() if line.strip()]
    assert set(files()) == {"spirals.py"}
    assert len(lines) < 40


def test_the_page_is_short_and_begins_with_the_commands_and_the_example():
    headings = re.findall(r"^## (.*)", README, re.MULTILINE)
    assert headings == [
        *("Your own experiment", "Kill and resume", "Use the model", "Labels", "Many devices", "What it is not"),
    ]
    assert README.index("make demo") < README.index("## Your own experiment")
    assert len(README.splitlines()) <= 180


def test_the_label_table_is_that_of_the_demo():
    assert (Path(__file__).parent / "golden" / "digits.txt").read_text() in README


@pytest.mark.slow
def test_the_example_learns(tmp_path):
    for name, text in files().items():
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "train", "--config=spirals.py", "--workdir=run"],
        cwd=tmp_path,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    accuracy = re.search(r"test accuracy: ([\d.]+)", done.stdout)
    assert accuracy is not None
    assert float(accuracy[1]) > 0.95
    assert done.stderr == ""


def test_every_command_and_file_that_it_names_is_there():
    from trainer.commands import _COMMANDS

    assert set(re.findall(r"python -m trainer ([\w-]+)", README)) == set(_COMMANDS)
    root = Path(__file__).parent.parent
    for target in re.findall(r"\]\(([\w./]+)\)", README):
        assert (root / target).exists(), target
