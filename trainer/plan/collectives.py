"""What a compiled program communicates and multiplies, read from its text."""

import dataclasses
import functools
import math
import re

import numpy as np

from trainer.plan.hlo import Instruction, parse, run_counts

KINDS = ("all-reduce", "reduce-scatter", "all-gather", "all-to-all", "collective-permute")

_ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+|f8\w+|c\d+)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between chips, as often as a step makes it.

    Attributes:
      kind: one of KINDS; a fused all-reduce and slice is the reduce-scatter that it does.
      dtype: the compiler's name of the numbers' type, such as "bf16".
      bytes: size of the whole array, as a chip has it before (reduce-scatter) or after (all-gather).
      group: how many chips exchange with each other.
      times: how often in a step.
      asynchronous: whether other work goes on meanwhile.
      exact: whether `times` is known; otherwise a loop around it does not say how often it runs, and is counted once.
    """

    kind: str
    dtype: str
    bytes: int
    group: int
    times: int
    asynchronous: bool
    exact: bool = True

    @property
    def sent(self) -> float:
        """Bytes that every chip sends in a step, at least: those of a ring."""
        share = 1.0 if self.kind == "collective-permute" else (self.group - 1) / self.group
        return self.times * self.bytes * share * (2 if self.kind == "all-reduce" else 1)


@dataclasses.dataclass(frozen=True)
class HloProgram:
    """What the text says.

    Attributes:
      collectives: every exchange, in the order of the text.
      flops: floating-point operations of matrix products and convolutions that a chip makes in a step, 2 for each
        multiplication with its addition.
      exact: whether every loop says how often it runs; those that do not are counted once.
      windowed: whether matrix products are split into loops that compute and communicate in turn.
    """

    collectives: tuple[Collective, ...]
    flops: int
    exact: bool
    windowed: bool


def read(text: str, chips: int) -> HloProgram:
    """Reads `Compiled.as_text()` of a program on so many chips."""
    computations, entry = parse(text)
    times = run_counts(computations, entry)
    found: dict[tuple[str, str], Collective] = {}
    flops = 0
    for name, instructions in computations.items():
        often, exact = times.get(name, (0, True))
        if not often:
            continue
        types = {i.name: i.type for i in instructions}
        started = any('"AsyncCollectiveStart"' in i.rest for i in instructions)
        for i in instructions:
            if i.opcode in ("convolution", "dot"):
                flops += often * (_convolution_flops(i, types) if i.opcode == "convolution" else _dot_flops(i, types))
            kind = i.opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            # The start, the middle and the end of an asynchronous exchange repeat it, with one channel.
            key = (kind, i.attribute("channel_id") or i.name)
            collective = _collective(i, kind, name, types, chips, often, exact)
            asynchronous = started or i.opcode.endswith("-start") or (key in found and found[key].asynchronous)
            found[key] = dataclasses.replace(collective, asynchronous=asynchronous)
    collectives = tuple(c for c in found.values() if c.group > 1)
    return HloProgram(collectives, flops, all(exact for _, exact in times.values()), "windowed_dot_general" in text)


def _collective(
    i: Instruction, kind: str, computation: str, types: dict[str, str], chips: int, often: int, exact: bool
) -> Collective:
    arrays = [array for operand in i.operands for array in _ARRAY.findall(types.get(operand, ""))]
    given = sum(map(_bytes, arrays))
    made = sum(map(_bytes, _ARRAY.findall(i.type)))
    if i.opcode.endswith("-start"):  # its type has the operands, too, and for permutations two flags
        made = made - given if kind != "collective-permute" else given
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    dtype = max(arrays or _ARRAY.findall(i.type), key=_bytes)[0]
    group = 2 if kind == "collective-permute" else _group(i.rest, chips)
    return Collective(kind, dtype, max(given, made), group, often, asynchronous=False, exact=exact)


def _group(rest: str, chips: int) -> int:
    """How many chips belong to one of the replica groups, in any of the three ways to write them."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(iota[1])
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
    return len(listed[1].split(",")) if listed else chips


def _dot_flops(i: Instruction, types: dict[str, str]) -> int:
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.rest)
    left = _shape(types[i.operands[0]])
    inner = math.prod(left[int(d)] for d in contracted[1].split(",") if d) if contracted else 1
    return 2 * math.prod(_shape(i.type)) * inner


def _convolution_flops(i: Instruction, types: dict[str, str]) -> int:
    """As XLA's own count: positions that fall into padding or between dilated numbers are no work."""
    left, kernel, out = (_shape(t) for t in (types[i.operands[0]], types[i.operands[1]], i.type))
    in_labels, kernel_labels, out_labels = re.split(r"_|->", i.attribute("dim_labels"))
    window = re.search(r"window=\{([^}]*)\}", i.rest)
    settings = dict(part.split("=") for part in window[1].split()) if window else {}
    valid = 1
    for d in range(len(out) - 2):
        label = str(d)

        def setting(name: str, default: str, d: int = d) -> str:
            return settings[name].split("x")[d] if name in settings else default

        valid *= _positions(
            left[in_labels.index(label)],
            kernel[kernel_labels.index(label)],
            out[out_labels.index(label)],
            int(setting("pad", "0_0").split("_")[0]),
            int(setting("stride", "1")),
            int(setting("lhs_dilate", "1")),
            int(setting("rhs_dilate", "1")),
        )
    batch = left[in_labels.index("b")] // int(i.attribute("batch_group_count") or 1)
    return 2 * valid * batch * kernel[kernel_labels.index("i")] * out[out_labels.index("f")]


@functools.cache
def _positions(size: int, kernel: int, out: int, low: int, stride: int, dilation: int, kernel_dilation: int) -> int:
    """Pairs of output and kernel positions that meet a number of the input, along one dimension."""
    at = np.arange(out)[:, None] * stride + np.arange(kernel) * kernel_dilation - low
    return int(((at >= 0) & (at < (size - 1) * dilation + 1) & (at % dilation == 0)).sum())


def _shape(type_: str) -> list[int]:
    return [int(n) for n in _ARRAY.findall(type_)[0][1].split(",") if n]


def _bytes(array: tuple[str, str]) -> int:
    dtype, dims = array
    bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
    return math.prod(int(n) for n in dims.split(",") if n) * bits // 8
