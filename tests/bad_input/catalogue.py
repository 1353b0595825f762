"""The catalogue of wrong inputs: what is given, and the beginning of the one line that answers it.

The texts beside this file hold pairs of lines: an input, and indented below it the answer. In an answer, `{here}` is
the folder in which the command runs. Inputs after the line `# slow` take longer.
"""

import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.bad_input.workdirs import WORKDIRS

HEAD = """\
from tests.bad_input.tasks import *
from trainer.config import *
"""
CONFIG = """
def get_config():
    labels, groups = ((".*/kernel", "decayed"), (".*", "plain")), {"decayed": Group(weight_decay=0.1), "plain": Group()}
    optimizer = Optimizer(schedule=Schedule("linear", peak=0.01, warmup=1), labels=labels, groups=groups)
    return Run(Task(), total_steps=4, batch_size=8, optimizer=optimizer, checkpoint=Checkpoint(every_steps=2))
"""
CONFIG = HEAD + CONFIG
RESUMED_CONFIG = CONFIG.replace("linear", "constant")  # whose run may become longer
_TRAIN = ("train", "--config=config.py", "--workdir=run")
_LONG = "x" * 100_000  # @LONG@

_CONFIG_FILES = {
    "syntax error": "def get_config(:\n    return 1\n",
    "indentation": "def get_config():\nreturn 1\n",
    "empty": "\n",
    "binary": "\x00\x01\x02\n",
    "no get_config": "def config():\n    return 1\n",
    "get_config is a number": "get_config = 3\n",
    "raises when imported": "raise ValueError('no GPU\\nhere')\n",
    "imports what is not there": "import nosuchmodule\n",
    "imports a name that is not there": "from trainer import Runn\n",
    "name error": "def get_config():\n    return Rnu()\n",
    "raises": "def get_config():\n    raise RuntimeError('no GPU')\n",
    "exits": "import sys\nsys.exit(0)\n",
    "exits with text": "raise SystemExit('wrong machine')\n",
    "returns None": "def get_config():\n    pass\n",
    "returns a dict": "def get_config():\n    return {'total_steps': 3}\n",
    "returns the class": "from trainer import Run\ndef get_config():\n    return Run\n",
    "takes an argument": "def get_config(size):\n    pass\n",
    "takes two arguments": "def get_config(size, depth):\n    pass\n",
    "takes a keyword": "def get_config(*, size):\n    pass\n",
    "missing argument of Run": HEAD + "def get_config():\n    return Run(Task())\n",
    "unknown argument of Run": HEAD + "def get_config():\n    return Run(Task(), total_steps=3, sed=1)\n",
    "wrong argument: unhashable": HEAD + "def get_config():\n    return Run(Task(), total_steps=3, batch_size=[1])\n",
    "class in place of group": HEAD + "def get_config():\n    return Run(Task(), total_steps=3, optimizer=Optimizer)\n",
    "user error": "from trainer import UserError\ndef get_config():\n    raise UserError('set DATA')\n",
    "asserts": "def get_config():\n    assert False, 'only on TPU'\n",
    "recursion": "def get_config():\n    return get_config()\n",
}


class Case(NamedTuple):
    """A wrong input."""

    name: str
    arguments: tuple[str, ...]
    answer: str
    is_slow: bool
    config: str = CONFIG  # the text of config.py
    damage: Callable[[Path], Any] | None = None  # of a trained workdir, `run`; None where there is no workdir yet


def _answers(file: str) -> Iterator[tuple[str, str, bool]]:
    """Each input of a text with its answer, and whether it is slow."""
    fast, _, slow = (Path(__file__).parent / f"{file}.txt").read_text(encoding="utf-8").partition("# slow\n")
    for text, is_slow in ((fast, False), (slow, True)):
        lines = text.splitlines()
        for given, answer in zip(lines[::2], lines[1::2], strict=True):
            yield given, answer.strip(), is_slow


def _run(arguments: str) -> str:
    return f"{HEAD}\ndef get_config():\n    return Run({arguments})\n"


def _cases() -> Iterator[Case]:
    for line, answer, slow in _answers("command_lines"):
        yield Case(line, tuple(shlex.split(line.replace("@LONG@", _LONG))), answer, slow)
    for name, answer, slow in _answers("config_files"):
        yield Case(f"config file: {name}", _TRAIN, answer, slow, _CONFIG_FILES[name])
    for flags, answer, slow in _answers("overrides"):
        yield Case(flags, (*_TRAIN, *flags.replace("@LONG@", _LONG).split()), answer.replace("@LONG@", _LONG), slow)
    for setting, answer, slow in _answers("settings"):
        batch_size = "" if setting.startswith("batch_size") else "batch_size=8, "
        yield Case(setting, _TRAIN, answer, slow, _run(f"Task(), total_steps=4, {batch_size}{setting}"))
    for experiment, answer, slow in _answers("experiments"):
        yield Case(experiment, _TRAIN, answer, slow, _run(f"{experiment}, total_steps=4, batch_size=8"))
    for name, answer, slow in _answers("workdirs"):
        damage, command = WORKDIRS[name]
        yield Case(f"workdir: {name}", tuple(shlex.split(command)), answer, slow, damage=damage)


CASES = list(_cases())
