"""The header of the benchmarks' tables."""

import datetime
import platform
import subprocess
from pathlib import Path

import jax

from benchmarks import commit, cpu_model, header


def git(folder: Path, *command: str) -> str:
    identity = ("-c", "user.name=A Tester", "-c", "user.email=tester@example.com", "-c", "commit.gpgsign=false")
    done = subprocess.run(("git", *identity, *command), cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_commit_is_marked_while_tracked_files_differ_from_it(tmp_path):
    assert commit(tmp_path) == "unknown"
    git(tmp_path, "init")
    (tmp_path / "tracked").write_text("before")
    git(tmp_path, "add", "tracked")
    git(tmp_path, "commit", "--message=first")
    revision = git(tmp_path, "rev-parse", "--short", "HEAD")
    (tmp_path / "untracked").write_text("")
    assert commit(tmp_path) == revision
    (tmp_path / "tracked").write_text("after")
    assert commit(tmp_path) == f"{revision}+changes"


def test_the_header_has_commit_date_versions_and_cpu():
    first, second = header().splitlines()
    parts = first.split(", ")
    assert parts[0] == f"commit {commit()}"
    assert abs(datetime.date.today() - datetime.date.fromisoformat(parts[1])) <= datetime.timedelta(days=1)
    assert parts[2:4] == [f"Python {platform.python_version()}", f"jax {jax.__version__}"]
    assert [part.split()[0] for part in parts[4:]] == ["jaxlib", "optax", "flax"]
    assert second.startswith(f"{cpu_model()}, ")
