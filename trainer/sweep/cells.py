"""The cells of a sweep: every combination of the grid's values, for each random draw."""

import copy
import hashlib
import itertools
import math
import re
import typing
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from trainer import config
from trainer.errors import UserError

SEED = "seed"
_NAME_BYTES = 200  # the most bytes of a folder's name in UTF-8; file systems allow 255
_NUMBER = r"\s*[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?\s*"
_RANGE = re.compile(rf"({_NUMBER}):({_NUMBER})(:log)?")
_DIGITS = 4  # of a number that is drawn: enough for a search, and few enough for a name
# The paths of the settings that `compile_once` makes arguments of the compiled program.
_ARGUMENTS = re.compile(
    rf"{SEED}|optimizer\.(groups\..+\.)?(decay_)?schedule\.(peak|final)|optimizer\.groups\..+\.weight_decay"
)

Override = Callable[[config.Run, Sequence[str]], config.Run]  # as `trainer.commands.arguments.override`


class Cell(NamedTuple):
    """One run of a sweep."""

    index: int  # from 0, in the order of the command
    name: str  # of its workdir, such as "optimizer.schedule.peak=0.001,seed=0"
    settings: Mapping[str, Any]  # the values that vary, by path
    run: config.Run  # resolved

    @property
    def group(self) -> tuple[tuple[str, Any], ...]:
        """The settings without the seed: cells with the same ones are repetitions of each other."""
        return tuple((path, value) for path, value in self.settings.items() if path != SEED)


def make_cells(run: config.Run, sweep: config.Sweep, override: Override) -> tuple[list[Cell], int]:
    """The cells in order, and the number of random draws that gave cells that were there already.

    Args:
      run: what all cells have in common, not yet resolved.
      sweep: what varies.
      override: applies flags such as "--config.seed=1" to a run in place, checks them, and returns the run. It is
        called with a copy.

    Raises `UserError` for an unknown setting, with the nearest, a value that it does not take, a value that the grid
    has twice, and settings of a cell that contradict each other.
    """
    if not (sweep.grid or sweep.random):
        raise UserError("nothing varies: give --grid PATH=VALUE,VALUE, or get_sweep() in the config file")
    if both := sorted(sweep.grid.keys() & sweep.random.keys()):
        raise UserError(f"{both[0]} is in the grid and drawn at random; give one of them")
    axes = {path: _axis(run, path, values, override) for path, values in sweep.grid.items()}
    cells, duplicate_count = list[Cell](), 0
    names = set[str]()
    for trial in range(sweep.trials if sweep.random else 1):
        drawn = {path: draw(run, path, text, sweep.search_seed, trial) for path, text in sweep.random.items()}
        for texts in itertools.product(*axes.values()):
            cell = _cell(len(cells), run, drawn | dict(zip(axes, texts, strict=True)), override)
            if cell.name in names:
                duplicate_count += 1
                continue
            names.add(cell.name)
            cells.append(cell)
    return cells, duplicate_count


def _axis(run: config.Run, path: str, values: str | Sequence[Any], override: Override) -> list[str]:
    """The values of a setting as the texts of flags; raises `UserError` unless they are valid and different."""
    texts = split_values(values) if isinstance(values, str) else [_flag_text(value) for value in values]
    if not texts:
        raise UserError(f"--grid {path} has no values: {path}=VALUE,VALUE is expected")
    seen = dict[str, str]()
    for text in texts:
        value = repr(_values(_overridden(run, {path: text}, override), [path])[path])
        if value in seen:
            other = "" if seen[value] == text else f", as {seen[value]} and as {text}"
            raise UserError(f"--grid {path} has the value {value} twice{other}")
        seen[value] = text
    return texts


def _cell(index: int, run: config.Run, texts: Mapping[str, str], override: Override) -> Cell:
    changed = _overridden(run, texts, override)
    settings = _values(changed, sorted(texts))
    name = cell_name(settings)
    try:
        return Cell(index, name, settings, config.resolve(changed))
    except UserError as error:
        raise UserError(f"cell {name}: {error}") from error


def _overridden(run: config.Run, texts: Mapping[str, str], override: Override) -> config.Run:
    return override(copy.deepcopy(run), [f"--config.{path}={text}" for path, text in texts.items()])


def _values(run: config.Run, paths: Sequence[str]) -> dict[str, Any]:
    """The values of settings, by path."""
    found = {}
    for path in paths:
        owner, name, _ = config.setting_at(run, path)
        found[path] = owner[name] if isinstance(owner, dict) else getattr(owner, name)
    return found


def _flag_text(value: Any) -> str:
    """The text of a flag that sets a value."""
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value)


def split_values(text: str) -> list[str]:
    """The values in a text, at the commas outside of brackets: "(32, 64),(16,)" has two."""
    depth, values = 0, [""]
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth <= 0:
            values.append("")
        else:
            values[-1] += character
    return [] if not text.strip() else [value.strip() for value in values]


def draw(run: config.Run, path: str, text: str, seed: int, trial: int) -> str:
    """A random value of a setting, as the text of a flag: a function of (seed, trial, path)."""
    rng = np.random.default_rng([seed, trial, zlib.crc32(path.encode())])
    _, _, hint = config.setting_at(run, path)
    if (match := _RANGE.fullmatch(text)) is None:
        if len(values := split_values(text)) < 2:
            ways = "LOW:HIGH, LOW:HIGH:log or VALUE,VALUE is expected"
            raise UserError(f"--random {path}={text} has nothing to draw from: {ways}")
        return values[rng.integers(len(values))]
    low, high, is_log = float(match[1]), float(match[2]), match[3] is not None
    if not low < high or (is_log and low <= 0):
        order = "0 < LOW < HIGH" if is_log else "LOW < HIGH"
        raise UserError(f"--random {path}={text} is no range: {order} is expected")
    kinds = typing.get_args(hint) or (hint,)
    if int in kinds and float not in kinds:
        first, last = math.ceil(low), math.floor(high)
        if first > last:
            raise UserError(f"--random {path}={text} is a range without an integer, and config.{path} is an integer")
        if is_log:  # each integer gets its share of the logarithmic scale
            drawn = int(math.exp(rng.uniform(math.log(first), math.log(last + 1))))
            return str(min(max(drawn, first), last))
        return str(rng.integers(first, last, endpoint=True))
    number = math.exp(rng.uniform(math.log(low), math.log(high))) if is_log else rng.uniform(low, high)
    return repr(min(max(float(f"{number:.{_DIGITS}g}"), low), high))


def cell_name(settings: Mapping[str, Any]) -> str:
    """A name for a folder, the same for the same settings: paths and values, in the order of the paths."""
    exact = ",".join(f"{path}={_shown(value)}" for path, value in settings.items())
    name = re.sub(r"[^\w.,=+-]", "_", exact)
    if name == exact and len(name.encode()) <= _NAME_BYTES:
        return name
    # Something is left out, so two names could be alike: the hash tells them apart.
    cut = name.encode()[: _NAME_BYTES - 9].decode(errors="ignore")  # without the rest of a letter that is cut
    return f"{cut}~{hashlib.sha256(exact.encode()).hexdigest()[:8]}"


def _shown(value: Any) -> str:
    if isinstance(value, tuple) and all(isinstance(item, int | float) for item in value):
        return "x".join(map(str, value))
    return str(value)


def groups_of(cells: Sequence[Cell]) -> dict[tuple[tuple[str, Any], ...], list[Cell]]:
    """The cells by their settings without the seed, in order."""
    groups: dict[tuple[tuple[str, Any], ...], list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.group, []).append(cell)
    return groups


def constants(cell: Cell) -> tuple[tuple[str, Any], ...]:
    """The settings that are constants of a cell's compiled program; `compile_once` makes arguments of the others."""
    return tuple((path, value) for path, value in cell.settings.items() if not _ARGUMENTS.fullmatch(path))
