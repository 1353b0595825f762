"""Eight fake devices, data sets in a folder of their own, and shape annotations that run as checks."""

import os

from tests import xla_flags

# Before JAX starts.
os.environ["XLA_FLAGS"] = xla_flags(devices=8)
os.environ["JAX_PLATFORMS"] = "cpu"
# The tests' own folder: nothing of the user's is read or written.
os.environ.pop("TFDS_DATA_DIR", None)

from jaxtyping import install_import_hook

install_import_hook(
    [
        "trainer.keys",
        "trainer.step",
        "trainer.optim",
        "trainer.experiment",
        "trainer.metrics.mean",
        "experiments.image_classification",
        "experiments.augmentation",
        "experiments.models",
        "experiments.contrastive",
        "experiments.frechet",
        "experiments.gan",
        "experiments.image_keys",
        "experiments.regression",
        "experiments.language_model",
        "experiments.toy",
    ],
    "beartype.beartype",
)

import gc
from collections.abc import Generator
from pathlib import Path
from typing import Any

import jax
import pytest

gc.set_threshold(100_000)  # tracing makes many objects that stay, and Python's 700 looks at them again and again


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-goldens", action="store_true", help="rewrite tests/golden/ from what the code gives now")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    """Makes a skipped test fail in continuous integration, whose machine must have what every test needs."""
    report = yield
    if report.skipped and os.environ.get("CI") == "true":
        report.outcome, report.longrepr = "failed", f"continuous integration must run it: {report.longrepr[2]}"
    return report


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TFDS folder in which `digits` is prepared."""
    import experiments.datasets  # noqa: F401 - registers the builders
    from trainer.data import tfds

    folder = tmp_path_factory.mktemp("tfds")
    tfds.prepare("digits", str(folder))
    return folder


@pytest.fixture(scope="session", autouse=True)
def _what_is_compiled_is_shared(tmp_path_factory: pytest.TempPathFactory) -> None:
    """By all tests, all workers and all commands that they start: compilation is nearly all of their time."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
