"""The table of a run's parameters: label, weight decay (both compared on resume) and sharding of each."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from trainer import config
from trainer.errors import UserError, did_you_mean
from trainer.observe import table
from trainer.optim.precision import storage_dtype
from trainer.rules import assign, paths
from trainer.sharding.specs import ParamSpec


@dataclasses.dataclass(frozen=True)
class Param:
    """One parameter, a row of the table."""

    path: str  # names of modules and the parameter, joined by slashes
    shape: tuple[int, ...]  # of the global array
    dtype: str  # such as "float32"
    label: str  # from the first label rule that matches the path
    weight_decay: str  # of the label's group, such as "0.1" or "cosine 0.1"
    spec: ParamSpec  # its sharding, and why

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def bytes(self) -> int:
        """Memory of the global array."""
        return self.size * np.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class ParamTable:
    """Every parameter of a run, in the order of the leaves of the parameter tree."""

    rows: tuple[Param, ...]
    optimizer: config.Optimizer

    def __str__(self) -> str:
        """A row for each parameter, their sums, and a row for each label with its settings."""
        header = ("path", "shape", "dtype", "label", "weight decay", "sharding", "why", "parameters", "bytes")
        cells = [
            (
                *(p.path, "×".join(map(str, p.shape)) or "scalar", p.dtype, p.label, p.weight_decay),
                *(str(p.spec), p.spec.why, f"{p.size:,}", f"{p.bytes:,}"),
            )
            for p in self.rows
        ]
        sums = (f"{sum(p.size for p in self.rows):,}", f"{sum(p.bytes for p in self.rows):,}")
        params = table(header, [*cells, ("total", *[""] * 6, *sums)], right=("weight decay", "parameters", "bytes"))
        return f"{params}\n{self._groups()}"

    def _groups(self) -> str:
        header = ("label", "parameters", "optimizer", "learning rate", "weight decay", "clip norm", "updated")
        cells = [self._group(label, group) for label, group in self.optimizer.groups.items()]
        return table((*header, "moments"), cells, right=("parameters",))

    def _group(self, label: str, group: config.Group) -> Sequence[str]:
        optimizer, members = self.optimizer, [p for p in self.rows if p.label == label]
        size = f"{sum(p.size for p in members):,}"
        if group.frozen:
            return (label, size, "frozen", *["-"] * 5)
        rate, name = config.number_text(group.schedule or optimizer.schedule), group.optimizer or optimizer.name
        is_ours, name = name in config.FUSED_OPTIMIZERS, name if isinstance(name, str) else type(name).__name__
        decay = config.number_text(group.decay_schedule or group.weight_decay)
        clips = [f"{group.clip_norm:g}"] if group.clip_norm else []
        clips += [f"{optimizer.clip_norm:g} of all"] if optimizer.clip_norm else []
        dtypes = [group.mu_dtype or optimizer.mu_dtype, group.nu_dtype or optimizer.nu_dtype]
        dtypes = dtypes[: 1 if name == "sgd" else 2]
        stored = {np.dtype(storage_dtype(p.dtype, dtype or None)).name: None for dtype in dtypes for p in members}
        return (
            *(label, size, name, rate if group.lr_multiplier == 1 else f"{rate} × {group.lr_multiplier:g}"),
            decay if optimizer.decay == "decoupled" or decay == "0" else f"{decay} {optimizer.decay}",
            ", ".join(clips) or "-",
            "every step" if group.every_steps == 1 else f"every {group.every_steps} steps",
            ", ".join(stored) if is_ours else "its own",
        )


def param_table(params: Any, labels: Any, optimizer: config.Optimizer, specs: Mapping[str, ParamSpec]) -> ParamTable:
    """The table of a tree of parameters, of which only paths, shapes and dtypes matter."""
    rows = []
    for path, leaf, label in zip(paths(params), jax.tree.leaves(params), jax.tree.leaves(labels), strict=True):
        group = optimizer.groups[label]
        decay = config.number_text(group.decay_schedule or group.weight_decay)
        rows.append(Param(path, tuple(leaf.shape), np.dtype(leaf.dtype).name, label, decay, specs[path]))
    return ParamTable(tuple(rows), optimizer)


def label_tree(params: Any, rules: Sequence[tuple[str, str]], groups: Mapping[str, config.Group]) -> Any:
    """The tree of labels of `params`, of which only the paths matter (so it may come from `jax.eval_shape`).

    Raises:
      UserError: a parameter without a rule, a rule that matches no parameter, a label without a group, or a group
        without a parameter.
    """
    for _, label in rules:
        if label not in groups:
            raise UserError(f"label {label!r} has no group in optimizer.groups{did_you_mean(label, groups)}")
    labels = assign(rules, params, what="label rule")
    for name in groups:
        if name not in jax.tree.leaves(labels):
            raise UserError(f"group {name!r} has no parameter: no rule in optimizer.labels gives that label")
    return labels
