"""Compiles one program for a topology: its figures, or what does not fit."""

import dataclasses
import re
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from trainer.plan.collectives import HloProgram, read

# Compiles about six times faster, with nearly the same memory and communication; it overlaps less.
FAST = {"xla_optimization_level": "EFFORT_O0"}
_MOST_BUFFERS = 5  # to show of a step that does not fit


@dataclasses.dataclass(frozen=True)
class Figures:
    """What the compiler says of a program, on one device.

    Attributes:
      arguments: bytes of what goes in.
      aliased: bytes of arguments whose memory the results take over.
      temporaries: bytes beside arguments and results.
      peak: bytes of all of these, which the compiler compares with the memory of a device.
      program: communication and matrix products.
      seconds: how long compiling took.
    """

    arguments: int
    aliased: int
    temporaries: int
    peak: int
    program: HloProgram
    seconds: float


@dataclasses.dataclass(frozen=True)
class Buffer:
    """Buffers of one shape that the same line of a model makes.

    Attributes:
      count: how many there are.
      bytes: of one.
      shape: such as "bf16[8,1024,768]".
      name: the operation, with the modules around it; or the argument.
    """

    count: int
    bytes: int
    shape: str
    name: str


@dataclasses.dataclass(frozen=True)
class TooLarge:
    """A program that does not fit.

    Attributes:
      needed: bytes on a device.
      buffers: the largest ones, the largest total first.
      seconds: how long the compiler took to find out.
    """

    needed: int
    buffers: tuple[Buffer, ...]
    seconds: float


def compile_for(step: Any, arguments: Sequence[Any], chips: int, options: Mapping[str, Any]) -> Figures | TooLarge:
    """Compiles a step ahead of time.

    Args:
      step: of `jax.jit` or `jax.pmap`, for devices of a topology.
      arguments: in shapes, dtypes and shardings.
      chips: how many devices it is for.
      options: for the compiler.
    """
    lowered = step.lower(*arguments)
    with tempfile.TemporaryDirectory() as notes:
        start = time.perf_counter()
        try:
            compiled = lowered.compile(compiler_options={**options, "xla_dump_to": notes})
        except jax.errors.JaxRuntimeError as error:
            needed = re.search(r"CompileTimeHbmOom.*\(([\d.]+)([KMGT]?)\) exceeds available", str(error))
            if needed is None:
                raise
            size = float(needed[1]) * 2 ** (10 * " KMGT".index(needed[2] or " "))
            seconds = time.perf_counter() - start
            buffers = read_buffers(_note(notes, "-buffer-assignment.txt") or "", _note(notes, ".txt") or "")
            return TooLarge(int(size), buffers[:_MOST_BUFFERS], seconds)
        seconds = time.perf_counter() - start
        # The compiler's own text: JAX 0.10 cannot read all that libtpu writes. What JAX has in its cache leaves none.
        program = read(_note(notes, ".txt") or compiled.as_text(), chips)
    memory = compiled.memory_analysis()
    # Not the compiler's own peak_memory_in_bytes: that leaves out the gaps between buffers, which HBM must hold, too.
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = memory.argument_size_in_bytes + results + memory.temp_size_in_bytes
    return Figures(
        memory.argument_size_in_bytes, memory.alias_size_in_bytes, memory.temp_size_in_bytes, peak, program, seconds
    )


def _note(folder: str, ending: str) -> str | None:
    """What the compiler wrote of the optimized program; None if it wrote nothing."""
    file = next(Path(folder).glob(f"*after_optimizations{ending}"), None)
    return file.read_text() if file else None


def read_buffers(assignment: str, program: str) -> tuple[Buffer, ...]:
    """The buffers in a device's memory, from the compiler's notes, those that take the most together first.

    Args:
      assignment: of buffers to memory. Values that take turns in one place are one buffer: the first of the largest.
      program: the compiled program, which knows the names.
    """
    names = dict(
        re.findall(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*?metadata=\{[^}]*?op_name="([^"]*)"', program, re.MULTILINE)
    )
    found: Counter[tuple[str, str, int]] = Counter()
    for allocation in re.split(r"^allocation ", assignment, flags=re.MULTILINE)[1:]:
        if ", color " in allocation.partition("\n")[0]:  # in another memory than the large one
            continue
        places: dict[int, tuple[str, str, int]] = {}
        for value, size, offset, shape in re.findall(
            r"value: <\d+ (\S+?)(?:\{[^}]*\})? @0> \(size=(\d+),offset=(\d+)\): (\S+)", allocation
        ):
            kept = places.get(int(offset))
            if kept is None or kept[2] < int(size):
                places[int(offset)] = (_name(names.get(value, value)), shape.partition("{")[0], int(size))
        found.update(_apart(places))
    buffers = [Buffer(count, size, shape, name) for (name, shape, size), count in found.items()]
    return tuple(sorted(buffers, key=lambda buffer: -buffer.count * buffer.bytes))


def _apart(places: Mapping[int, tuple[str, str, int]]) -> list[tuple[str, str, int]]:
    """Of buffers by their place in an allocation those that do not overlap a larger one."""
    taken: list[tuple[int, int]] = []
    kept = []
    for offset, buffer in sorted(places.items(), key=lambda item: -item[1][2]):
        end = offset + buffer[2]
        if all(end <= start or stop <= offset for start, stop in taken):
            taken.append((offset, end))
            kept.append(buffer)
    return kept


def _name(operation: str) -> str:
    """An operation's name without what JAX puts around it, so that layers which are alike get one line."""
    parts = [
        part for part in operation.split("/") if not re.fullmatch(r"jit\(\w+\)|while|body|closed_call|checkpoint", part)
    ]
    return re.sub(r"\d+", "N", "/".join(parts)) or operation
