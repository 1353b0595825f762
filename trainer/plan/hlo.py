"""HLO, the text of a compiled program: its instructions, and how many times each computation runs."""

import dataclasses
import functools
import re
from collections.abc import Iterator

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_CALLS = re.compile(r"\b(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO.

    Attributes:
      name: unique in the program.
      type: of the result, such as "bf16[8,128]{1,0}", or a tuple of such.
      opcode: such as "all-gather".
      rest: operands and attributes, as in the text.
      root: whether the result is that of the whole computation.
    """

    name: str
    type: str
    opcode: str
    rest: str
    root: bool

    @functools.cached_property
    def operands(self) -> list[str]:
        """The names of the instructions whose results are the operands."""
        return re.findall(r"%([\w.\-]+)", self.rest[: _closing(self.rest)])

    def attribute(self, name: str) -> str:
        """The value of an attribute up to the next space or comma; "" if the instruction has no such attribute."""
        match = re.search(rf"\b{name}=%?([^\s,]+)", self.rest)
        return match[1] if match else ""


Computations = dict[str, list[Instruction]]


def parse(text: str) -> tuple[Computations, str]:
    """The instructions of each computation by name, and the name of the entry computation."""
    computations: Computations = {}
    entry, current = "", []
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif match := _LINE.match(line):
            root, name, type_, opcode, rest = match.groups()
            current.append(Instruction(name, type_, opcode, rest, bool(root)))
    return computations, entry


def run_counts(computations: Computations, entry: str) -> dict[str, tuple[int, bool]]:
    """How many times each computation runs in a step, and whether the count is exact. Every branch counts as taken.

    XLA's own cost analysis counts the body of every loop once.
    """
    counts: dict[str, tuple[int, bool]] = {}
    waiting = [(entry, 1, True)]
    while waiting:
        name, count, exact = waiting.pop()
        before, before_exact = counts.get(name, (0, True))
        counts[name] = (before + count, before_exact and exact)
        for i in computations.get(name, []):
            if i.opcode == "while":
                trips = _trip_count(computations, name, i)
                waiting.append((i.attribute("body"), count * (trips or 1), exact and trips is not None))
            else:
                waiting += [(called, count, exact) for called in _called(i)]
    return counts


def _called(i: Instruction) -> Iterator[str]:
    yield from _CALLS.findall(i.rest)
    if branches := re.search(r"branch_computations=\{([^}]*)\}", i.rest):
        yield from re.findall(r"%([\w.\-]+)", branches[1])


def _trip_count(computations: Computations, caller: str, loop: Instruction) -> int | None:
    """The trip count of a loop whose counter grows in equal steps up to a constant; None for any other loop.

    XLA:CPU states it in the text; libtpu 0.0.52 states it for no loop.
    """
    if stated := re.search(r"known_trip_count\W+n\W+(\d+)", loop.rest):
        return int(stated[1])
    condition = {i.name: i for i in computations[loop.attribute("condition")]}
    body = {i.name: i for i in computations[loop.attribute("body")]}
    outside = {i.name: i for i in computations[caller]}
    test = next((i for i in condition.values() if i.root), None)
    if test is None or test.opcode != "compare" or test.attribute("direction") != "LT":
        return None
    counter, limit = (condition[name] for name in test.operands)
    index = counter.attribute("index")
    start = _constant(outside, _tuple_element(outside, loop.operands[0], index))
    root = next(i for i in body.values() if i.root)
    step = _increment(body, _tuple_element(body, root.name, index), index)
    stop = _constant(condition, limit.name)
    if start is None or stop is None or not step:
        return None
    return max(0, -(-(stop - start) // step))


def _tuple_element(instructions: dict[str, Instruction], name: str, index: str) -> str:
    """The name of an element of the tuple `name`; "" if no instruction of this computation makes the tuple."""
    made = instructions.get(name)
    while made is not None and made.opcode in ("copy", "optimization-barrier"):
        made = instructions.get(made.operands[0])
    return made.operands[int(index)] if made is not None and made.opcode == "tuple" and index else ""


def _constant(instructions: dict[str, Instruction], name: str) -> int | None:
    made = instructions.get(name)
    while made is not None and made.opcode in ("copy", "bitcast", "reshape"):
        made = instructions.get(made.operands[0])
    digits = re.match(r"(-?\d+)\)", made.rest) if made is not None and made.opcode == "constant" else None
    return int(digits[1]) if digits else None


def _increment(body: dict[str, Instruction], name: str, index: str) -> int | None:
    """The constant that a loop's body adds to its counter; None if the body does anything else to the counter."""
    total = 0
    while (made := body.get(name)) is not None:
        if made.opcode == "get-tuple-element":
            return total if made.attribute("index") == index else None
        if made.opcode == "copy":
            name = made.operands[0]
            continue
        if made.opcode != "add":
            return None
        constants = [_constant(body, operand) for operand in made.operands]
        if constants.count(None) != 1:
            return None
        total += next(c for c in constants if c is not None)
        name = made.operands[constants.index(None)]
    return None


def _closing(text: str) -> int:
    """The position of the bracket that closes the operands at the beginning of the text."""
    depth = 1
    for position, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return position
    return len(text)
