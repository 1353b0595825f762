"""What the TPU compiler says of the big configs, against the bars that they must hold.

    python -m trainer prepare --config=configs/lm_110m.py
    python -m benchmarks.plan

Needs libtpu and no TPU. Compiles with little effort unless --full is given; memory and bytes hold either way.
"""

import argparse
import dataclasses
import sys

import jax

from configs import lm_1b, lm_110m
from trainer import config
from trainer.plan.compiling import FAST, Figures, TooLarge, compile_for
from trainer.plan.planning import Layout, built, with_batch, with_strategy
from trainer.plan.report import exchanges
from trainer.plan.topology import find

GIB = 2**30


def compiled(run: config.Run, topology: str, strategy: str, effort: dict[str, str]) -> Figures | TooLarge:
    """The train step of a run, gradients reduced along one dimension of the torus after the other."""
    there = find(topology)
    layout = Layout(torus=True)
    program = built(with_strategy(run, strategy), there, layout)
    batch = program.strategy.abstract_batch(program.train_spec)
    return compile_for(program.train_step, (program.state, batch), len(there.devices), effort)


def moved(figures: Figures, kind: str) -> int:
    """Bytes of all arrays that a step exchanges in this way."""
    return sum(e.bytes for e in exchanges(figures.program.collectives) if e.kind == kind)


def small(topology: str, strategy: str, effort: dict[str, str]) -> Figures:
    """The 110 M decoder with 8 sequences a chip."""
    run = config.resolve(dataclasses.replace(lm_110m.get_config()))
    found = compiled(with_batch(run, 8 * find(topology).chips, 1), topology, strategy, effort)
    assert isinstance(found, Figures), f"{strategy} does not fit {topology}"
    return found


def main() -> int:
    """Prints each figure with its bar; exit code 1 if one does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="compile as for a real run, which takes six times as long")
    effort = {} if parser.parse_args().full else FAST
    jax.config.update("jax_platforms", "cpu")
    verdicts = []

    def show(what: str, figure: str, bar: str, holds: bool) -> None:
        verdicts.append(holds)
        print(f"{'holds' if holds else 'FAILS'}  {what}: {figure} (bar: {bar})", flush=True)

    arguments = small("v5e:2x4", "fsdp", effort).arguments / GIB
    show("v5e:2x4 fsdp, arguments on a chip", f"{arguments:.3f} GiB", "at most 0.16", arguments <= 0.16)
    fsdp = small("v5e:4x4", "fsdp", effort)
    scattered, summed = moved(fsdp, "reduce-scatter"), moved(fsdp, "all-reduce")
    share = scattered / (scattered + summed)
    show("v5e:4x4 fsdp, bytes reduced by reduce-scatter", f"{share:.1%}", "at least 90%", share >= 0.9)
    ratio = moved(small("v5e:4x4", "zero1", effort), "all-gather") / moved(fsdp, "all-gather")
    show("v5e:4x4 bytes all-gathered, zero1 by fsdp", f"{ratio:.3f}", "at most 1.05", ratio <= 1.05)
    large = config.resolve(lm_1b.get_config())
    for topology in ("v5e:16x16", "v5p:4x4x4"):
        found = compiled(large, topology, "fsdp", effort)
        needed = found.peak if isinstance(found, Figures) else found.needed
        text = f"{needed / GIB:.2f} of {find(topology).hbm_bytes / GIB:.2f} GiB"
        show(f"{topology} fsdp, 1 B parameters", text, "fits", isinstance(found, Figures))
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
