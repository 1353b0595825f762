"""One of several processes that train with early stopping, and prints the last step and a hash of the parameters.

Arguments: the step at which a hook breaks the run (0 for none), workdirs, --only=I if the hook breaks process I alone,
then the flags of several processes.
"""

import argparse
import hashlib
import sys

import jax
import numpy as np

from tests.tasks import make_run
from trainer import config, distributed, train
from trainer.commands.arguments import add_group_options
from trainer.distributed import startup
from trainer.hooks import EarlyStopping


class Breaks:
    """Raises an exception after a step, in every process or in one."""

    def __init__(self, step: int, only: int | None) -> None:
        self.step, self.only = step, only

    def on_step(self, event) -> None:
        if event.step == self.step and self.only in (None, distributed.index()):
            raise RuntimeError("of the hook")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("breaks", type=int)
    parser.add_argument("workdirs", nargs="+")
    parser.add_argument("--only", type=int)
    add_group_options(parser)
    options = parser.parse_args()
    startup.initialize(options.coordinator, options.process, options.processes)
    run = make_run(
        200,
        evaluation=config.Evaluation(batch_size=8, every_steps=2),
        checkpoint=config.Checkpoint(every_steps=2),
        logging=config.Logging(every_steps=1),
    )
    for workdir in options.workdirs:
        hooks = [EarlyStopping("test/loss", patience=3, min_delta=0.2), Breaks(options.breaks, options.only)]
        with distributed.fail_fast():
            state = train(run, workdir, verbose=False, hooks=hooks)
        digest = hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(state.params)))
        print(f"step {int(state.step)} of {run.total_steps}: {digest.hexdigest()}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
