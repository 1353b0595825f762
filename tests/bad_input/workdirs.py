"""Workdirs that a command must leave as they are, each with the command.

Each begins as that of a finished run of 4 steps with checkpoints at 2 and 4, whose config is config.py beside it.
"""

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from trainer.lock import began

TRAIN = "train --config=config.py --workdir=run"
KEPT = "train --workdir=run"
LONGER = "train --workdir=run --config.total_steps=8"


class Workdir(NamedTuple):
    """A damage, and the command line that meets it."""

    damage: Callable[[Path], Any]
    command: str


def nothing(run: Path) -> None: ...


def config_is(content: str | bytes) -> Callable[[Path], Any]:
    """Other content of config.json, where no checkpoint has a copy."""

    def damage(run: Path) -> None:
        shutil.rmtree(run / "checkpoints")
        (run / "config.json").write_bytes(content.encode() if isinstance(content, str) else content)

    return damage


def config_with(**changes: Any) -> Callable[[Path], Any]:
    """Changed values in config.json, where no checkpoint has a copy."""

    def damage(run: Path) -> None:
        content = json.loads((run / "config.json").read_text()) | changes
        config_is(json.dumps(content))(run)

    return damage


def each_checkpoint(change: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """The same damage in both checkpoints."""

    def damage(run: Path) -> None:
        for step in ("2", "4"):
            change(run / "checkpoints" / step)

    return damage


def with_file(name: str, content: str) -> Callable[[Path], Any]:
    return lambda place: (place / name).write_text(content)


def without(name: str) -> Callable[[Path], Any]:
    return lambda place: shutil.rmtree(place / name) if (place / name).is_dir() else (place / name).unlink()


def in_place_of(name: str, make: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """Removes a file or folder of the workdir and makes something else there."""

    def damage(run: Path) -> None:
        if (run / name).exists():
            without(name)(run)
        make(run / name)

    return damage


def linked(name: str) -> Callable[[Path], Any]:
    """Moves a file or folder of the workdir away, and puts a link to it in its place."""

    def damage(run: Path) -> None:
        (run / name).rename(run.parent / "elsewhere")
        (run / name).symlink_to(run.parent / "elsewhere")

    return damage


def is_file(run: Path) -> None:
    shutil.rmtree(run)
    run.write_text("notes")


def is_foreign(run: Path) -> None:
    shutil.rmtree(run)
    run.mkdir()
    (run / "thesis.tex").write_text("chapter 1")


def points_nowhere(run: Path) -> None:
    shutil.rmtree(run)
    run.symlink_to(run.parent / "nowhere")


def is_locked(run: Path) -> None:
    """By the process that runs the test."""
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "began": began(os.getpid())}
    (run / ".lock").write_text(json.dumps(holder))


def flipped(place: Path) -> None:
    """One bit of every file of arrays is another."""
    for file in (file for file in (place / "state").rglob("*") if file.is_file() and file.stat().st_size):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)


def metadata_is(content: str) -> Callable[[Path], Any]:
    return each_checkpoint(with_file("metadata/metadata", content))


def config_is_no_file(make: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """Something else than a file in the place of config.json, where no checkpoint has a copy."""

    def damage(run: Path) -> None:
        shutil.rmtree(run / "checkpoints")
        in_place_of("config.json", make)(run)

    return damage


def config_is_cut(run: Path) -> None:
    config_is((run / "config.json").read_text()[:1000])(run)


def checkpoint_is_file(place: Path) -> None:
    shutil.rmtree(place)
    place.touch()


def diverged(content: str) -> Callable[[Path], Any]:
    """A folder of a step that diverged whose description has this content."""

    def damage(run: Path) -> None:
        (run / "diverged/3").mkdir(parents=True)
        (run / "diverged/3/step.json").write_text(content)

    return damage


def renumbered(run: Path) -> None:
    for old, new in (("2", "3"), ("4", "5")):
        (run / "checkpoints" / old).rename(run / "checkpoints" / new)


def experiment_is(value: Any) -> Callable[[Path], Any]:
    return config_with(experiment=value)


DEEP_RUN = '{"$class": "trainer.config.settings:Run", "experiment": ' + '{"a": ' * 100_000 + "1" + "}" * 100_001
DEEP = "[" * 900_000 + "]" * 900_000
WORKDIRS = {
    "is a file": Workdir(is_file, TRAIN),
    "is a file, evaluated": Workdir(is_file, "evaluate --workdir=run"),
    "is a file, inspected": Workdir(is_file, "inspect --workdir=run"),
    "is foreign": Workdir(is_foreign, TRAIN),
    "is foreign, inspected": Workdir(is_foreign, "inspect --config=config.py --workdir=run"),
    "is foreign, verified": Workdir(is_foreign, "inspect --config=config.py --workdir=run --verify"),
    "is foreign, evaluated": Workdir(is_foreign, "evaluate --config=config.py --workdir=run"),
    "points nowhere": Workdir(points_nowhere, TRAIN),
    "below a file": Workdir(nothing, "train --config=config.py --workdir=config.py/run"),
    "in /proc": Workdir(nothing, "train --config=config.py --workdir=/proc/run"),
    "with a name too long": Workdir(nothing, "train --config=config.py --workdir=" + "x" * 300),
    "with a line break": Workdir(nothing, "inspect '--workdir=a\nb'"),
    "with a null": Workdir(nothing, "train --config=config.py --workdir=a\0b"),
    "in a bucket of no known kind": Workdir(nothing, "train --config=config.py --workdir=ftp://host/run"),
    "locked": Workdir(is_locked, LONGER),
    "lock is a folder": Workdir(in_place_of(".lock", Path.mkdir), LONGER),
    "lock is a link": Workdir(linked(".lock"), LONGER),
    "config empty": Workdir(config_is(""), KEPT),
    "config cut": Workdir(config_is_cut, KEPT),
    "config binary": Workdir(config_is(b"\xff\xfe\x00"), KEPT),
    "config list": Workdir(config_is("[]"), KEPT),
    "config null": Workdir(config_is("null"), KEPT),
    "config nested": Workdir(config_is(DEEP), KEPT),
    "config nested run": Workdir(config_is(DEEP_RUN), KEPT),
    "config empty, with --config": Workdir(config_is(""), TRAIN),
    "config binary, evaluated": Workdir(config_is(b"\xff\xfe\x00"), "evaluate --workdir=run"),
    "config nested, inspected": Workdir(config_is(DEEP), "inspect --workdir=run"),
    "config nested, prepared": Workdir(config_is(DEEP), "prepare --workdir=run"),
    "config is a folder": Workdir(config_is_no_file(Path.mkdir), KEPT),
    "config is a pipe": Workdir(config_is_no_file(os.mkfifo), KEPT),
    "config is a link": Workdir(linked("config.json"), LONGER),
    "config is a link, evaluated": Workdir(linked("config.json"), "evaluate --workdir=run"),
    "config of another class": Workdir(config_with(**{"$class": "os:environ"}), KEPT),
    "config with unknown setting": Workdir(config_with(sed=1), KEPT),
    "config with wrong type": Workdir(config_with(seed="0"), KEPT),
    "config with wrong range": Workdir(config_with(batch_size=0), KEPT),
    "config with null group": Workdir(config_with(optimizer=None), KEPT),
    "config with list group": Workdir(config_with(optimizer=[1]), KEPT),
    "config without experiment": Workdir(experiment_is(None), KEPT),
    "config with experiment text": Workdir(experiment_is("Task"), KEPT),
    "config with a module that is not there": Workdir(experiment_is({"$class": "nosuch:Task"}), KEPT),
    "config with a class that is not there": Workdir(experiment_is({"$class": "tests.bad_input.tasks:Tusk"}), KEPT),
    "config with a class that is no experiment": Workdir(
        experiment_is({"$class": "trainer.config.settings:Group"}), KEPT
    ),
    "config with a function": Workdir(experiment_is({"$class": "os:system"}), KEPT),
    "config with a number for a class": Workdir(experiment_is({"$class": 3}), KEPT),
    "config with a foreign class": Workdir(config_with(optimizer={"$class": "trainer.state:TrainState"}), KEPT),
    "config of a missing file": Workdir(experiment_is({"$class": "Task", "$file": "gone.py", "$sha256": "0"}), KEPT),
    "config of a changed file": Workdir(experiment_is({"$class": "Task", "$file": "config.py", "$sha256": "0"}), KEPT),
    "config with NaN": Workdir(config_is('{"$class": "trainer.config.settings:Run", "seed": NaN}'), KEPT),
    "settings changed": Workdir(nothing, f"{TRAIN} --config.seed=1"),
    "settings changed, from step": Workdir(nothing, f"{TRAIN} --config.seed=1 --from-step=2"),
    "settings changed, evaluated": Workdir(nothing, "evaluate --config=config.py --workdir=run --config.seed=1"),
    "settings changed, inspected": Workdir(nothing, "inspect --config=config.py --workdir=run --config.seed=1"),
    "batch size changed": Workdir(nothing, f"{TRAIN} --config.batch_size=4"),
    "label changed": Workdir(nothing, f"{TRAIN} --config.optimizer.groups.plain.weight_decay=0.1"),
    "another optimizer": Workdir(nothing, f"{TRAIN} --config.optimizer.name=sgd"),
    "no such step": Workdir(nothing, f"{LONGER} --from-step=3"),
    "step of evaluate": Workdir(nothing, "evaluate --workdir=run --step=3"),
    "step of evaluate no number": Workdir(nothing, "evaluate --workdir=run --step=last"),
    "step of evaluate negative": Workdir(nothing, "evaluate --workdir=run --step=-2"),
    "step of evaluate empty": Workdir(nothing, "evaluate --workdir=run --step="),
    "step of evaluate best": Workdir(nothing, "evaluate --workdir=run --step=best"),
    "split of evaluate": Workdir(nothing, "evaluate --workdir=run --split=tset"),
    "split of evaluate empty": Workdir(nothing, "evaluate --workdir=run --split="),
    "checkpoints gone": Workdir(without("checkpoints"), "evaluate --workdir=run"),
    "checkpoints empty, verified": Workdir(each_checkpoint(shutil.rmtree), "inspect --workdir=run --verify"),
    "checkpoints a file": Workdir(in_place_of("checkpoints", Path.touch), LONGER),
    "checkpoints a file, evaluated": Workdir(in_place_of("checkpoints", Path.touch), "evaluate --workdir=run"),
    "checkpoints a link": Workdir(linked("checkpoints"), LONGER),
    "checkpoints a link, evaluated": Workdir(linked("checkpoints"), "evaluate --workdir=run"),
    "checkpoints a link, inspected": Workdir(linked("checkpoints"), "inspect --workdir=run"),
    "checkpoints a link, verified": Workdir(linked("checkpoints"), "inspect --workdir=run --verify"),
    "checkpoint is a file": Workdir(each_checkpoint(checkpoint_is_file), LONGER),
    "metadata empty": Workdir(metadata_is(""), LONGER),
    "metadata list": Workdir(metadata_is("[]"), LONGER),
    "metadata nested": Workdir(metadata_is(DEEP), LONGER),
    "metadata of another": Workdir(metadata_is('{"step": 4}'), LONGER),
    "metadata gone": Workdir(each_checkpoint(without("metadata")), LONGER),
    "metadata gone, evaluated": Workdir(each_checkpoint(without("metadata")), "evaluate --workdir=run"),
    "state gone": Workdir(each_checkpoint(without("state")), LONGER),
    "state flipped": Workdir(each_checkpoint(flipped), LONGER),
    "state flipped, evaluated": Workdir(each_checkpoint(flipped), "evaluate --workdir=run"),
    "steps exchanged": Workdir(renumbered, LONGER),
    "metrics a link": Workdir(linked("metrics.jsonl"), LONGER),
    "timing a link": Workdir(linked("timing.jsonl"), LONGER),
    "tensorboard a link": Workdir(linked("tensorboard"), LONGER),
    "params.txt a link": Workdir(linked("params.txt"), LONGER),
    "profile out of run": Workdir(nothing, f"{LONGER} --profile=5:9"),
    "profile before start": Workdir(nothing, f"{LONGER} --profile=3:6"),
    "diverged step that is not there": Workdir(nothing, "replay run/diverged/3"),
    "replay of a workdir": Workdir(nothing, "replay run"),
    "replay of nested": Workdir(diverged(DEEP), "replay run/diverged/3"),
    "replay of list": Workdir(diverged("[]"), "replay run/diverged/3"),
    "replay of empty": Workdir(diverged(""), "replay run/diverged/3"),
    "proof of what is none": Workdir(nothing, "prove-resume --check=run"),
}
