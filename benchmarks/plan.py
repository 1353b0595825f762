"""The TPU compiler's results for the big configs, against bars that must hold.

    python -m trainer prepare --config=configs/lm_110m.py
    python -m benchmarks.plan

Needs libtpu and no TPU. Compiles with little effort unless --full is given; memory and bytes are the same either way.
"""

import argparse
import sys

import jax

from benchmarks import header
from configs import lm_1b, lm_110m
from trainer import config
from trainer.plan.compiling import FAST, CompiledStep, OutOfMemory, compile_step
from trainer.plan.planning import CompileChoice, program_for
from trainer.plan.report import traffic
from trainer.plan.topology import make_topology
from trainer.plan.variants import with_batch, with_strategy

GIB = 2**30


def compiled(run: config.Run, topology: str, strategy: str, effort: dict[str, str]) -> CompiledStep | OutOfMemory:
    """The train step of a run, with gradients reduced along one dimension of the torus after the other."""
    there = make_topology(topology)
    program = program_for(with_strategy(run, strategy), there, CompileChoice(torus=True))
    batch = program.strategy.abstract_batch(program.train_spec)
    return compile_step(program.train_step, (program.state, batch), len(there.devices), effort)


def exchanged(step: CompiledStep, kind: str) -> int:
    """Bytes of all arrays of a step's collectives of one kind."""
    return sum(t.bytes for t in traffic(step.hlo.collectives) if t.kind == kind)


def small(topology: str, strategy: str, effort: dict[str, str]) -> CompiledStep:
    """The 110 M decoder with 8 sequences a chip."""
    run = config.resolve(lm_110m.get_config())
    step = compiled(with_batch(run, 8 * make_topology(topology).chips, 1), topology, strategy, effort)
    assert isinstance(step, CompiledStep), f"{strategy} does not fit {topology}"
    return step


def main() -> int:
    """Prints each figure with its bar; exit code 1 if one does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="compile as for a real run, which takes six times as long")
    effort = {} if parser.parse_args().full else FAST
    jax.config.update("jax_platforms", "cpu")
    print(header())
    results = []

    def show(name: str, figure: str, bar: str, holds: bool) -> None:
        results.append(holds)
        print(f"{'holds' if holds else 'FAILS'}  {name}: {figure} (bar: {bar})", flush=True)

    arguments = small("v5e:2x4", "fsdp", effort).argument_bytes / GIB
    show("v5e:2x4 fsdp, arguments on a chip", f"{arguments:.3f} GiB", "at most 0.16", arguments <= 0.16)
    fsdp = small("v5e:4x4", "fsdp", effort)
    scattered, reduced = exchanged(fsdp, "reduce-scatter"), exchanged(fsdp, "all-reduce")
    share = scattered / (scattered + reduced)
    show("v5e:4x4 fsdp, bytes reduced by reduce-scatter", f"{share:.1%}", "at least 90%", share >= 0.9)
    ratio = exchanged(small("v5e:4x4", "zero1", effort), "all-gather") / exchanged(fsdp, "all-gather")
    show("v5e:4x4 bytes all-gathered, zero1 by fsdp", f"{ratio:.3f}", "at most 1.05", ratio <= 1.05)
    large = config.resolve(lm_1b.get_config())
    for topology in ("v5e:16x16", "v5p:4x4x4"):
        step = compiled(large, topology, "fsdp", effort)
        needed = step.peak_bytes if isinstance(step, CompiledStep) else step.needed_bytes
        text = f"{needed / GIB:.2f} of {make_topology(topology).hbm_bytes / GIB:.2f} GiB"
        show(f"{topology} fsdp, 1 B parameters", text, "fits", isinstance(step, CompiledStep))
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
