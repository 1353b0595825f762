"""Measurements side by side: each prints ratios of things measured in turn in one run."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

PACKAGES = ("jax", "jaxlib", "optax", "flax")


def header() -> str:
    """The commit, the date, the versions and the CPU, to print above a table of measurements."""
    today = datetime.datetime.now().astimezone().date().isoformat()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"commit {commit()}, {today}, Python {platform.python_version()}, {versions}\n{cpu_model()}, {cores} cores"


def commit(folder: Path = Path(__file__).parent) -> str:
    """The short hash of a checkout's commit, with "+changes" if tracked files differ; "unknown" outside a checkout."""

    def git(*command: str) -> str:
        return subprocess.run(("git", *command), cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def cpu_model() -> str:
    """The name of the CPU's model, or else of its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
