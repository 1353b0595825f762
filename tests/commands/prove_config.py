"""The config of `tests/commands/test_prove_resume.py`: twelve short steps, saved and evaluated at every third."""

import shutil
import sys
from pathlib import Path

from tests.tasks import Task, make_run
from trainer import config


def get_config(argument: str = "") -> config.Run:
    """A run without dropout, so that all strategies draw the same numbers; "slow" has many steps.

    "broken" fails as soon as its workdir holds a checkpoint, which only a relaunch can find. "forgetful" removes such a
    workdir, and so begins anew.
    """
    workdirs = [text.partition("=")[2] for text in sys.argv if text.startswith("--workdir=")]
    if argument == "broken" and any(Path(workdir, "checkpoints").is_dir() for workdir in workdirs):
        raise RuntimeError("this relaunch is broken")
    if argument == "forgetful":
        for workdir in workdirs:
            shutil.rmtree(workdir, ignore_errors=True)
    return make_run(
        100_000 if argument == "slow" else 12,
        experiment=Task(noise=0.1),
        evaluation=config.Evaluation(every_steps=3),
        checkpoint=config.Checkpoint(every_steps=3),
        parallel=config.Parallel(min_shard_size=0),
    )
