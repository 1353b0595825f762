"""Where each parameter lives: from path rules, from Linen's logical axes, or by its largest dimension."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from trainer import config
from trainer.errors import UserError
from trainer.rules import assign, path_of
from trainer.sharding.mesh import AXES

Axes = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """The sharding of a parameter over the axes of the mesh.

    Attributes:
      path: the parameter.
      shape: its shape.
      axes: for each dimension "data", "fsdp", "tensor", or None.
      why: which rule decided, or why the parameter is replicated.
    """

    path: str
    shape: tuple[int, ...]
    axes: Axes
    why: str

    def __str__(self) -> str:
        names = [axis or "-" for axis in self.axes]
        return f"({', '.join(names)})" if any(self.axes) else "replicated"


def place(params: Any, parallel: config.Parallel, sizes: Mapping[str, int]) -> list[ParamSpec]:
    """A placement for every parameter, in the order of the tree's leaves.

    Args:
      params: in shapes, as `init` returns them: with the boxes of `nn.with_logical_partitioning`, if there are any.
      parallel: `rules` decide if there are any, else logical axes where the model names them, else size.
      sizes: how many devices lie along each axis.

    Raises:
      UserError: an axis that does not exist or does not divide its dimension, a logical axis without a rule, or a
        tensor strategy that nothing tells what to split.
    """
    boxes = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_box)
    named = {path_of(keys): box.names for keys, box in boxes if _is_box(box)}
    plain = nn.unbox(params)
    leaves = [(path_of(keys), tuple(leaf.shape)) for keys, leaf in jax.tree_util.tree_leaves_with_path(plain)]
    if parallel.rules:
        rules = [(pattern, _Leaf(axes)) for pattern, axes in parallel.rules]
        assigned = jax.tree.leaves(assign(rules, plain, what="sharding rule"))
        placed = [
            ParamSpec(path, shape, leaf.axes, "rule") for (path, shape), leaf in zip(leaves, assigned, strict=True)
        ]
    elif sizes["tensor"] > 1 and not named:
        raise UserError(
            f"strategy {parallel.strategy!r} splits what parallel.rules or the logical axes of a model "
            "(nn.with_logical_partitioning) say; this run has neither"
        )
    else:
        placed = [
            _by_name(path, shape, named[path], parallel, sizes)
            if path in named
            else _by_size(path, shape, parallel, sizes)
            for path, shape in leaves
        ]
    for placement in placed:
        _check(placement, sizes)
    return placed


def _is_box(x: Any) -> bool:
    return isinstance(x, nn.Partitioned)


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """Axes as one leaf: a bare tuple would be taken for part of the tree."""

    axes: Axes


def _by_name(
    path: str,
    shape: tuple[int, ...],
    names: tuple[str | None, ...],
    parallel: config.Parallel,
    sizes: Mapping[str, int],
) -> ParamSpec:
    known = dict(parallel.axis_rules)
    for name in names:
        if name is not None and name not in known:
            raise UserError(
                f"{path} has the logical axis {name!r}, which parallel.axis_rules does not map (it maps {list(known)})"
            )
    rules = [(name, axis) for name, axis in parallel.axis_rules if sizes.get(axis or "") != 1]
    # Flax's own semantics: rules in order, and no mesh axis twice in one array.
    axes = tuple(nn.logical_to_mesh_axes(names, rules) or ())
    return ParamSpec(path, shape, axes, "logical axes " + ", ".join(map(str, names)))


def _by_size(path: str, shape: tuple[int, ...], parallel: config.Parallel, sizes: Mapping[str, int]) -> ParamSpec:
    """Splits the largest dimension that divides; the last of several."""
    parts, elements = sizes["fsdp"], 1
    for size in shape:
        elements *= size
    nothing: Axes = (None,) * len(shape)
    if elements < parallel.min_shard_size:
        return ParamSpec(path, shape, nothing, f"fewer than {parallel.min_shard_size:,} numbers")
    dividing = [(size, dimension) for dimension, size in enumerate(shape) if size % parts == 0]
    if not dividing:
        return ParamSpec(path, shape, nothing, f"no dimension divides by {parts}")
    _, chosen = max(dividing)
    return ParamSpec(path, shape, (*nothing[:chosen], "fsdp", *nothing[chosen + 1 :]), "largest dimension")


def _check(placement: ParamSpec, sizes: Mapping[str, int]) -> None:
    path, shape, axes = placement.path, placement.shape, placement.axes
    if len(axes) > len(shape):
        raise UserError(f"{placement.why} for {path} names {len(axes)} dimensions; its shape is {shape}")
    for size, axis in zip(shape, axes, strict=False):
        if axis is not None and axis not in sizes:
            raise UserError(f"{placement.why} for {path} names axis {axis!r}; there are {', '.join(AXES)}")
        if axis is not None and size % sizes[axis]:
            raise UserError(
                f"{path} {shape} does not divide over axis {axis!r} of size {sizes[axis]} ({placement.why})"
            )
    used = [axis for axis in axes if axis is not None]
    if len(set(used)) < len(used):
        raise UserError(f"{placement.why} for {path} names an axis twice: {axes}")
