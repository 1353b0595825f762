"""1,000 kills: `prove-resume` over four configs, three strategies, one and two processes.

    python -m benchmarks.kills --output=kills.jsonl
    python -m benchmarks.kills --output=kills.jsonl --minutes=30        # stops cleanly; the same command goes on
    python -m benchmarks.kills --output=kills.jsonl --part=1/2          # half of the proofs; another process 2/2
    python -m benchmarks.kills --output=kills.jsonl --kills=0           # only the totals

Each proof trains a small version of a config once undisturbed and once while it is killed ten times, and is one line of
the output. Proof i has seed i and the (i mod 24)-th of the 24 combinations. The proofs that are in the output are not
made again; one that was interrupted is. The data sets must be prepared. A proof that does not hold keeps its folder
beside the output, and the exit code is 1.
"""

import argparse
import itertools
import json
import logging
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from benchmarks import header
from trainer.observe import table
from trainer.prove.launch import ProcessLayout
from trainer.prove.proof import Proof, hits

KILLS = 10  # of one proof
STEPS = 24
_SMALL = (
    f"--config.total_steps={STEPS}",
    "--config.evaluation.every_steps=2",
    "--config.checkpoint.every_steps=4",
    "--config.logging.every_steps=1",
    "--config.optimizer.schedule.warmup=4",
    "--config.parallel.devices=None",
    "--config.parallel.min_shard_size=0",
)
# Two of the four read their examples with Grain, one of these in a worker process: the others hold them in memory.
CONFIGS = {
    "digits": ("--config.batch_size=16", "--config.loading.in_memory_bytes=0"),
    "toy": ("--config.batch_size=2",),
    "shakespeare": (
        "--config.experiment.width=32",
        "--config.experiment.mlp_width=64",
        "--config.experiment.length=32",
    ),
    "fashion_mnist": (
        "--config.batch_size=16",
        "--config.loading.in_memory_bytes=0",
        "--config.loading.workers=1",
        "--config.loading.threads=1",
        "--config.evaluation.split=test[:512]",
        "--config.checkpoint.best_metric=None",  # it names another split
        "--config.evaluation.batch_size=128",
    ),
}
# Two devices each, so that every strategy has something to split.
LAYOUTS = tuple(
    ProcessLayout(processes, 2 // processes, strategy)
    for processes, strategy in itertools.product((1, 2), ("data", "fsdp", "pmap"))
)


class Plan(NamedTuple):
    """One proof of the long form."""

    number: int  # also its seed
    config: str
    layout: ProcessLayout
    kills: int


def plan(kills: int) -> list[Plan]:
    """The proofs that make so many kills together."""
    combinations = list(itertools.product(CONFIGS, LAYOUTS))
    sizes = [min(KILLS, kills - done) for done in range(0, kills, KILLS)]
    return [Plan(i, *combinations[i % len(combinations)], size) for i, size in enumerate(sizes)]


def prove(one: Plan, folder: Path) -> dict[str, Any]:
    """Makes one proof in a folder, which is kept only if it does not hold; returns its line of the output."""
    shutil.rmtree(folder, ignore_errors=True)  # of a proof that was interrupted
    folder.mkdir(parents=True)
    proof = Proof(
        [f"--config=configs/{one.config}.py", *_SMALL, *CONFIGS[one.config]],
        STEPS,
        [one.layout],
        one.kills,
        one.number,
        folder,
        tolerance=0.0,
        limit=600,
        show=lambda text: print(f"  {text}", flush=True),
    )
    began = time.monotonic()
    differences = proof.run()
    if not differences:
        shutil.rmtree(folder)
    return {
        "proof": one.number,
        "config": one.config,
        "topology": list(one.layout),
        "kills": len(proof.kills),
        "hits": {" ".join(pair): count for pair, count in hits(proof.kills).items()},
        "runs": len(proof.compared),
        "batches": sum(compared.batches for compared in proof.compared),
        "seconds": round(time.monotonic() - began, 1),
        "differences": differences,
    }


def read(output: Path) -> list[dict[str, Any]]:
    """The lines of an output, none if there is no file yet."""
    return [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []


def totals(rows: Sequence[dict[str, Any]]) -> str:
    """Tables of the kills per combination and per phase, and the sum."""
    combinations: Counter[tuple[str, str]] = Counter()
    phases: Counter[str] = Counter()
    for row in rows:
        survived = row["kills"] if not row["differences"] else 0
        combinations[row["config"], str(ProcessLayout(*row["topology"]))] += survived
        phases.update(row["hits"])
    layouts = [str(layout) for layout in LAYOUTS]
    lines = [(name, *(str(combinations[name, layout]) for layout in layouts)) for name in CONFIGS]
    text = table(("survived", *layouts), lines, right=layouts) + "\n"
    names = sorted({name.rpartition(" ")[0] for name in phases})
    signals = ("SIGKILL", "SIGTERM")
    lines = [(name, *(str(phases[f"{name} {signum}"]) for signum in signals)) for name in names]
    text += table(("phase", *signals), lines, right=signals) + "\n"
    made, seconds = sum(row["kills"] for row in rows), sum(row["seconds"] for row in rows)
    return (
        text + f"{combinations.total():,} of {made:,} kills survived bit for bit, {seconds / max(made, 1):.1f} s a kill"
    )


def main() -> int:
    """Makes the proofs that are not in the output yet, and prints the totals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no proof after this time")
    parser.add_argument("--part", default="1/1", metavar="I/N", help="only every N-th proof, from the I-th on")
    options = parser.parse_args()
    part, parts = map(int, options.part.split("/"))
    print(header())
    jax.config.update("jax_platforms", "cpu")  # this process computes nothing
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax says that it finds none of its optional files
    output: Path = options.output.absolute()
    folders = output.with_name(f"{output.name}-folders")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folders / "compiled"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    finished, began = {row["proof"] for row in read(output)}, time.monotonic()
    for one in plan(options.kills)[part - 1 :: parts]:
        if one.number in finished:
            continue
        if time.monotonic() - began > options.minutes * 60:
            break
        print(f"proof {one.number}: {one.config}, {one.layout}, {one.kills} kills", flush=True)
        row = prove(one, folders / f"proof-{one.number}")
        with output.open("a") as file:
            file.write(json.dumps(row) + "\n")
    rows = read(output)
    print(totals(rows))
    for row in rows:
        for text in row["differences"]:
            print(f"different: proof {row['proof']}: {text}")
    return 1 if any(row["differences"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
