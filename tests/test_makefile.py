"""The Makefile: what each target installs, and how many workers run the tests."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def commands(target: str, venv: Path) -> str:
    """The commands that make would run where no environment exists yet."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "WORKERS", "VENV"))}
    done = subprocess.run(
        ["make", "--dry-run", f"VENV={venv}", target],
        cwd=ROOT,
        env=clean,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_quick_does_not_install_the_tpu_compiler_and_leaves_out_its_tests(tmp_path):
    quick, every = commands("quick", tmp_path / "venv"), commands("test", tmp_path / "venv")
    assert "--editable '.[dev]'" in quick
    assert ".[tpu]" not in quick
    assert quick.rstrip().endswith('-m "not slow and not tpu and not exhaustive" tests')
    assert "--editable '.[tpu]'" in every
    assert " -m pytest " in every
    assert "not tpu" not in every


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system has no CPU affinity")
def test_tests_run_on_as_many_workers_as_there_are_cores_but_at_most_four(tmp_path):
    cores = os.sched_getaffinity(0)
    assert f" -n {min(4, len(cores))} " in commands("quick", tmp_path / "venv")
    os.sched_setaffinity(0, {min(cores)})  # make inherits it
    try:
        assert " -n 1 " in commands("quick", tmp_path / "venv")
    finally:
        os.sched_setaffinity(0, cores)
