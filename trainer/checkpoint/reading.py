"""Reads a checkpoint.

It retries a read after a transient error, and reports a damaged file differently from an unreachable one.
"""

import errno
import functools
import os
import re
import stat
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from trainer.checkpoint.checksum import checksum_on_host, finite_and_checksums
from trainer.checkpoint.late_errors import drop_late_read_errors
from trainer.checkpoint.metadata import Metadata, from_json, leaves_of
from trainer.errors import HostError
from trainer.files import AnyPath, DamagedError, read_json
from trainer.rules import path_of
from trainer.state import TrainState

_WAITS = (0.2, 1.0, 3.0)  # seconds between retries of a read that failed with a transient error
# Causes that TensorStore and Orbax report as text. None of them means that a file is damaged.
_TRANSIENT = re.compile(
    "permission.denied|unavailable|deadline.exceeded|resource.exhausted|no space left|input/output error|stale file"
    "|not connected|too many open files|cannot allocate|quota|timed? ?out|read-only file system",
    re.IGNORECASE,
)


@functools.cache  # made at the first use: it starts JAX's backend
def arrays_handler() -> ocp.PyTreeCheckpointHandler:
    """The part of Orbax that writes and reads arrays.

    Compression is off: weights are almost random bits, so it saves 8 % of the size and doubles the time.
    """
    return ocp.PyTreeCheckpointHandler(use_compression=False)


def read_metadata(place: AnyPath) -> Metadata:
    """The metadata of the checkpoint in the folder `place`, whose name is its step.

    Raises `DamagedError` if the metadata are damaged or are those of another step, `HostError` if they cannot be read
    now, and `FileNotFoundError` if the checkpoint is gone.
    """
    file = place / "metadata" / "metadata"

    def read() -> Any:
        _check_regular_files(place)
        return read_json(file)

    try:
        metadata = from_json(_retry(read, place))
    except DamagedError as error:
        raise DamagedError(f"{file}: {error}" if str(place) not in str(error) else str(error)) from error
    if str(metadata.step) != place.name:
        raise DamagedError(f"{place} holds the checkpoint of step {metadata.step}")
    return metadata


def restore(place: AnyPath, like: TrainState, metadata: Metadata) -> TrainState:
    """The state in `place`, sharded as `like` (arrays or `jax.ShapeDtypeStruct`).

    Compares the checksums before it returns. The caller must have called `check_leaves(metadata, like)`, or have
    compared the leaves in another way. Errors are those of `read_metadata`.
    """
    arrays = restore_leaves(place, metadata, _by_path(jax.tree.map(ocp.utils.to_shape_dtype_struct, like)))
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[path] for path in leaves_of(like)])


def restore_leaves(
    place: AnyPath, metadata: Metadata, wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """The arrays of the paths in `wanted`, with their shardings. Reads no other array.

    Compares the checksums before it returns. Errors are those of `read_metadata`.
    """
    arrays = _read(place, metadata, wanted)
    _compare(_checksums(arrays), metadata, place)
    return arrays


def read_keys(place: AnyPath) -> dict[str, tuple[str, ...]]:
    """The tuple of keys of each array, by path. A key may contain a slash, so a path cannot be split into its keys.

    Errors are those of `read_metadata`.
    """
    leaves = _retry(lambda: jax.tree_util.tree_leaves_with_path(_tree(place), is_leaf=_is_leaf), place)
    return {path_of(keys): tuple(path_of((key,)) for key in keys) for keys, _ in leaves}


def restore_fitting(
    place: AnyPath, like: TrainState, metadata: Metadata, saved_paths: Mapping[str, str]
) -> dict[str, jax.Array]:
    """The saved arrays that fit `like`, by path: those of the same shape, cast to its dtype if both are floating.

    `saved_paths` maps the path of each array of `like` to its path in the checkpoint. Compares the checksums before it
    returns. Errors are those of `read_metadata`.
    """
    wanted, found = {}, {}
    for path, target in _by_path(like).items():
        saved = metadata.leaves.get(saved_paths[path])
        if saved is None or saved.shape != tuple(target.shape):
            continue
        floating = jnp.issubdtype(saved.dtype, jnp.floating) and jnp.issubdtype(target.dtype, jnp.floating)
        if floating or saved.dtype == str(target.dtype):
            wanted[saved_paths[path]] = jax.ShapeDtypeStruct(saved.shape, saved.dtype, sharding=target.sharding)
            found[path] = saved_paths[path], target.dtype
    arrays = restore_leaves(place, metadata, wanted)
    return {path: jnp.asarray(arrays[saved_path], dtype) for path, (saved_path, dtype) in found.items()}


def verify(place: AnyPath) -> tuple[int, int]:
    """The number of arrays of a checkpoint and their bytes.

    Reads each array into memory and compares its checksum. It needs no model. Errors are those of `read_metadata`.
    """
    metadata = read_metadata(place)
    on_host = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    every = {path: jax.ShapeDtypeStruct(*leaf, sharding=on_host) for path, leaf in metadata.leaves.items()}
    arrays = {path: np.asarray(x) for path, x in _read(place, metadata, every).items()}
    _compare({path: checksum_on_host(x) for path, x in arrays.items()}, metadata, place)
    return len(arrays), sum(x.nbytes for x in arrays.values())


def _read(place: AnyPath, metadata: Metadata, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """The arrays of the paths in `wanted`, in their order."""

    def read() -> dict[str, jax.Array]:
        tree = _tree(place)
        if leaves_of(tree) != dict(metadata.leaves):
            raise DamagedError(f"{place} holds other arrays than its metadata say")
        like = jax.tree_util.tree_map_with_path(
            lambda keys, _: wanted.get(path_of(keys), ocp.PLACEHOLDER), tree, is_leaf=_is_leaf
        )
        arrays = _by_path(read_arrays(like, place))
        return {path: arrays[path] for path in wanted}

    return _retry(read, place)


def _by_path(tree: Any) -> dict[str, Any]:
    return {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _check_regular_files(place: AnyPath) -> None:
    """Raises `DamagedError` for a link or a pipe: no link is followed, and to open a pipe would wait for ever."""
    if not isinstance(place, Path):
        return
    if place.is_symlink() or (place.exists() and not place.is_dir()):
        raise DamagedError(f"{place} is {'a link' if place.is_symlink() else 'not a folder'}")
    for folder, folders, files in os.walk(place):
        for path in (Path(folder, name) for name in (*folders, *files)):
            mode = path.lstat().st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                kind = "a link, which is not followed" if stat.S_ISLNK(mode) else "neither a file nor a folder"
                raise DamagedError(f"{path} is {kind}")


def _compare(sums: Mapping[str, int], metadata: Metadata, place: AnyPath) -> None:
    if damaged := [path for path, here in sums.items() if metadata.checksums[path] != here]:
        more = f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""
        raise DamagedError(f"{place} is damaged: the checksum of {', '.join(damaged[:3])}{more} differs")


def _tree(place: AnyPath) -> Any:
    """The shapes and dtypes of a checkpoint in Orbax's own metadata, as a tree of nested dicts."""
    return arrays_handler().metadata(epath.Path(place / "state")).tree


def read_arrays(like: Any, place: AnyPath) -> Any:
    """The arrays of `like`, read with its dtypes and shardings. Their checksums are not checked.

    Orbax's checkpointer is not used: at the end of a read it makes the processes wait for each other, and they would
    wait for ever for one that cannot read.
    """
    arguments = ocp.args.PyTreeRestore(like, restore_args=ocp.checkpoint_utils.construct_restore_args(like))
    return arrays_handler().restore(epath.Path(place / "state"), args=arguments)


def _retry(read: Callable[[], Any], place: AnyPath) -> Any:
    """The result of `read`, which is retried after a transient error."""
    drop_late_read_errors()
    waits, was_missing = iter(_WAITS), False
    while True:
        is_missing = False
        try:
            return read()
        except DamagedError:
            raise
        except HostError:
            if (wait := next(waits, None)) is None:
                raise
        except FileNotFoundError as error:
            if not place.exists():
                raise
            if was_missing:  # in two reads in a row: another process is not removing the checkpoint right now
                raise DamagedError(f"{error.filename or place} is missing") from error
            wait, is_missing = next(waits, _WAITS[0]), True
        except (AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError, RecursionError) as error:
            if not place.exists():
                raise FileNotFoundError(errno.ENOENT, "No such checkpoint", str(place)) from error
            if not _is_transient(error):
                kind = type(error).__name__
                raise DamagedError(f"{place} cannot be read: {kind}: {short_message(error)}") from error
            if (wait := next(waits, None)) is None:
                text = f"{place} cannot be read now: {short_message(error)}; the checkpoint is not moved aside"
                raise HostError(text) from error
        was_missing = is_missing
        time.sleep(wait)


def _checksums(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
    names = sorted(arrays)  # processes add up an array that they share together, so in one order
    _, sums = finite_and_checksums([arrays[name] for name in names])
    found = dict(zip(names, map(int, sums), strict=True))
    return {name: found[name] for name in arrays}


def _is_leaf(x: Any) -> bool:
    return hasattr(x, "dtype")


def _is_transient(error: BaseException) -> bool:
    """Whether an error says nothing about the content of a file: a permission, a network, a disk."""
    transient = (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ENOSPC, errno.EMFILE)
    return getattr(error, "errno", None) in transient or _TRANSIENT.search(str(error)) is not None


def short_message(error: BaseException) -> str:
    """The message of an error in one line of at most 200 characters, without TensorStore's lines of its source."""
    text = " ".join(str(error).partition("[source locations")[0].split())
    return text if len(text) <= 200 else f"{text[:199]}…"
