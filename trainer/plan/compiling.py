"""Ahead-of-time compilation of one step: its memory and HLO analysis, or the buffers that do not fit."""

import dataclasses
import re
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from trainer.compilation import no_cache
from trainer.plan.analysis import HloAnalysis, analyze

# Compiles about six times faster; memory and collectives are nearly the same, but fewer collectives are asynchronous.
FAST = {"xla_optimization_level": "EFFORT_O0"}
_MOST_BUFFERS = 5  # listed for a step that does not fit


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """Memory and HLO of a compiled step, on one device.

    Attributes:
      argument_bytes: those of the arguments.
      aliased_bytes: those of arguments whose memory the results reuse.
      temporary_bytes: those of everything that is neither argument nor result.
      peak_bytes: arguments, results and temporaries, `aliased_bytes` counted once; at most the device's memory.
      hlo: collectives and floating-point operations.
      seconds: the time to compile.
    """

    argument_bytes: int
    aliased_bytes: int
    temporary_bytes: int
    peak_bytes: int
    hlo: HloAnalysis
    seconds: float


@dataclasses.dataclass(frozen=True)
class Buffer:
    """Buffers of one shape that the same operation of a model makes.

    Attributes:
      count: how many there are.
      bytes: of one.
      shape: such as "bf16[8,1024,768]".
      name: the operation, after the modules around it; or the argument.
    """

    count: int
    bytes: int
    shape: str
    name: str


@dataclasses.dataclass(frozen=True)
class OutOfMemory:
    """A step that needs more memory than a device has.

    Attributes:
      needed_bytes: those that it needs on a device.
      buffers: the largest ones, the largest total first.
      seconds: the time until the compiler refused.
    """

    needed_bytes: int
    buffers: tuple[Buffer, ...]
    seconds: float


def compile_step(
    step: Any, arguments: Sequence[Any], device_count: int, options: Mapping[str, Any]
) -> CompiledStep | OutOfMemory:
    """Compiles a step ahead of time.

    Args:
      step: an `AheadCompiled`, or a function of `jax.jit` or `jax.pmap`, for the devices of a topology.
      arguments: shapes, dtypes and shardings.
      device_count: the number of devices.
      options: XLA's compiler options.
    """
    lowered = step.lower(*arguments)
    with tempfile.TemporaryDirectory() as dump, no_cache():
        start = time.perf_counter()
        try:
            compiled = lowered.compile(compiler_options={**options, "xla_dump_to": dump})
        except jax.errors.JaxRuntimeError as error:
            needed = re.search(r"CompileTimeHbmOom.*\(([\d.]+)([KMGT]?)\) exceeds available", str(error))
            if needed is None:
                raise
            size = float(needed[1]) * 2 ** (10 * " KMGT".index(needed[2] or " "))
            seconds = time.perf_counter() - start
            # The error has only the total; the buffers come from XLA's dump.
            buffers = read_buffers(_dumped(dump, "-buffer-assignment.txt") or "", _dumped(dump, ".txt") or "")
            return OutOfMemory(int(size), buffers[:_MOST_BUFFERS], seconds)
        seconds = time.perf_counter() - start
        # XLA's dump, as JAX 0.10 cannot read every program of libtpu.
        hlo = analyze(_dumped(dump, ".txt") or compiled.as_text(), device_count)
    memory = compiled.memory_analysis()
    # Not XLA's `peak_memory_in_bytes`, which leaves out the gaps between buffers: HBM holds them, too.
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = memory.argument_size_in_bytes + results + memory.temp_size_in_bytes
    return CompiledStep(
        memory.argument_size_in_bytes, memory.alias_size_in_bytes, memory.temp_size_in_bytes, peak, hlo, seconds
    )


def _dumped(folder: str, ending: str) -> str | None:
    """XLA's dump, with this `ending`, of the optimized program or of its buffer assignment; None if there is none."""
    file = next(Path(folder).glob(f"*after_optimizations{ending}"), None)
    return file.read_text() if file else None


def read_buffers(assignment: str, program: str) -> tuple[Buffer, ...]:
    """The buffers in a device's memory, the largest total first.

    Args:
      assignment: XLA's dump of the buffer assignment. Values at the same offset count as one buffer, which gets the
        name of the largest value.
      program: XLA's dump of the program, which has the operations' names.
    """
    names = dict(
        re.findall(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*?metadata=\{[^}]*?op_name="([^"]*)"', program, re.MULTILINE)
    )
    counts: Counter[tuple[str, str, int]] = Counter()
    for allocation in re.split(r"^allocation ", assignment, flags=re.MULTILINE)[1:]:
        if ", color " in allocation.partition("\n")[0]:  # on-chip memory, not HBM
            continue
        places: dict[int, tuple[str, str, int]] = {}
        for value, size, offset, shape in re.findall(
            r"value: <\d+ (\S+?)(?:\{[^}]*\})? @0> \(size=(\d+),offset=(\d+)\): (\S+)", allocation
        ):
            largest = places.get(int(offset))
            if largest is None or largest[2] < int(size):
                places[int(offset)] = (_short_name(names.get(value, value)), shape.partition("{")[0], int(size))
        counts.update(_without_overlaps(places))
    buffers = [Buffer(count, size, shape, name) for (name, shape, size), count in counts.items()]
    return tuple(sorted(buffers, key=lambda buffer: -buffer.count * buffer.bytes))


def _without_overlaps(places: Mapping[int, tuple[str, str, int]]) -> list[tuple[str, str, int]]:
    """Drops each buffer that overlaps a larger one. `places` maps an offset to a buffer: its name, shape and size."""
    taken: list[tuple[int, int]] = []
    kept = []
    for offset, buffer in sorted(places.items(), key=lambda item: -item[1][2]):
        end = offset + buffer[2]
        if all(end <= start or stop <= offset for start, stop in taken):
            taken.append((offset, end))
            kept.append(buffer)
    return kept


def _short_name(operation: str) -> str:
    """An operation's name without JAX's wrappers and with N for numbers, so that equal layers share one name."""
    parts = [
        part for part in operation.split("/") if not re.fullmatch(r"jit\(\w+\)|while|body|closed_call|checkpoint", part)
    ]
    return re.sub(r"\d+", "N", "/".join(parts)) or operation
