"""Real commands whose standard output or standard error closes, is full, lacks characters or is absent."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

_CONFIG = """
import sys
sys.path.insert(0, {root!r})
from tests.tasks import make_run
from trainer import config

def get_config():
    return make_run(
        30,
        checkpoint=config.Checkpoint(every_steps=10),
        evaluation=config.Evaluation(every_steps=15, batch_size=8),
        parallel=config.Parallel(devices=1),
    )
"""


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Runs `bash`, so that redirections and pipes are those that a user types; `trainer` is the real command."""
    script = f'set -o pipefail; trainer() {{ {shlex.quote(sys.executable)} -m trainer "$@"; }}; {command}'
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(
        ["bash", "-c", script], cwd=ROOT, env=kept | environment, capture_output=True, check=False, timeout=110
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("config") / "config.py"
    file.write_text(_CONFIG.format(root=str(ROOT)))
    return file


@pytest.fixture(scope="module")
def undisturbed(config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """The workdir, whose name is not ASCII, and the output of a training whose output is."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "Läufe" / "ü"
    workdir.parent.mkdir()
    result = shell(f"trainer train --config={config} --workdir={workdir}", PYTHONIOENCODING="ascii")
    assert (result.returncode, result.stderr) == (0, b"")
    return workdir, result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "redirection",
    [
        *("| head -1", "> /dev/full", "<&- >&- 2>&-", "2>&1 | true"),
        *(
            pytest.param(text, marks=pytest.mark.exhaustive)
            for text in (">&-", "2>&- > /dev/null", "2> /dev/full > /dev/full")
        ),
    ],
)
def test_training_ends_well_whatever_becomes_of_its_output(redirection, config, undisturbed, tmp_path):
    workdir, undisturbed = tmp_path / "run", undisturbed[0]
    result = shell(f"trainer train --config={config} --workdir={workdir} {redirection}")
    assert (result.returncode, result.stderr) == (0, b"")
    names = {path.relative_to(undisturbed) for path in undisturbed.rglob("*") if path.suffix in (".jsonl", ".json")}
    assert names == {path.relative_to(workdir) for path in workdir.rglob("*") if path.suffix in (".jsonl", ".json")}
    assert (workdir / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()
    assert (workdir / "config.json").read_bytes() == (undisturbed / "config.json").read_bytes()


@pytest.mark.slow
def test_characters_that_the_output_lacks_are_replaced(undisturbed):
    workdir, output = undisturbed
    assert f"done: {workdir.parents[1]}/L?ufe/? has checkpoints/".encode() in output
    assert b"8?16" in output


@pytest.mark.parametrize(
    ("command", "code", "error"),
    [
        ("trainer --help > /dev/full", 3, b"error: standard output cannot be written: No space left on device\n"),
        ("trainer --help | true", 141, b""),
        ("trainer --help >&-", 0, b""),
        ("trainer trian 2> /dev/full", 2, b""),
        ("trainer trian 2>&-", 2, b""),
        ("trainer trian >&- 2>&- <&-", 2, b""),
        (
            "trainer inspect --help > /dev/full",
            3,
            b"error: standard output cannot be written: No space left on device\n",
        ),
    ],
)
def test_other_commands_say_in_one_line_that_their_output_is_lost(command, code, error):
    if code == 141:  # the reader must be gone first
        command = command.replace("trainer", "{ sleep 0.5; trainer", 1).replace(" |", "; } |")
    result = shell(command)
    assert (result.returncode, result.stderr) == (code, error)


@pytest.mark.parametrize("redirection", ["2> /dev/full", "2>&-", "> /dev/full 2>&-"])
def test_ctrl_c_before_training_ends_the_process_whatever_became_of_its_output(redirection):
    code = "from trainer.observe.output import make_safe; make_safe(is_needed=True); print('something');"
    code += "from trainer.__main__ import _exit_at_once; _exit_at_once(2, None)"
    assert shell(f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} {redirection}").returncode == 130


def test_a_file_of_the_command_never_gets_the_number_of_an_absent_stream(tmp_path):
    code = (
        "from trainer.observe.output import make_safe; import os, sys; make_safe(is_needed=False);"
        f"file = open({str(tmp_path / 'file')!r}, 'w'); os.write(1, b'x'); os.write(2, b'y'); print('z');"
        "sys.exit(0 if file.fileno() > 2 else 1)"
    )
    result = shell(f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} <&- >&- 2>&-")
    assert result.returncode == 0
    assert (tmp_path / "file").read_bytes() == b""
