"""The config of `tests/multiprocess`: twenty short steps of `Traced`."""

import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import Any

from tests.multiprocess.tasks import BATCH, Traced
from tests.tasks import Task, make_run
from trainer import config


class SlowToEvaluate(Task):
    """With a folder in SLOW_EVALUATION, an example of an evaluation leaves a byte in a file there.

    From the sixth on it also takes 0.5 s.
    """

    def source(self, split: str) -> Any:
        source, folder = super().source(split), os.environ.get("SLOW_EVALUATION")
        return Marked(source, Path(folder)) if split == "test" and folder else source


@dataclasses.dataclass
class Marked:
    """The examples of a source."""

    examples: Any
    folder: Path
    read: int = 0

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Any:
        with (self.folder / f"{os.getpid()}").open("a") as file:
            file.write(".")
        self.read += 1
        if self.read > 5:
            time.sleep(0.5)
        return self.examples[index]


def get_config(argument: str = "") -> config.Run:
    """Twenty steps, with checkpoints at ten and twenty.

    "plain" names no example: it compiles faster, which a process other than the first does in every launch, as JAX
    keeps nothing of what it compiles. "differing" gives each process a batch size of its own; "replicated" runs without
    dropout under `pmap`; "slow" can be slow to evaluate.
    """
    batch_size = 2 * BATCH if argument == "differing" and "--process=1" in sys.argv else BATCH
    experiments = {"plain": Task(), "replicated": Task(), "slow": SlowToEvaluate()}
    own = {} if argument in experiments else {"own": config.Evaluation(every_steps=10, batch_size=8)}
    slow: dict[str, Any] = {
        "loading": config.Loading(in_memory_bytes=0, threads=1),
        "evaluation": config.Evaluation(every_steps=10, batch_size=4),
    }
    return make_run(
        20,
        experiment=experiments.get(argument, Traced()),
        evaluations=own,
        batch_size=batch_size,
        optimizer=dataclasses.replace(make_run().optimizer, schedule=config.Schedule(peak=1e-2)),
        checkpoint=config.Checkpoint(every_steps=10),
        parallel=config.Parallel("pmap" if argument == "replicated" else "fsdp", min_shard_size=0),
        **(slow if argument == "slow" else {}),
    )
