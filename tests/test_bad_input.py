"""Wrong inputs through the real command: each is one line and exit code 2, and leaves every file as it was."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import xla_flags
from tests.bad_input.catalogue import CASES, HEAD, RESUMED_CONFIG, Case
from tests.bad_input.fork_server import ROOT, Ended, ForkServer

_LEAST = 120
_REAL, _FURTHER = 16, 3  # inputs that are also given to a process of their own; all but every third are exhaustive
# These find their mistake in an example that is read late, when the new workdir and its settings are there already.
_READ_LATE = {
    "SourceIsRagged()",
    "SourceIsRaggedLate()",
    "SourceLacksEntryLate()",
    "SourceHasEntryLate()",
    "SourceOfOtherDtypeLate()",
}
_BEGUN = {"run", "run/config.json", "run/params.txt"}


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    devices = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(devices=2)}
    return kept | devices | {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.fixture(scope="session")
def server(environment: dict[str, str]) -> Iterator[ForkServer]:
    server = ForkServer(environment)
    yield server
    assert server.close() == ""  # no warning about forks


@pytest.fixture(scope="session")
def trained(server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config and the workdir of its finished run."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "config.py").write_text(RESUMED_CONFIG)
    assert server.run(["train", "--config=config.py", "--workdir=run"], folder).code == 0
    return folder


def prepared(case: Case, folder: Path, trained: Path) -> Path:
    """A new folder with what the case needs."""
    if case.damage is None:
        folder.mkdir()
        (folder / "config.py").write_text(case.config)
    else:
        shutil.copytree(trained, folder)
        case.damage(folder / "run")
    return folder


def contents(folder: Path) -> dict[str, bytes | str | None]:
    """Every path below a folder but the lock, with its bytes, the target of a link, or None."""

    def content(path: Path) -> bytes | str | None:
        return str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else None

    return {str(path.relative_to(folder)): content(path) for path in folder.rglob("*") if path.name != ".lock"}


def message(ended: Ended) -> str:
    """The one line of a command that found a mistake of its user, which is all that it writes."""
    assert ended.code == 2, ended
    assert ended.out == ""
    assert "Traceback" not in ended.err
    assert ended.err.startswith("error: ")
    assert ended.err.endswith("\n")
    assert ended.err.count("\n") == 1
    return ended.err.removeprefix("error: ").rstrip("\n")


def params(cases: list[Case]) -> list[Any]:
    def marks(case: Case) -> list[Any]:
        needs_libtpu = case.name.startswith("plan ") and "topology" in case.answer and "give" not in case.answer
        return [pytest.mark.slow] * case.is_slow + [pytest.mark.tpu] * needs_libtpu

    return [pytest.param(case, marks=marks(case), id=case.name[:100]) for case in cases]


@pytest.mark.parametrize("case", params(CASES))
def test_wrong_input_is_one_line_and_leaves_every_file_as_it_was(case, server, trained, tmp_path):
    folder = prepared(case, tmp_path / "here", trained)
    before = contents(folder)
    found = message(server.run(case.arguments, folder))
    assert found.startswith(case.answer.replace("{here}", str(folder)))
    after = contents(folder)
    if case.name in _READ_LATE:
        after = {path: content for path, content in after.items() if path not in _BEGUN}
    assert after == before


@pytest.mark.parametrize(
    ("command", "flags", "answer"),
    [
        ("train", "loading.split=trian", "data set 'digits' has no split 'trian'; did you mean 'train'?"),
        ("train", "loading.split=train+tset", "data set 'digits' has no split 'tset'; did you mean 'test'?"),
        ("train", "loading.split=train[", "data set 'digits', split 'train[': "),
        ("train", "loading.split=train[:900%]", "data set 'digits', split 'train[:900%]': "),
        ("train", "loading.split=train[500:100]", "data set 'digits', split 'train[500:100]': "),
        ("train", "experiment.feature=imgae", "data set 'digits' has no feature 'imgae'; did you mean 'image'?"),
        ("train", "experiment.dataset=digts", "data set 'digts' is not prepared in "),
        ("train", "experiment.dataset=", "data set '': "),
        ("train", "experiment.dataset=digits:9.9.9", "data set 'digits:9.9.9' is not prepared in "),
        ("train", "experiment.data_dir=config.py", "data set 'digits' is not prepared in config.py; prepare it with: "),
        ("prepare", "experiment.dataset=mnits", "TFDS knows no data set 'mnits'; did you mean 'mnist'?"),
    ],
)
def test_wrong_name_of_a_data_set_is_one_line_and_leaves_nothing(command, flags, answer, server, data_dir, tmp_path):
    run = "\n\ndef get_config():\n    return Run(OfTfds(), total_steps=1, batch_size=8)\n"
    (tmp_path / "config.py").write_text(HEAD + run)
    arguments = [command, "--config=config.py", "--workdir=run", f"--config.experiment.data_dir={data_dir}"]
    prepared = contents(data_dir)
    assert message(server.run([*arguments, f"--config.{flags}"], tmp_path)).startswith(answer)
    assert set(contents(tmp_path)) == {"config.py"}
    assert contents(data_dir) == prepared


def given_to_processes() -> list[Any]:
    """One or two inputs of each kind, and further ones."""
    chosen = params(CASES[:: len(CASES) // _REAL])
    further = ([pytest.mark.exhaustive] * (i % _FURTHER > 0) for i in range(len(chosen)))
    return [pytest.param(*c.values, marks=[*c.marks, *m], id=c.id) for c, m in zip(chosen, further, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("case", given_to_processes())
def test_process_of_its_own_answers_a_wrong_input_as_a_fork_does(case, server, trained, environment, tmp_path):
    folder = prepared(case, tmp_path / "here", trained)
    forked = server.run(case.arguments, folder)
    command = [sys.executable, "-m", "trainer", *case.arguments]
    real = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert Ended(real.returncode, real.stdout, real.stderr) == forked


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "answer"),
    [
        pytest.param(
            "rehearse --config=confg.py --workdir=run",
            "[0] error: no config file 'confg.py'; did you mean 'config.py'?",
            marks=pytest.mark.exhaustive,
        ),
        (
            "rehearse --config=config.py --workdir=run --config.sed=1",
            "[0] error: config has no field 'sed'; did you me",
        ),
        pytest.param(
            "rehearse --workdir=run",
            "[0] error: there is no workdir run; a new one needs --config=FILE",
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_mistake_that_rehearsed_processes_find_is_one_line_after_the_number_of_one(line, answer, server, tmp_path):
    (tmp_path / "config.py").write_text(RESUMED_CONFIG)
    ended = server.run(shlex.split(line), tmp_path)
    assert (ended.code, ended.out, ended.err.count("\n")) == (2, "", 1)
    assert ended.err.startswith(answer)
    assert set(contents(tmp_path)) == {"config.py"}


def test_catalogue_is_long_and_no_input_is_in_it_twice():
    assert sum(not case.is_slow for case in CASES) >= _LEAST
    assert len({case.name for case in CASES}) == len(CASES)
