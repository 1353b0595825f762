"""What lies beside every checkpointed state: whose it is and what wrote it."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from trainer import config
from trainer.errors import UserError
from trainer.optim.labels import Row, digest

_PACKAGES = ("belief-trainer", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def make_manifest(run: config.Run, rows: list[Row], step: int) -> dict[str, Any]:
    """The manifest of a checkpoint, as JSON values: step, resolved config, digest of the label table, versions."""
    return {"step": step, "config": config.to_json(run), "labels": digest(rows), "versions": versions()}


def versions() -> dict[str, str]:
    """The versions that decide the bits of a run; a package that is not installed as one is left out."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # trainer/ run from a bare checkout
            continue
    return found


def check_manifest(manifest: dict[str, Any], rows: list[Row]) -> list[str]:
    """What changed in versions since the checkpoint, one text each.

    Raises:
      UserError: the model's parameters or labels are not those of the checkpoint.
    """
    if manifest["labels"] != digest(rows):
        raise UserError(
            f"the code has changed since the checkpoint at step {manifest['step']}: its label table (labels.txt in the "
            "workdir) is not that of the model now (see `inspect`); choose another --workdir"
        )
    now = versions()
    return [
        f"{package} was {old}, is {now.get(package, 'missing')}"
        for package, old in manifest["versions"].items()
        if now.get(package) != old
    ]
