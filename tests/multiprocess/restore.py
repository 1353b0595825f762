"""Restores a checkpoint in each of several processes, compares its bits with an .npz, and gathers without the last one.

It also loads the model on a device of each process, and shows the error of an evaluation on which they differ.

Arguments: workdir, .npz, then the flags of a command in several processes.
"""

import argparse
import sys
from contextlib import closing
from typing import Any

import jax
import numpy as np

from trainer import distributed, load
from trainer.checkpoint import Store
from trainer.commands.arguments import add_group_options
from trainer.distributed import startup
from trainer.errors import UserError
from trainer.evaluation import evaluate_split
from trainer.program import build_program
from trainer.rules import paths
from trainer.workdir import Workdir


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("workdir")
    parser.add_argument("expected")
    add_group_options(parser)
    options = parser.parse_args()
    startup.initialize(options.coordinator, options.process, options.processes)
    run = Workdir(options.workdir).stored_run()
    assert run is not None
    program = build_program(run)
    with closing(Store(Workdir(options.workdir).checkpoints, run.checkpoint)) as store:
        state = store.restore(program.state, store.steps()[-1])
    expected = np.load(options.expected)
    sharded = 0
    for path, leaf in zip(paths(state), jax.tree.leaves(state), strict=True):
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), expected[path][shard.index], err_msg=path)
        sharded += not leaf.sharding.is_fully_replicated
    assert len(paths(state)) == len(expected.files)
    shapes = f"{jax.process_count()} processes × {jax.local_device_count()} devices"
    print(f"{len(expected.files)} leaves are the same bit for bit on {shapes}, {sharded} of them sharded", flush=True)
    loaded = load(options.workdir).variables
    for path, leaf in zip(paths(loaded), jax.tree.leaves(loaded), strict=True):
        assert leaf.devices() == {jax.local_devices()[0]}
        name = path if path.startswith("params/") else f"collections/{path}"
        np.testing.assert_array_equal(np.asarray(leaf), expected[name], err_msg=path)
    for differs, silent_in in ((1e-6, -1), (1.0, -1), (0.0, 1)):
        experiment: Any = run.experiment
        experiment.differs, experiment.silent_in = differs, silent_in
        try:
            found = evaluate_split(program, state, program.evaluations["own"].source, name="own")
            print(sorted(found), len(set(distributed.gather("found", str(found)))), flush=True)
        except UserError as error:
            print(str(error).partition(" has ")[0], flush=True)
    if distributed.index() != distributed.count() - 1:
        try:
            distributed.gather("the missed one", seconds=1)
        except TimeoutError as error:
            print(error, flush=True)
    assert distributed.gather("all", str(distributed.index())) == [str(i) for i in range(distributed.count())]


if __name__ == "__main__":
    sys.exit(main())
