"""The first state of a run from something that was trained before: which array becomes what, and the state itself."""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from trainer import config
from trainer.checkpoint.metadata import Leaf, Metadata
from trainer.checkpoint.reading import restore_leaves
from trainer.errors import UserError, did_you_mean
from trainer.init_from.sources import VariableSource, open_variables
from trainer.observe import table
from trainer.optim.transforms import candidate_paths, recounted, set_count
from trainer.program import Program
from trainer.rules import assign, path_of
from trainer.state import TrainState

RULES = ("take", "fresh", "linear", "cubic", "nearest", "pad")


@dataclasses.dataclass(frozen=True)
class Row:
    """The fate of one variable of the run."""

    name: str
    rule: str  # of `RULES`
    source: str | None  # the name of the array in the source; None where the variable stays fresh
    text: str


@dataclasses.dataclass(frozen=True)
class InitPlan:
    """How the first state of a run is made from a source, of which only names, shapes and dtypes were read."""

    program: Program
    source: VariableSource
    rows: list[Row]
    unused: list[str]  # arrays of the source

    @property
    def start(self) -> int:
        """Steps that count as made: those of the source if `optimizer_state` is "carried", else 0."""
        return self.source.step or 0 if _settings(self.program).optimizer_state == "carried" else 0

    def __str__(self) -> str:
        """A row for each variable."""
        rows = [(row.name, row.text, row.source or "-") for row in self.rows]
        unused = f"not used: {', '.join(self.unused)}\n" if self.unused else ""
        return f"begins from the {self.source.text}\n{table(('variable', 'is', 'from'), rows)}{unused}"

    def state(self) -> TrainState:
        """The state. All processes call it."""
        program, like = self.program, _variables(self.program)
        fresh = program.init()
        replicated = program.strategy.sharding("", ())
        taken = {row.source: row for row in self.rows if row.source is not None}
        wanted = {}
        for source_name, row in taken.items():
            fits = self.source.leaves[source_name].shape == like[row.name].shape
            wanted[source_name] = like[row.name].sharding if fits else replicated
        arrays = self.source.read(wanted)
        values = _variables(program, fresh)
        for source_name, row in taken.items():
            make = jax.jit(partial(_RESIZE[row.rule]), out_shardings=like[row.name].sharding)
            values[row.name] = make(arrays[source_name], values[row.name])
        kinds = ("params", "collections")
        state = _replaced(fresh, {f"{kind}/{name}": x for kind in kinds for name, x in values.items()})
        if state.ema is not None:
            state = _replaced(state, {f"ema/{name}": x for name, x in values.items()})
        shardings = jax.tree.map(lambda x: x.sharding, program.state.opt_state)
        opt_state = jax.jit(program.optimizer.init, out_shardings=shardings)(state.params)
        state = dataclasses.replace(state, opt_state=opt_state)
        return state if self.start == 0 else self._carried(state)

    def _carried(self, state: TrainState) -> TrainState:
        """The state with the step, and with every array of optimizer state, EMA params and guard that fits."""
        assert self.source.metadata is not None
        assert self.source.place is not None
        saved, wanted, places = self.source.metadata.leaves, {}, {}
        copied_from = {row.name: row.source if row.rule == "take" else None for row in self.rows}
        moments_from = copied_from | dict.fromkeys(_restarted(self.program, self.source.metadata))
        for path, leaf in _paths(self.program.state).items():
            names = moments_from if path.startswith("opt_state/") else copied_from
            source_path = next((p for p in _source_paths(path, names) if p in saved), None)
            if source_path is not None and saved[source_path] == Leaf(tuple(leaf.shape), str(leaf.dtype)):
                wanted[source_path] = jax.ShapeDtypeStruct(*saved[source_path], sharding=leaf.sharding)
                places[path] = source_path
        arrays = restore_leaves(self.source.place, self.source.metadata, wanted)
        groups, step = self.program.groups, jnp.asarray(self.start, jnp.int32)
        counted = dataclasses.replace(state, opt_state=set_count(state.opt_state, groups, step))
        carried = _replaced(counted, {path: arrays[source_path] for path, source_path in places.items()})
        opt_state = recounted(carried.opt_state, groups, self.program.state.opt_state)
        return dataclasses.replace(carried, opt_state=opt_state)


def _restarted(program: Program, metadata: Metadata) -> list[str]:
    """The parameters whose label had another optimizer in the run of the source: its moments mean something else."""
    here, there = json.loads(config.to_json(program.run))["optimizer"], metadata.config["optimizer"]
    ours, theirs = (
        {label: group.get("optimizer") or o["name"] for label, group in o["groups"].items()} for o in (here, there)
    )
    return [p.path for p in program.param_table.rows if theirs.get(p.label, ours[p.label]) != ours[p.label]]


def plan_init(program: Program) -> InitPlan | None:
    """How `Run.init_from` makes the first state; None if the run begins with fresh variables.

    Raises `UserError` if there is no such source, or if a variable is not covered or does not fit.
    """
    if (settings := program.run.init_from) is None:
        return None
    is_carried = settings.optimizer_state == "carried"
    source = open_variables(settings.source, raw=is_carried)
    if is_carried and source.step is None:
        raise UserError(f"init_from.optimizer_state is 'carried', but the {source.text} are no state of a run")
    if is_carried and (source.step or 0) >= program.run.total_steps:
        left = f"is already at step {source.step}, so nothing is left of total_steps {program.run.total_steps}"
        raise UserError(f"init_from.optimizer_state is 'carried', but the source ({source.text}) {left}")
    names, here = _renamed(source, settings), _variables(program)
    for _, rule in settings.rules:
        if rule not in RULES:
            raise UserError(f"init_from.rules has {rule!r}{did_you_mean(rule, RULES)}")
    rules = settings.rules or ((".*", "take"),)
    actions = assign(rules, dict(here), what="init_from rule")
    rows, problems = [], []
    for name, leaf in here.items():
        row, problem = _row(name, actions[name], leaf, names.get(name), source)
        rows.append(row)
        problems += [problem] if problem else []
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        hint = "give init_from.rename, or in the config init_from.rules such as [('head/.*', 'fresh'), ('.*', 'take')]"
        raise UserError(f"the {source.text} do not fit: {'; '.join(problems[:8])}{more}; {hint}")
    used = {row.source for row in rows}
    return InitPlan(program, source, rows, [name for name in source.leaves if name not in used])


def _settings(program: Program) -> config.InitFrom:
    assert program.run.init_from is not None
    return program.run.init_from


def _row(name: str, rule: str, here: Any, source_name: str | None, source: VariableSource) -> tuple[Row, str]:
    """The row of a variable, and what is wrong with it."""
    if rule == "fresh":
        return Row(name, rule, None, f"fresh, {_leaf(here)}"), ""
    if source_name is None:
        known = did_you_mean(name, source.leaves)
        return Row(name, rule, None, ""), f"it has no {name}{known}"
    saved = source.leaves[source_name]
    cast = "" if saved.dtype == str(here.dtype) else f", cast from {saved.dtype}"
    if saved.shape == tuple(here.shape):
        return Row(name, "take", source_name, f"taken, {_leaf(here)}{cast}"), ""
    if rule == "take" or len(saved.shape) != len(here.shape):
        return Row(name, rule, None, ""), f"{name} is {list(saved.shape)} there, {list(here.shape)} here"
    resized = f"{rule} from {list(saved.shape)}, {_leaf(here)}{cast}"
    return Row(name, rule, source_name, resized), ""


def _leaf(leaf: Any) -> str:
    return str(Leaf(tuple(leaf.shape), str(leaf.dtype)))


def _renamed(source: VariableSource, settings: config.InitFrom) -> dict[str, str]:
    """The names in the source by the names that the first matching pattern of `rename` gives them."""
    used: set[str] = set()
    found: dict[str, str] = {}
    for source_name in source.leaves:
        name = source_name
        for pattern, replacement in settings.rename:
            try:
                if (match := re.fullmatch(pattern, source_name)) is not None:
                    name, _ = match.expand(replacement), used.add(pattern)
                    break
            except re.error as error:
                raise UserError(f"init_from.rename {pattern!r} → {replacement!r}: {error}") from error
        if name in found:
            raise UserError(f"init_from.rename gives {found[name]} and {source_name} one name, {name}")
        found[name] = source_name
    if idle := [pattern for pattern, _ in settings.rename if pattern not in used]:
        raise UserError(f"init_from.rename {idle[0]!r} matches no array of the {source.text}, or earlier ones do")
    return found


def _paths(state: TrainState) -> dict[str, Any]:
    return {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(state)}


def _variables(program: Program, state: TrainState | None = None) -> dict[str, Any]:
    """The parameters and other variables of a state, by default the program's abstract one, by name."""
    found = {}
    for path, leaf in _paths(program.state if state is None else state).items():
        for prefix in ("params/", "collections/"):
            if path.startswith(prefix):
                found[path.removeprefix(prefix)] = leaf
    return found


def _replaced(state: TrainState, arrays: Mapping[str, Any]) -> TrainState:
    """The state with other arrays at some paths, sharded and typed as before."""

    def replace(keys: Any, old: Any) -> Any:
        new = arrays.get(path_of(keys))
        return old if new is None else jax.device_put(jnp.asarray(new, old.dtype), old.sharding)

    return jax.tree_util.tree_map_with_path(replace, state)


def _source_paths(path: str, copied_from: Mapping[str, str | None]) -> list[str]:
    """Candidate paths, in the source's state, of one array of this run's state; [] if its variable was not copied.

    Args:
      path: in this run's state.
      copied_from: the name in the source of each variable; None if it was not copied as it is.
    """
    if path == "step" or path.startswith("guard/"):
        return [path]
    if not path.startswith(("opt_state/", "ema/")):
        return []
    name = path
    while name:
        name = name.partition("/")[2]
        if name in copied_from:
            source_name = copied_from[name]
            return [] if source_name is None else candidate_paths(path.removesuffix(name) + source_name)
    return candidate_paths(path)  # a count


def _pad(x: jax.Array, fresh: jax.Array) -> jax.Array:
    """The corner that both shapes share from `x`, the rest fresh."""
    corner = tuple(slice(0, min(a, b)) for a, b in zip(x.shape, fresh.shape, strict=True))
    return fresh.at[corner].set(x[corner].astype(fresh.dtype))


def _interpolated(method: str, x: jax.Array, fresh: jax.Array) -> jax.Array:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jax.image.resize(wide, fresh.shape, method).astype(fresh.dtype)


_RESIZE: dict[str, Callable[[Any, Any], Any]] = {
    "take": lambda x, fresh: x.astype(fresh.dtype),
    "pad": _pad,
    **{method: partial(_interpolated, method) for method in ("linear", "cubic", "nearest")},
}
