"""A trained model in files that other programs read: its variables as safetensors, its predictions as StableHLO."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from trainer.data import batch_spec, eval_source, open_source
from trainer.errors import UserError, error_origin
from trainer.experiment import Batch
from trainer.prediction import checked, checked_predictions
from trainer.restore import Trained, predictor
from trainer.rules import path_of

PLATFORMS = ("cpu", "tpu", "cuda")


def write_safetensors(trained: Trained, file: Path) -> str:
    """Writes every variable under its Linen path, such as "params/head/kernel", in its own dtype.

    Returns what was written, in words. Raises `UserError` if the package safetensors is not installed.
    """
    with _needed():
        from safetensors.flax import save_file
    leaves = jax.tree_util.tree_leaves_with_path(trained.variables)
    arrays = {path_of(keys): jnp.asarray(x) for keys, x in leaves}
    save_file(arrays, file, metadata={"step": str(trained.step), "experiment": type(trained.experiment).__name__})
    return f"{len(arrays)} arrays, {sum(x.nbytes for x in arrays.values()):,} bytes"


def write_stablehlo(trained: Trained, file: Path) -> str:
    """Writes `predict` with its variables as one program for batches of any size, as `jax.export` serialises it.

    The program takes a batch with only those entries that `predict` uses. Returns a text with the dtypes and shapes of
    inputs and outputs, and the platforms. Raises `UserError` if the experiment makes no predictions or none that
    `checked_predictions` allows, or none for a batch whose size is not known.
    """
    experiment, run = trained.experiment, trained.run
    predict = predictor(experiment).predict
    spec = batch_spec(eval_source(open_source(experiment, run.evaluation.split)), 1)
    (size,) = export.symbolic_shape("batch")
    like = {name: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype) for name, x in spec.items()}

    def program(batch: Batch) -> Any:
        count = next(iter(batch.values())).shape[0]
        unused = {name: jnp.zeros((count, *x.shape[1:]), x.dtype) for name, x in like.items() if name not in batch}
        return checked_predictions(predict(trained.variables, {**batch, **unused}), count)

    def exported(names: list[str]) -> Any:
        try:
            return export.export(jax.jit(program), platforms=PLATFORMS)({name: like[name] for name in names})
        except (TypeError, ValueError) as error:
            reason = f"{next(iter(str(error).splitlines()), '')}{error_origin(error)[0]}"
            hint = "take sizes from shapes, as x.shape[0] in place of len(x)"
            raise UserError(f"predict does not work for a batch of unknown size: {reason}; {hint}") from error

    names = _used(lambda batch: checked(predict)(trained.variables, batch), spec)
    if not names:
        raise UserError(f"predict uses no entry of its batch, so its program would have no inputs: {', '.join(spec)}")
    found = exported(names)
    with _needed():
        file.write_bytes(found.serialize())
    takes, gives = (_texts(tree) for tree in (found.in_avals, found.out_avals))
    outputs = sorted(jax.tree.unflatten(found.out_tree, found.out_avals))
    inputs = ", ".join(f"{name} {text}" for name, text in zip(names, takes, strict=True))
    results = ", ".join(f"{name} {text}" for name, text in zip(outputs, gives, strict=True))
    return f"{inputs} → {results}, for {', '.join(PLATFORMS)}"


def _used(function: Callable[[Batch], Any], batch: Batch) -> list[str]:
    """The names of the entries of a batch that the result of a function depends on, sorted."""
    jaxpr = jax.make_jaxpr(function)(batch).jaxpr
    read = {id(var) for equation in jaxpr.eqns for var in equation.invars} | {id(var) for var in jaxpr.outvars}
    return [name for name, var in zip(sorted(batch), jaxpr.invars, strict=True) if id(var) in read]


@contextmanager
def _needed() -> Iterator[None]:
    """Raises `UserError` with the command that installs the package whose import fails: safetensors or flatbuffers."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"{error}; it is part of: pip install 'belief-trainer[export]'") from error


def _texts(avals: Any) -> list[str]:
    return [f"{aval.dtype}[{', '.join(map(str, aval.shape))}]" for aval in avals]
