"""Metadata of a checkpoint: its arrays, its run, its data, and checksums that reveal damage."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from trainer import config
from trainer.errors import UserError
from trainer.files import DamagedError
from trainer.params import ParamTable
from trainer.rules import path_of
from trainer.state import TrainState
from trainer.versions import versions

_FORMAT = 2
_KEYS = {"param_labels": "params", "row_count": "rows"}  # the JSON key of each field that has another name
_KINDS = {  # the type of each JSON value
    **dict.fromkeys(("step", "rows"), int),
    **dict.fromkeys(("data", "accepted"), list),
    **dict.fromkeys(("config", "params", "versions", "leaves", "checksums"), dict),
}


class Leaf(NamedTuple):
    """The shape and dtype of one array of a state."""

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


class DataIdentity(NamedTuple):
    """The training examples: their number, and `trainer.data.identity.fingerprint`, which may be None."""

    examples: int
    fingerprint: str | None


@dataclasses.dataclass(frozen=True)
class Metadata:
    """All that is saved beside the arrays of a checkpoint, as JSON values."""

    step: int  # updates made
    config: Mapping[str, Any]  # the JSON of the resolved run
    param_labels: Mapping[str, Sequence[str]]  # label and weight decay of each parameter, by path
    data: DataIdentity
    row_count: int  # of metrics.jsonl when the checkpoint was saved
    versions: Mapping[str, str]  # of the packages on which the bits of a result depend
    accepted: Sequence[str] = ()  # changes that alter the updates, allowed by `--accept-changes`, oldest first
    leaves: Mapping[str, Leaf] = dataclasses.field(default_factory=dict)  # of every array, by path
    checksums: Mapping[str, int] = dataclasses.field(default_factory=dict)  # of every array, by path

    def with_state(self, state: Any, checksums: np.ndarray) -> "Metadata":
        """These metadata with the leaves of a state and their checksums, in the order of the leaves."""
        leaves = leaves_of(state)
        sums = dict(zip(leaves, map(int, checksums), strict=True))
        return dataclasses.replace(self, leaves=leaves, checksums=sums)

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the SHA-256 of its content, so that any change of the file shows."""
        content = {_KEYS.get(name, name): value for name, value in dataclasses.asdict(self).items()}
        content = json.loads(json.dumps({"format": _FORMAT, **content}))
        return {"sha256": _sha256(content), "content": content}


def from_json(value: Any) -> Metadata:
    """The metadata that `Metadata.to_json` gave; raises `DamagedError` for anything else."""
    if not isinstance(value, dict) or not isinstance(content := value.get("content"), dict):
        raise DamagedError("it is not the metadata of a checkpoint")
    if value.get("sha256") != _sha256(content):
        raise DamagedError("its content does not match its hash")
    if content.pop("format", None) != _FORMAT:
        raise DamagedError("it was written by another version of this package")
    entries: dict[str, Any] = {"accepted": [], **content}
    wrong = [key for key, kind in _KINDS.items() if not isinstance(entries.get(key), kind)]
    if wrong or (wrong := sorted(entries.keys() - _KINDS.keys())):
        raise DamagedError(f"its entry {wrong[0]!r} is missing, unknown or of another type")
    if entries["leaves"].keys() != entries["checksums"].keys():
        raise DamagedError("its checksums are not those of its arrays")
    try:
        leaves = {path: Leaf(tuple(shape), dtype) for path, (shape, dtype) in entries.pop("leaves").items()}
        data = DataIdentity(*entries.pop("data"))
    except (TypeError, ValueError) as error:
        raise DamagedError(f"its arrays or its data are not described: {error}") from error
    entries |= {field: entries.pop(key) for field, key in _KEYS.items()}
    return Metadata(**entries, leaves=leaves, data=data)


def make_metadata(
    run: config.Run,
    table: ParamTable,
    data: DataIdentity,
    step: int,
    *,
    row_count: int = 0,
    accepted: Sequence[str] = (),
) -> Metadata:
    """The metadata of a state at `step`, without its leaves."""
    labels = {p.path: (p.label, p.weight_decay) for p in table.rows}
    return Metadata(step, json.loads(config.to_json(run)), labels, data, row_count, versions(), tuple(accepted))


def leaves_of(tree: Any) -> dict[str, Leaf]:
    """Shape and dtype of each array of a tree, by path, in the order of the leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "dtype"))
    return {path_of(keys): Leaf(tuple(leaf.shape), str(leaf.dtype)) for keys, leaf in leaves}


def leaf_differences(there: Mapping[str, Leaf], here: Mapping[str, Leaf]) -> list[str]:
    """One text for each leaf that differs between a checkpoint (`there`) and the state of a run (`here`)."""
    paths = [*here, *(path for path in there if path not in here)]
    changed = [path for path in paths if there.get(path) != here.get(path)]
    return [f"{path} is {there.get(path, 'missing')} there, {here.get(path, 'missing')} here" for path in changed]


def check_leaves(metadata: Metadata, like: TrainState) -> None:
    """Raises `UserError`, which lists every leaf that differs, unless `like` has the leaves of the checkpoint."""
    if differences := leaf_differences(metadata.leaves, leaves_of(like)):
        raise UserError(f"the checkpoint at step {metadata.step} does not fit this run: {'; '.join(differences)}")


def version_changes(metadata: Metadata) -> list[str]:
    """One text for each package whose version has changed since the checkpoint."""
    now, old = versions(), metadata.versions
    return [f"{name} was {was}, is {now.get(name, 'missing')}" for name, was in old.items() if now.get(name) != was]


def _sha256(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
