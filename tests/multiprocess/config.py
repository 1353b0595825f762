"""The config of `tests/multiprocess`: twenty short steps of `Traced`."""

import dataclasses
import sys

from tests.multiprocess.tasks import BATCH, Traced
from tests.tasks import Task, make_run
from trainer import config


def get_config(argument: str = "") -> config.Run:
    """Twenty steps, with checkpoints at ten and twenty.

    "differing" gives each process a batch size of its own; "replicated" runs without dropout under `pmap`.
    """
    batch_size = 2 * BATCH if argument == "differing" and "--process=1" in sys.argv else BATCH
    return make_run(
        20,
        experiment=Task(dropout=0.0) if argument == "replicated" else Traced(),
        batch_size=batch_size,
        optimizer=dataclasses.replace(make_run().optimizer, schedule=config.Schedule(peak=1e-2)),
        checkpoint=config.Checkpoint(every_steps=10),
        parallel=config.Parallel("pmap" if argument == "replicated" else "fsdp", min_shard_size=0),
    )
