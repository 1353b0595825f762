"""Labels: the single source of truth about what happens to each parameter."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from trainer import config
from trainer.errors import UserError, nearest
from trainer.rules import assign, paths


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter of the label table.

    Attributes:
      path: its name, joined by slashes.
      shape: its shape.
      dtype: its dtype.
      label: the label that the first matching rule gave it.
      weight_decay: its group's decay, as text.
      parameters: how many numbers it holds.
      bytes: how much memory they take.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    label: str
    weight_decay: str
    parameters: int
    bytes: int


def label_tree(params: Any, rules: Sequence[tuple[str, str]], groups: Mapping[str, config.Group]) -> Any:
    """The tree of labels of `params`, of which only the paths matter (so it may come from `jax.eval_shape`).

    Raises:
      UserError: a parameter without a rule, a rule that decides nothing, a label without a group, or a group without
        a parameter.
    """
    for _, label in rules:
        if label not in groups:
            raise UserError(f"label {label!r} has no group in optimizer.groups{nearest(label, groups)}")
    labels = assign(rules, params, what="label rule")
    for name in groups:
        if name not in jax.tree.leaves(labels):
            raise UserError(f"group {name!r} has no parameter: no rule in optimizer.labels gives that label")
    return labels


def label_table(params: Any, labels: Any, groups: Mapping[str, config.Group]) -> list[Row]:
    """One row per parameter, in the order of the tree's leaves."""
    return [
        Row(
            path,
            tuple(leaf.shape),
            np.dtype(leaf.dtype).name,
            label,
            number_text(groups[label].decay_schedule or groups[label].weight_decay),
            leaf.size,
            leaf.size * leaf.dtype.itemsize,
        )
        for path, leaf, label in zip(paths(params), jax.tree.leaves(params), jax.tree.leaves(labels), strict=True)
    ]


def number_text(number: float | config.Schedule) -> str:
    """A number or a schedule of one in a few characters, such as `0.1`, `cosine 0.1` or `cosine 0.1 → 0.01`."""
    if not isinstance(number, config.Schedule):
        return f"{number:g}"
    if number.name == "constant" and not number.warmup:
        return f"{number.peak:g}"
    return f"{number.name} {number.peak:g}" + (f" → {number.final:g}" if number.final else "")


def digest(rows: Sequence[Row]) -> str:
    """A fingerprint of the table: equal when every parameter has the same path, shape, dtype, label and group."""
    text = json.dumps([dataclasses.astuple(row) for row in rows])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
