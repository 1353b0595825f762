"""The sharding of each parameter: from path rules, from Linen's logical axes, or by its largest dimension."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec

from trainer import config
from trainer.errors import UserError
from trainer.rules import assign, paths
from trainer.sharding.mesh import AXES, STRATEGIES

DimensionAxes = tuple[str | None, ...]
AxisRules = tuple[tuple[str, str | None], ...]

_TENSOR: AxisRules = (("vocab", "tensor"), ("heads", "tensor"), ("mlp", "tensor"))
_FSDP: AxisRules = (("vocab", "fsdp"), ("embed", "fsdp"))
DEFAULT_AXIS_RULES: AxisRules = (*_TENSOR, *_FSDP, ("head_dim", None), ("layers", None), ("length", None))


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """The sharding of a parameter and of its optimizer state; `zero1` applies fsdp to the optimizer state only."""

    path: str
    shape: tuple[int, ...]  # of the global array
    axes: DimensionAxes  # one of `AXES` or None for each dimension; an axis of size 1 counts as None
    why: str  # what decided: "rule" (of `parallel.rules`), the logical axes or the size; or why it is replicated

    def __str__(self) -> str:
        return f"({', '.join(axis or '-' for axis in self.axes)})" if any(self.axes) else "replicated"


def axis_rules(parallel: config.Parallel) -> AxisRules:
    """The rules for logical axes: the user's before the defaults."""
    for name, axis in parallel.axis_rules:
        if axis is not None and axis not in AXES:
            raise UserError(f"parallel.axis_rules maps {name!r} to axis {axis!r}; there are {', '.join(AXES)}")
    return (*parallel.axis_rules, *DEFAULT_AXIS_RULES)


def unmapped_axes(params: Any, parallel: config.Parallel) -> list[str]:
    """The logical axes that no rule maps, which are replicated; `parallel.strict_axes` raises `UserError` for them."""
    known, named = list(dict(axis_rules(parallel))), {} if parallel.rules else _logical_axes(params)
    unmapped = {name: path for path, names in named.items() for name in names if name and name not in known}
    for name, path in unmapped.items() if parallel.strict_axes else ():
        reason = f"which parallel.axis_rules does not map (it maps {known})"
        raise UserError(f"{path} has the logical axis {name!r}, {reason}")
    return list(unmapped)


def param_specs(params: Any, parallel: config.Parallel, sizes: Mapping[str, int]) -> list[ParamSpec]:
    """The sharding of every parameter, in the order of the leaves.

    Args:
      params: as `init` or `jax.eval_shape` returns them, with the boxes of `nn.with_logical_partitioning`, if any.
      parallel: `rules` decide if there are any, else logical axes where the model names them, else size.
      sizes: the number of devices along each axis.

    Raises:
      UserError: a rule that matches no parameter, a parameter that no rule matches, an axis that does not exist or does
        not divide its dimension, an axis or a logical axis named twice in one parameter, or a tensor strategy without
        rules and logical axes.
    """
    logical, params = _logical_axes(params), nn.unbox(params)
    if sizes["tensor"] > 1 and not logical and not parallel.rules:
        raise UserError(
            f"strategy {parallel.strategy!r} shards by parallel.rules or by the logical axes of a model "
            "(nn.with_logical_partitioning); this run has neither"
        )
    path_rules = [(pattern, PartitionSpec(*axes)) for pattern, axes in parallel.rules]
    by_rule = jax.tree.leaves(assign(path_rules, params, what="sharding rule")) if path_rules else ()
    rules = [(name, axis) for name, axis in axis_rules(parallel) if axis is None or sizes[axis] > 1]
    specs = []
    for i, (path, leaf) in enumerate(zip(paths(params), jax.tree.leaves(params), strict=True)):
        if by_rule:
            axes, why = by_rule[i], "rule"
        elif names := logical.get(path):
            if twice := next((name for name in names if name is not None and names.count(name) > 1), None):
                raise UserError(f"{path} has the logical axis {twice!r} twice: {names}")
            # Flax's own semantics: rules in order, and no axis of the mesh twice in one array.
            axes, why = nn.logical_to_mesh_axes(names, rules) or (), f"logical axes {', '.join(map(str, names))}"
        else:
            axes, why = _by_size(leaf.shape, parallel, sizes)
        specs.append(_checked(ParamSpec(path, tuple(leaf.shape), tuple(axes), why), parallel, sizes))
    return specs


def _logical_axes(params: Any) -> dict[str, DimensionAxes]:
    """The names in the boxes, by the path of the parameter."""
    boxes = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, nn.Partitioned))
    leaves = zip(paths(nn.unbox(params)), boxes, strict=True)
    return {path: box.names for path, box in leaves if isinstance(box, nn.Partitioned)}


def _by_size(shape: tuple[int, ...], parallel: config.Parallel, sizes: Mapping[str, int]) -> tuple[DimensionAxes, str]:
    """Shards the largest dimension that is a multiple of the size of fsdp; of equally large ones, the last."""
    fsdp, replicated = sizes["fsdp"], (None,) * len(shape)
    if fsdp == 1:
        return replicated, "no logical axes"
    if math.prod(shape) < parallel.min_shard_size:
        return replicated, f"fewer than {parallel.min_shard_size:,} numbers"
    dividing = [(size, dimension) for dimension, size in enumerate(shape) if size % fsdp == 0]
    if not dividing:
        return replicated, f"no dimension divides by {fsdp}"
    _, chosen = max(dividing)
    return (*replicated[:chosen], "fsdp", *replicated[chosen + 1 :]), "largest dimension"


def _checked(spec: ParamSpec, parallel: config.Parallel, sizes: Mapping[str, int]) -> ParamSpec:
    """The spec without axes of size 1, if it fits the parameter."""
    path, shape, axes, why = spec.path, spec.shape, spec.axes, spec.why
    if len(axes) > len(shape):
        raise UserError(f"{why} for {path} names {len(axes)} dimensions; its shape is {shape}")
    for size, axis in zip(shape, axes, strict=False):
        if axis is not None and axis not in sizes:
            raise UserError(f"{why} for {path} names axis {axis!r}; there are {', '.join(AXES)}")
        if axis is not None and size % sizes[axis]:
            raise UserError(f"{path} {shape} does not divide over axis {axis!r} of size {sizes[axis]} ({why})")
    if any(axis is not None and axes.count(axis) > 1 for axis in axes):
        raise UserError(f"{why} for {path} names an axis twice: {axes}")
    axes = tuple(axis if axis is not None and sizes[axis] > 1 else None for axis in axes)
    strategy_axes = STRATEGIES[parallel.strategy]
    if not any(axes) and sizes["fsdp"] * sizes["tensor"] == 1:
        one = "one device" if sizes["data"] == 1 else f"{' and '.join(strategy_axes.opt_state)} of size 1"
        why = one if strategy_axes.opt_state else f"strategy {parallel.strategy}"
    elif "fsdp" in axes and "fsdp" not in strategy_axes.params:
        why += " (fsdp: optimizer state only)"
    return dataclasses.replace(spec, axes=axes, why=why)
