"""Runs command lines of `trainer` as forks of one process that has imported what they import.

A fork is the real command without the 3 s of imports: `python -m trainer` runs in it from its first line to the end of
the interpreter, with pipes as standard streams and a folder and an environment of its own.
"""

import importlib
import json
import os
import runpy
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Self

ROOT = Path(__file__).parents[2]
_LIMIT_SECONDS = 120
# The imports of commands. JAX's backend must not start, as it has threads.
_IMPORTS = (
    *("jax", "flax.linen", "optax", "orbax.checkpoint", "grain", "tensorstore", "tensorflow_datasets", "typeguard"),
    *("ml_collections.config_flags", "tensorboardX", "trainer.commands.arguments", "trainer.data.tfds"),
    *("trainer.program", "trainer.workdir", "trainer.distributed.startup", "trainer.data.stream"),
    *("trainer.plan.command", "trainer.observe.profile", "trainer.loop", "trainer.replay", "trainer.commands.train"),
    "tests.bad_input.tasks",
)


class Ended(NamedTuple):
    """A command that has ended."""

    code: int
    out: str
    err: str


class ForkServer:
    """A process that imports once and forks for each command."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """Starts it; it is ready when the first command is answered."""
        command = [sys.executable, "-m", "tests.bad_input.fork_server"]
        pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        self._process = subprocess.Popen(command, cwd=ROOT, env={**environment}, text=True, **pipes)

    def run(self, arguments: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None) -> Ended:
        """Runs `python -m trainer` with these arguments in a folder."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps([list(arguments), str(folder), dict(environment or {})]) + "\n")
        stdin.flush()
        answer = stdout.readline()
        assert answer, f"the fork server ended: {self._process.communicate()[1]}"
        return Ended(*json.loads(answer))

    def close(self) -> str:
        """Ends it; returns its own standard error, which is empty unless a fork was not safe."""
        return self._process.communicate()[1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def main() -> None:
    """Answers each line of standard input, a command, with one line of standard output."""
    for name in _IMPORTS:
        importlib.import_module(name)
    _check_forkable()
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    for line in requests:
        pipes = [os.pipe() for _ in range(2)]
        began = time.monotonic()
        if (pid := os.fork()) == 0:
            requests.close()
            answers.close()
            _become_command(pipes, *json.loads(line))
        for _, write in pipes:
            os.close(write)
        out, err = _read([read for read, _ in pipes], pid, began)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(json.dumps([code, out, err]), file=answers, flush=True)


def _check_forkable() -> None:
    from jax._src import xla_bridge  # the only way to ask without starting a backend

    assert not xla_bridge.backends_are_initialized()
    assert threading.active_count() == 1
    if sys.platform == "linux":
        assert len(list(Path("/proc/self/task").iterdir())) == 1, "a library has started a thread"


def _become_command(pipes: Sequence[tuple[int, int]], arguments: Sequence[str], folder: str, env: Any) -> NoReturn:
    """Makes this fork the process `python -m trainer ARGUMENTS`, which begins in a folder."""
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (pipes[0][1], 1), (pipes[1][1], 2)):
        os.dup2(source, target)
    for descriptor in {null, *pipes[0], *pipes[1]} - {0, 1, 2}:
        os.close(descriptor)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", errors="backslashreplace")  # noqa: SIM115 - open to the end
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    os.environ.update(env)
    os.chdir(folder)
    sys.path[0], sys.argv = folder, ["trainer", *arguments]
    runpy.run_module("trainer", run_name="__main__", alter_sys=True)
    sys.exit(0)


def _read(pipes: Sequence[int], pid: int, began: float) -> list[str]:
    """All that a command writes until it ends; it is killed if that takes too long."""
    texts = dict.fromkeys(pipes, b"")
    with selectors.DefaultSelector() as selector:
        for pipe in pipes:
            selector.register(pipe, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(_LIMIT_SECONDS - (time.monotonic() - began))
            if not ready:
                os.kill(pid, signal.SIGKILL)
            for key, _ in ready:
                if piece := os.read(key.fd, 1 << 16):
                    texts[key.fd] += piece
                else:
                    selector.unregister(key.fd)
                    os.close(key.fd)
    return [text.decode() for text in texts.values()]


if __name__ == "__main__":
    main()
