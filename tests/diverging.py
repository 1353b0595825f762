"""One of several processes that train until a loss is not finite; the second is late to explain it.

Arguments: workdir, then the flags of several processes. It prints the error.
"""

import argparse
import sys
import time

import jax
import numpy as np

from tests.tasks import Task, make_run
from trainer import DivergedError, config, distributed, train
from trainer.commands.arguments import add_group_options
from trainer.data.order import Order
from trainer.distributed import startup
from trainer.observe.trace import NoTrace


class Late(NoTrace):
    """Sleeps in the second process where the divergence begins to be explained."""

    def phase(self, name: str, step: int) -> None:
        if name == "save" and jax.process_index() == 1:
            time.sleep(5)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("workdir")
    add_group_options(parser)
    options = parser.parse_args()
    startup.initialize(options.coordinator, options.process, options.processes)
    first = int(Order(50, 0)(np.arange(1))[0])  # the first example of the run
    run = make_run(4, experiment=Task(explode_at=first), parallel=config.Parallel("data"))
    with distributed.fail_fast():
        try:
            train(run, options.workdir, verbose=False, trace=Late())
        except DivergedError as error:
            print(error, flush=True)


if __name__ == "__main__":
    sys.exit(main())
