"""HLO, the text of a compiled program: its instructions, and how often each part of it runs."""

import dataclasses
import functools
import re
from collections.abc import Iterator

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_CALLS = re.compile(r"\b(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of the text.

    Attributes:
      name: unique in the program.
      type: of the result, such as "bf16[8,128]{1,0}", or a tuple of such.
      opcode: what it does, such as "all-gather".
      rest: operands and attributes, as they are written.
      root: whether its result is that of its computation.
    """

    name: str
    type: str
    opcode: str
    rest: str
    root: bool

    @functools.cached_property
    def operands(self) -> list[str]:
        """The names of the instructions whose results go in."""
        return re.findall(r"%([\w.\-]+)", self.rest[: _closing(self.rest)])

    def attribute(self, name: str) -> str:
        """The value of an attribute up to the next space or comma; "" if there is none."""
        found = re.search(rf"\b{name}=%?([^\s,]+)", self.rest)
        return found[1] if found else ""


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The instructions of each computation, and the name of the one that is the program."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", []
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif match := _LINE.match(line):
            root, name, type_, opcode, rest = match.groups()
            current.append(Instruction(name, type_, opcode, rest, bool(root)))
    return computations, entry


def run_counts(computations: dict[str, list[Instruction]], entry: str) -> dict[str, tuple[int, bool]]:
    """How often each computation runs in a step, and whether that is known. Every branch counts as taken."""
    times: dict[str, tuple[int, bool]] = {}
    waiting = [(entry, 1, True)]
    while waiting:
        name, often, exact = waiting.pop()
        before, known = times.get(name, (0, True))
        times[name] = (before + often, known and exact)
        for i in computations.get(name, []):
            if i.opcode == "while":
                count = _trip_count(computations, name, i)
                waiting.append((i.attribute("body"), often * (count or 1), exact and count is not None))
            else:
                waiting += [(called, often, exact) for called in _called(i)]
    return times


def _called(i: Instruction) -> Iterator[str]:
    yield from _CALLS.findall(i.rest)
    if branches := re.search(r"branch_computations=\{([^}]*)\}", i.rest):
        yield from re.findall(r"%([\w.\-]+)", branches[1])


def _trip_count(computations: dict[str, list[Instruction]], caller: str, loop: Instruction) -> int | None:
    """How often a loop runs that counts upwards in equal steps to a constant; None for any other."""
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
    start = _constant(outside, _element(outside, loop.operands[0], index))
    root = next(i for i in body.values() if i.root)
    step = _step(computations, body, _element(body, root.name, index), index)
    stop = _constant(condition, limit.name)
    if start is None or stop is None or not step:
        return None
    return max(0, -(-(stop - start) // step))


def _element(instructions: dict[str, Instruction], name: str, index: str) -> str:
    """The name of the element of a tuple, or "" if it is not made where we look."""
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


def _step(
    computations: dict[str, list[Instruction]], body: dict[str, Instruction], name: str, index: str
) -> int | None:
    """What a loop's body adds to its counter."""
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
        known = constants.index(None)
        total += next(c for c in constants if c is not None)
        name = made.operands[known]
    return None


def _closing(text: str) -> int:
    """Where the bracket closes that was opened before the text."""
    depth = 1
    for at, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return at
    return len(text)
