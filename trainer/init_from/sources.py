"""Sources of a run's first variables: a workdir, a tree that Orbax saved, a file of safetensors."""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from trainer import config, distributed
from trainer.checkpoint import Metadata, Store, leaves_of, scores
from trainer.checkpoint.metadata import Leaf
from trainer.checkpoint.reading import arrays_handler, read_metadata, restore_leaves, short_message
from trainer.errors import UserError, did_you_mean
from trainer.files import AnyPath
from trainer.observe.log import read_rows
from trainer.restore import schedule_free_paths
from trainer.rules import path_of
from trainer.workdir import Mirror, Workdir

Wanted = Mapping[str, jax.sharding.Sharding]  # by the name of an array


@dataclasses.dataclass(frozen=True)
class VariableSource:
    """Arrays by name: a parameter by its path, another variable by collection and path, as "batch_stats/norm/mean"."""

    text: str  # what it is, for the user: a plural noun, such as "parameters of runs/a, step 6"
    leaves: Mapping[str, Leaf]
    read: Callable[[Wanted], dict[str, jax.Array]]  # with these shardings
    step: int | None = None  # updates made, of a workdir
    metadata: Metadata | None = None  # of a workdir's checkpoint
    place: AnyPath | None = None  # of a workdir's checkpoint


def open_variables(text: str, *, raw: bool = False) -> VariableSource:
    """The source that PATH or PATH@STEP names; raises `UserError` if there is none. Reads no array.

    All processes call it together. Of a workdir the parameters are those that its run evaluates, or with `raw` those
    that it trains.
    """
    name, at, step = text.rpartition("@")
    if not at or "/" in step or Workdir(text).path.exists():  # a name may hold an @
        name, step = text, ""
    place = Workdir(name).path
    if not place.exists():
        siblings = [str(p) for p in place.parent.iterdir()] if place.parent.is_dir() else []
        raise UserError(f"init_from: there is no {name}{did_you_mean(name, siblings)}")
    if place.is_dir():
        is_ours = (place / "checkpoints").is_dir()
        return _workdir(Workdir(name), step or "latest", raw) if is_ours else _orbax(place, step)
    if step:
        raise UserError(f"init_from: {name} is a file, which has no step {step}")
    if place.suffix == ".safetensors":
        return _safetensors(place)
    raise UserError(f"init_from: {name} is neither a workdir, nor a folder that Orbax wrote, nor a .safetensors file")


def _workdir(folder: Workdir, step: str, raw: bool) -> VariableSource:
    # Reads settings from the raw JSON, because the source's classes may no longer be importable.
    steps = Store(folder.checkpoints, config.Checkpoint()).steps()
    if not steps:
        raise UserError(f"init_from: workdir {folder.path} holds no checkpoint")
    kept = read_metadata(folder.checkpoints / str(steps[-1])).config["checkpoint"]
    settings = config.Checkpoint(best_metric=kept.get("best_metric"), best_mode=kept.get("best_mode", "max"))
    store = Store(folder.checkpoints, settings)
    if step == "best":
        store.scores = scores(read_rows(folder.path / "metrics.jsonl"), settings.best_metric)
    chosen = int(distributed.gather("the step of a source", str(store.choose(step)))[0])
    metadata, place = store.metadata(chosen), store.path(chosen)
    use_ema = metadata.config["optimizer"].get("ema_decay") is not None and not raw
    params, schedule_free = "ema/" if use_ema else "params/", {} if use_ema or raw else schedule_free_paths(metadata)
    names = {
        path.removeprefix(prefix): path
        for path in metadata.leaves
        for prefix in (params, "collections/")
        if path.startswith(prefix)
    }

    def read(wanted: Wanted) -> dict[str, jax.Array]:
        shardings = {names[name]: sharding for name, sharding in wanted.items()}
        for name in wanted.keys() & schedule_free.keys():
            z, b1 = schedule_free[name]
            shardings |= {z: wanted[name], b1: jax.sharding.SingleDeviceSharding(jax.local_devices()[0])}
        like = {path: jax.ShapeDtypeStruct(*metadata.leaves[path], sharding=s) for path, s in shardings.items()}
        try:
            arrays = restore_leaves(place, metadata, like)
        except FileNotFoundError as error:
            raise UserError(f"init_from: {place} was removed while it was read; name another step") from error
        return {name: _average(arrays, names[name], schedule_free.get(name)) for name in wanted}

    kind = "EMA params" if use_ema else "averages" if schedule_free else "parameters"
    leaves = {name: metadata.leaves[path] for name, path in names.items()}
    return VariableSource(f"{kind} of {folder.path}, step {chosen}", leaves, read, chosen, metadata, place)


def _average(arrays: Mapping[str, jax.Array], path: str, average: tuple[str, str] | None) -> jax.Array:
    """The array of a path, or for a schedule-free optimizer x from y, z and b1 (see `optim.evaluation_params`)."""
    y = arrays[path]
    if average is None:
        return y
    z, b1 = arrays[average[0]], float(arrays[average[1]])
    return ((y - (1 - b1) * z) / b1).astype(y.dtype)


def _orbax(place: AnyPath, step: str) -> VariableSource:
    """A tree of params or variables, or a `flax.training.TrainState`, saved by a checkpointer or a manager."""
    if step or not (place / "_METADATA").exists():
        steps = sorted((int(p.name) for p in place.iterdir() if p.name.isdecimal()), reverse=True)
        if step and not (step.isdecimal() and int(step) in steps):
            known = ", ".join(map(str, reversed(steps))) or "none"
            raise UserError(f"init_from: {place} has no step {step}; there are {known}")
        roots = [place / step] if step else [place, *(place / str(number) for number in steps[:1])]
        items = [root / item for root in roots for item in ("", "default", "state", "params")]
        if (found := next((item for item in items if (item / "_METADATA").exists()), None)) is None:
            raise UserError(f"init_from: {place} is neither a workdir nor a folder that Orbax wrote")
        place = found
    path = epath.Path(place if isinstance(place, epath.Path) else place.absolute())
    try:
        tree = arrays_handler().metadata(path).tree
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"init_from: {place} cannot be read: {short_message(error)}") from error
    paths = leaves_of(tree)
    names = _variable_names(paths)

    def read(wanted: Wanted) -> dict[str, jax.Array]:
        shardings = {names[name]: sharding for name, sharding in wanted.items()}

        def like(keys: object, _: object) -> object:
            saved = path_of(keys)  # pyrefly: ignore[bad-argument-type] - a key path of JAX
            if saved not in shardings:
                return ocp.PLACEHOLDER
            return jax.ShapeDtypeStruct(*paths[saved], sharding=shardings[saved])

        wanted_tree = jax.tree_util.tree_map_with_path(like, tree, is_leaf=lambda x: hasattr(x, "dtype"))
        arguments = ocp.checkpoint_utils.construct_restore_args(wanted_tree)
        restored = arrays_handler().restore(path, args=ocp.args.PyTreeRestore(wanted_tree, restore_args=arguments))
        arrays = {path_of(keys): x for keys, x in jax.tree_util.tree_leaves_with_path(restored)}
        return {name: arrays[names[name]] for name in wanted}

    leaves = {name: paths[saved] for name, saved in names.items()}
    return VariableSource(f"arrays that Orbax saved in {place}", leaves, read)


def _safetensors(place: AnyPath) -> VariableSource:
    try:
        from safetensors.flax import load_file
        from safetensors.numpy import safe_open
    except ImportError as error:
        raise UserError(f"{error}; it is part of: pip install 'belief-trainer[export]'") from error
    mirror = Mirror(place.parent)  # the library opens no file in a bucket
    file = mirror.folder / place.name
    try:
        if file != place:
            file.write_bytes(place.read_bytes())
        with safe_open(file, "np") as opened:
            slices = {path: opened.get_slice(path) for path in opened.keys()}  # noqa: SIM118 - it is no mapping
            paths = {path: Leaf(tuple(x.get_shape()), _DTYPES[x.get_dtype()]) for path, x in slices.items()}
    except KeyError as error:
        raise UserError(f"init_from: {place} holds arrays of a dtype that JAX does not have: {error}") from error
    except Exception as error:  # the library has one type for all errors of a file
        raise UserError(f"init_from: {place} cannot be read: {short_message(error)}") from error
    names = _variable_names(paths)

    def read(wanted: Wanted) -> dict[str, jax.Array]:
        arrays = load_file(mirror.folder / place.name)  # a copy is removed with `mirror`, so not before this function
        return {name: jax.device_put(np.asarray(arrays[names[name]]), sharding) for name, sharding in wanted.items()}

    return VariableSource(f"arrays of {place}", {name: paths[path] for name, path in names.items()}, read)


_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"}
_DTYPES |= {f"{sign}{bits}": f"{kind}int{bits}" for sign, kind in (("I", ""), ("U", "u")) for bits in (8, 16, 32, 64)}


def _variable_names(paths: Mapping[str, Leaf]) -> dict[str, str]:
    """The path of each variable by its name.

    A tree without "params" is used as it is. Of any other, a name lacks the leading "params/", also where it is there
    twice. The step and everything below "opt_state", "tx" and "ema" is left out.
    """
    if not any(path.startswith("params/") for path in paths):
        return {path: path for path in paths}
    own = {path.removeprefix("params/").removeprefix("params/"): path for path in paths if path.startswith("params/")}
    others = ("opt_state/", "params/", "tx/", "ema/")
    return own | {path: path for path in paths if path != "step" and not path.startswith(others)}
