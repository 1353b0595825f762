"""Collectives and floating-point operations of a compiled step, read from its HLO.

XLA's own `cost_analysis()` is used for neither. It has no collectives. Its "flops" count the body of a loop once and
add elementwise operations. Example: a train step of the decoder in tests/plan/models.py, compiled for v5e:2x2 under
`data`, always takes 5.77 GFLOP of matrix products. XLA reports 5.96 for the plain step, 3.02 with 2 microbatches, 3.30
with scanned layers, and 1.69 with both (JAX 0.10.2, libtpu 0.0.52; XLA:CPU alike).
"""

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
    """A collective operation, with all its runs in a step.

    Attributes:
      kind: one of KINDS; XLA:TPU's fusion of an all-reduce and a slice is a reduce-scatter.
      dtype: XLA's name of the array's dtype, such as "bf16".
      bytes: size of the whole array on a device, before a reduce-scatter or after an all-gather.
      group: the number of devices in each replica group.
      times: how many times it runs in a step.
      asynchronous: whether the device does other work between start and end.
      exact: whether `times` is exact; a loop of unknown trip count is counted once.
    """

    kind: str
    dtype: str
    bytes: int
    group: int
    times: int
    asynchronous: bool
    exact: bool = True

    @property
    def sent_bytes(self) -> float:
        """The least number of bytes that each device sends in a step: those of a ring algorithm."""
        share = 1.0 if self.kind == "collective-permute" else (self.group - 1) / self.group
        return self.times * self.bytes * share * (2 if self.kind == "all-reduce" else 1)


@dataclasses.dataclass(frozen=True)
class HloAnalysis:
    """Collectives and floating-point operations of a step on one device.

    Attributes:
      collectives: in the order of the text.
      flops: of matrix products and convolutions, 2 for each multiplication and its addition.
      exact: whether all trip counts are known; a loop of unknown trip count is counted once.
      windowed: whether XLA made loops of matrix products, each iteration computing and sending a part.
    """

    collectives: tuple[Collective, ...]
    flops: int
    exact: bool
    windowed: bool


def analyze(text: str, device_count: int) -> HloAnalysis:
    """Analyzes `Compiled.as_text()` of a program for `device_count` devices."""
    computations, entry = parse(text)
    counts = run_counts(computations, entry)
    collectives: dict[tuple[str, str], Collective] = {}
    flops = 0
    for name, instructions in computations.items():
        times, exact = counts.get(name, (0, True))
        if not times:
            continue
        types = {i.name: i.type for i in instructions}
        started = any('"AsyncCollectiveStart"' in i.rest for i in instructions)
        for i in instructions:
            if i.opcode in ("convolution", "dot"):
                flops += times * (_convolution_flops(i, types) if i.opcode == "convolution" else _dot_flops(i, types))
            kind = i.opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            # XLA repeats an asynchronous collective at its start, middle and end, with the same channel.
            key = (kind, i.attribute("channel_id") or i.name)
            collective = _collective(i, kind, name, types, device_count)
            repeated = key in collectives and collectives[key].asynchronous
            asynchronous = started or i.opcode.endswith("-start") or repeated
            collectives[key] = dataclasses.replace(collective, times=times, asynchronous=asynchronous, exact=exact)
    several = tuple(c for c in collectives.values() if c.group > 1)
    return HloAnalysis(several, flops, all(exact for _, exact in counts.values()), "windowed_dot_general" in text)


def _collective(i: Instruction, kind: str, computation: str, types: dict[str, str], device_count: int) -> Collective:
    """One run of the collective that an instruction performs or, with "-start", begins.

    The caller sets `times`, `asynchronous` and `exact`.
    """
    arrays = [array for operand in i.operands for array in _ARRAY.findall(types.get(operand, ""))]
    before = sum(map(_bytes, arrays))
    after = sum(map(_bytes, _ARRAY.findall(i.type)))
    if i.opcode.endswith("-start"):  # its type has the operands, too, and for permutations two flags
        after = after - before if kind != "collective-permute" else before
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    dtype = max(arrays or _ARRAY.findall(i.type), key=_bytes)[0]
    group = 2 if kind == "collective-permute" else _group_size(i.rest, device_count)
    return Collective(kind, dtype, max(before, after), group, times=1, asynchronous=False)


def _group_size(rest: str, device_count: int) -> int:
    """The number of devices in a replica group, from any of XLA's three notations."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(iota[1])
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
    return len(listed[1].split(",")) if listed else device_count


def _dot_flops(i: Instruction, types: dict[str, str]) -> int:
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.rest)
    left = _shape(types[i.operands[0]])
    inner = math.prod(left[int(d)] for d in contracted[1].split(",") if d) if contracted else 1
    return 2 * math.prod(_shape(i.type)) * inner


def _convolution_flops(i: Instruction, types: dict[str, str]) -> int:
    """Without positions in padding or between dilated numbers, as in XLA's cost analysis."""
    left, kernel, out = (_shape(t) for t in (types[i.operands[0]], types[i.operands[1]], i.type))
    in_labels, kernel_labels, out_labels = re.split(r"_|->", i.attribute("dim_labels"))
    window = re.search(r"window=\{([^}]*)\}", i.rest)
    settings = dict(part.split("=") for part in window[1].split()) if window else {}
    valid = 1
    for d in range(len(out) - 2):
        label = str(d)

        def setting(name: str, default: str, d: int = d) -> str:
            return settings[name].split("x")[d] if name in settings else default

        valid *= _valid_positions(
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
def _valid_positions(
    size: int, kernel: int, out: int, low: int, stride: int, dilation: int, kernel_dilation: int
) -> int:
    """The number of pairs of output and kernel positions along one dimension that read a number of the input."""
    position = np.arange(out)[:, None] * stride + np.arange(kernel) * kernel_dilation - low
    inside = (position >= 0) & (position < (size - 1) * dilation + 1)
    return int((inside & (position % dilation == 0)).sum())


def _shape(type_: str) -> list[int]:
    return [int(n) for n in _ARRAY.findall(type_)[0][1].split(",") if n]


def _bytes(array: tuple[str, str]) -> int:
    dtype, dims = array
    bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
    return math.prod(int(n) for n in dims.split(",") if n) * bits // 8
