"""How long a launch takes at step 10⁶ of a run on 10⁹ examples, beside a launch at step 2.

    python -m benchmarks.start [--rounds=5]

In each round, in turn: the real command resumes a run from its checkpoint of step 2, and from the same checkpoint as it
would be after 10⁶ updates. The times are those from the command's start to the line of the next step. The config is in
this file; its examples are computed when they are read.
"""

import argparse
import dataclasses
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks import header
from benchmarks.relaunch import launch
from experiments.regression import Regression
from trainer.checkpoint import Store
from trainer.config import Group, Loading, Optimizer, Run, Schedule
from trainer.optim.transforms import set_count
from trainer.program import build_program
from trainer.resume import recover_run
from trainer.workdir import Workdir

EXAMPLES, BATCH, LATE, STEPS = 10**9, 1024, 10**6, 2 * 10**6


class Numbers:
    """10⁹ examples: "x" is made of the bits of the index, "y" is whether its last bit is 1."""

    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        bits = (index >> np.arange(10)) & 1
        return {"x": bits.astype(np.float32), "y": bits[0].astype(np.float32)}


@dataclasses.dataclass
class Endless(Regression):
    """The MLP of `experiments.regression` on `Numbers`."""

    def source(self, split: str) -> Any:
        """All examples, for every split."""
        del split
        return Numbers()


def get_config() -> Run:
    """More than two passes over the examples; no step but the last evaluates."""
    return Run(
        experiment=Endless(),
        total_steps=STEPS,
        batch_size=BATCH,
        optimizer=Optimizer(
            schedule=Schedule("constant", peak=1e-3),
            labels=((r".*/kernel", "decayed"), (r".*/bias", "plain")),
            groups={"decayed": Group(weight_decay=1e-2), "plain": Group()},
        ),
        loading=Loading(in_memory_bytes=0),
    )


def move(workdir: Path, step: int) -> None:
    """Replaces the checkpoints of a run by one that has made `step` updates, with the arrays of the newest."""
    run = recover_run(Workdir(workdir))
    assert run is not None
    program = build_program(run)
    store = Store(workdir / "checkpoints", run.checkpoint)
    newest = store.steps()[-1]
    metadata = store.metadata(newest)
    state = store.restore(program.state, newest, metadata)
    count = jnp.asarray(step, jnp.int32)
    opt_state = set_count(state.opt_state, program.groups, count)
    store.save(dataclasses.replace(state, step=count, opt_state=opt_state), dataclasses.replace(metadata, step=step))
    store.close()
    for early in store.steps()[:-1]:
        shutil.rmtree(store.path(early))


def main() -> None:
    """Prints the times and their ratio."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(header())
    with tempfile.TemporaryDirectory() as folder:
        begun = Path(folder) / "begun"
        flags = [f"--config={Path(__file__).resolve()}", f"--compilation-cache={Path(folder) / 'cache'}"]
        launch([*flags, f"--workdir={begun}"], steps=STEPS)
        late = Path(shutil.copytree(begun, Path(folder) / "late"))
        move(late, LATE)
        times: dict[str, list[float]] = {"begun": [], "late": []}
        for _ in range(options.rounds):
            for name, own in times.items():
                workdir = shutil.copytree(Path(folder) / name, Path(folder) / "run")
                own.append(launch([*flags, f"--workdir={workdir}"], steps=STEPS))
                shutil.rmtree(workdir)
            print(f"step 2: {times['begun'][-1]:.2f} s, step {LATE:,}: {times['late'][-1]:.2f} s")
    ratio = statistics.median(there / here for there, here in zip(times["late"], times["begun"], strict=True))
    print(f"step {LATE:,} / step 2: {ratio:.3f}")


if __name__ == "__main__":
    main()
