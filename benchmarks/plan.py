"""The TPU compiler's results for the big configs, against bars that must hold.

    python -m benchmarks.plan [--only=8b]

Needs libtpu, and neither a TPU nor the data: the sources hold zeros. Compiles with little effort unless --full is
given; memory and bytes are the same either way.
"""

import argparse
import dataclasses
import sys
from typing import Any

import jax
import numpy as np

from benchmarks import header
from configs import linux_1b, linux_8b, linux_110m
from experiments.packed_language_model import PackedLanguageModel
from experiments.packing import segment_dtype, token_dtype
from trainer import config
from trainer.data import ArraySource
from trainer.plan.compiling import FAST, CompiledStep, OutOfMemory, compile_step
from trainer.plan.planning import CompileChoice, program_for
from trainer.plan.report import traffic
from trainer.plan.topology import make_topology
from trainer.plan.variants import with_batch, with_strategy

GIB = 2**30
# Name, config, topology of a slice and number of slices; several slices share a batch that many times as large.
LARGE = (
    ("1b", linux_1b, "v5e:16x16", 1),
    ("1b", linux_1b, "v5p:4x4x4", 1),
    ("8b", linux_8b, "v5p:8x8x8", 1),
    ("8b", linux_8b, "v5p:8x8x8", 2),
)


class Shapes(PackedLanguageModel):
    """Rows of zeros, in the shapes and dtypes of packed text."""

    def source(self, split: str) -> Any:
        """A few rows."""
        del split
        return ArraySource(
            {
                "tokens": np.zeros((16, self.length + 1), token_dtype(self.vocab)),
                "segments": np.zeros((16, self.length + 1), segment_dtype(self.length)),
                "bytes": np.zeros(16, np.int32),
            }
        )


def resolved(module: Any) -> config.Run:
    """The run of a config, with rows of zeros."""
    run = module.get_config()
    run.experiment = Shapes(**{f.name: getattr(run.experiment, f.name) for f in dataclasses.fields(run.experiment)})
    return config.resolve(run)


def compiled(
    run: config.Run, topology: str, strategy: str, effort: dict[str, str], slices: int = 1
) -> CompiledStep | OutOfMemory:
    """The train step of a run, with gradients reduced along one dimension of the torus after the other."""
    there = make_topology(topology, slices)
    program = program_for(with_strategy(run, strategy), there, CompileChoice(torus=True))
    batch = program.strategy.abstract_batch(program.train_spec)
    return compile_step(program.train_step, (program.state, batch), len(there.devices), effort)


def exchanged(step: CompiledStep, kind: str) -> int:
    """Bytes of all arrays of a step's collectives of one kind."""
    return sum(t.bytes for t in traffic(step.hlo.collectives) if t.kind == kind)


def small(topology: str, strategy: str, effort: dict[str, str]) -> CompiledStep:
    """The 110 M decoder with 8 sequences a chip."""
    run = resolved(linux_110m)
    step = compiled(with_batch(run, 8 * make_topology(topology).chips, 1), topology, strategy, effort)
    assert isinstance(step, CompiledStep), f"{strategy} does not fit {topology}"
    return step


def main() -> int:
    """Prints each figure with its bar; exit code 1 if one does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="compile as for a real run, which takes six times as long")
    parser.add_argument("--only", choices=("110m", "1b", "8b"), help="the config to compile; all if it is not given")
    options = parser.parse_args()
    effort = {} if options.full else FAST
    jax.config.update("jax_platforms", "cpu")
    print(header())
    results = []

    def show(name: str, figure: str, bar: str, holds: bool) -> None:
        results.append(holds)
        print(f"{'holds' if holds else 'FAILS'}  {name}: {figure} (bar: {bar})", flush=True)

    if options.only in (None, "110m"):
        arguments = small("v5e:2x4", "fsdp", effort).argument_bytes / GIB
        show("v5e:2x4 fsdp, arguments on a chip", f"{arguments:.3f} GiB", "at most 0.16", arguments <= 0.16)
        fsdp = small("v5e:4x4", "fsdp", effort)
        scattered, reduced = exchanged(fsdp, "reduce-scatter"), exchanged(fsdp, "all-reduce")
        share = scattered / (scattered + reduced)
        show("v5e:4x4 fsdp, bytes reduced by reduce-scatter", f"{share:.1%}", "at least 90%", share >= 0.9)
        ratio = exchanged(small("v5e:4x4", "zero1", effort), "all-gather") / exchanged(fsdp, "all-gather")
        show("v5e:4x4 bytes all-gathered, zero1 by fsdp", f"{ratio:.3f}", "at most 1.05", ratio <= 1.05)
    for name, module, topology, slices in LARGE:
        if options.only in (None, name):
            run = resolved(module)
            step = compiled(with_batch(run, run.batch_size * slices, 1), topology, "fsdp", effort, slices)
            needed = step.peak_bytes if isinstance(step, CompiledStep) else step.needed_bytes
            text = f"{needed / GIB:.2f} of {make_topology(topology).hbm_bytes / GIB:.2f} GiB"
            show(f"{slices} × {topology} fsdp, {name}", text, "fits", isinstance(step, CompiledStep))
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
