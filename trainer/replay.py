"""A step that diverged, executed again on the CPU, module by module, to name where its numbers stop being finite."""

import dataclasses
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from trainer import config
from trainer.data import augmented, take_encoded
from trainer.divergence import RECOMPUTED_SPIKE, keys_of, read, read_state
from trainer.errors import UserError
from trainer.experiment import Batch, Experiment
from trainer.files import AnyPath
from trainer.keys import per_example_keys
from trainer.observe import table
from trainer.optional import augmentation
from trainer.program import build_program
from trainer.rules import path_of


@dataclasses.dataclass
class NotFinite:
    """The parts of one execution of a step that are not finite. If all is finite, the fields keep their defaults."""

    module: str | None = None  # the first Linen module, in the order in which calls end
    loss: float | None = None
    param: str | None = None  # the first parameter in the backward pass whose gradient is not finite
    params: int = 0  # how many parameters have a gradient that is not finite
    ids: tuple[int, ...] = ()  # of examples whose own loss is not finite

    def __bool__(self) -> bool:
        return self.module is not None or self.loss is not None or self.params > 0 or bool(self.ids)


class Replayed(NamedTuple):
    """The result of a replay."""

    text: str  # a table, and a sentence about the cause
    is_finite: bool  # in float32


def replay(folder: AnyPath, run: config.Run | None = None) -> Replayed:
    """Executes the step of a folder that `divergence.explain` wrote, on the CPU in float32.

    Args:
      folder: such as WORKDIR/diverged/STEP.
      run: the resolved run; None for the one that the folder describes.

    Raises `UserError` if it is no such folder, or if the run or its data no longer fit it.
    """
    diverged = read(folder)
    run = run or config.resolve(config.from_json(json.dumps(diverged.config)))
    parallel = config.Parallel(devices=1, reduce_dtype=run.parallel.reduce_dtype)
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        program = build_program(dataclasses.replace(run, parallel=parallel), [cpu])
        if max(diverged.ids) >= len(program.train_source):
            raise UserError(
                f"the data has {len(program.train_source):,} examples; the step used number {max(diverged.ids):,}"
            )
        state = read_state(folder, diverged, program.state)
        batch, first = (
            take_encoded(program.train_source, np.asarray(diverged.ids)),
            (diverged.step - 1) * run.batch_size,
        )
        batch = augmented(batch, augmentation(run.experiment), run.seed, range(first, first + run.batch_size))
        inputs = _bad_inputs(batch, diverged.ids)
        batch |= {"mask": np.ones(len(diverged.ids), np.float32)}
        experiment, notes = _in_float32(run.experiment)
        has_other_dtype = experiment is not run.experiment
        frozen = {param.path for param in program.param_table.rows if program.groups[param.label] is None}
        step = _EagerStep(experiment, run, diverged.step, diverged.ids, frozen)
        found, in_own_dtype = step.execute(*_wide((state.params, state.collections, batch))), NotFinite()
        if not (found or inputs) and has_other_dtype:
            own_step = dataclasses.replace(step, experiment=run.experiment)
            in_own_dtype = own_step.execute(state.params, state.collections, batch)
    if run.parallel.strategy == "pmap":
        notes.append("under pmap each replica draws dropout masks of its own, from other keys than this replay")
    rows = [*(("input", text) for text in inputs), *_rows(found)]
    again = diverged.recomputed.removeprefix("recomputed, ")
    rows = [("recorded", diverged.reason), ("recomputed", again), *(rows or [("in float32", "all is finite")])]
    rows += [(f"{what} (own dtype)", text) for what, text in _rows(in_own_dtype)]
    notes += _causes(found, in_own_dtype, bool(inputs), has_other_dtype, diverged.recomputed)
    text = table((f"step {diverged.step}", "what is not finite"), rows)
    return Replayed("\n".join([text.rstrip("\n"), *notes]) + "\n", not (found or inputs))


def _causes(
    found: NotFinite, in_own_dtype: NotFinite, has_bad_inputs: bool, has_other_dtype: bool, recomputed: str
) -> list[str]:
    """A sentence about the cause; none where the table says it."""
    if found.module is None and found.loss is not None:
        return ["the output of every Linen module is finite: the cause is in the loss of the experiment"]
    if found.module is None and found.params:
        root = "such as that of a square root or a norm at 0"
        return [f"the loss and the output of every Linen module are finite: the cause is in a backward pass, {root}"]
    if found or has_bad_inputs:
        return []
    if recomputed == RECOMPUTED_SPIKE:
        return ["all is finite: the loss is a spike, above the limit of numerics.spike_quantile"]
    if in_own_dtype:
        return ["in float32 all is finite: a number overflows in the 16-bit dtype of the model"]
    if has_other_dtype:
        return ["on the CPU all is finite, in float32 and in the dtype of the model: suspect the device or its dtype"]
    own = "a dtype that the model sets itself, not by a setting named dtype"
    return [f"on the CPU all is finite: suspect the device, or {own}"]


def _rows(found: NotFinite) -> Iterator[tuple[str, str]]:
    if found.ids:
        shown = ", ".join(map(str, found.ids[:8])) + (" …" if len(found.ids) > 8 else "")
        yield "examples by their own loss", f"{len(found.ids)}: {shown}"
    if found.module is not None:
        yield "first module", found.module
    if found.loss is not None:
        yield "loss", str(found.loss)
    if found.param is not None:
        yield "first gradient", f"{found.param} ({found.params} parameters in all)"


def _bad_inputs(batch: Batch, ids: list[int]) -> list[str]:
    """A text for each entry of the batch that holds NaN or Inf, with the examples that do."""
    texts = []
    for name, array in batch.items():
        if jnp.issubdtype(array.dtype, jnp.inexact):
            bad = ~np.isfinite(np.asarray(array, np.float32)).reshape(len(ids), -1).all(1)
            if bad.any():
                texts.append(f"{name} of the examples {', '.join(str(ids[i]) for i in np.flatnonzero(bad)[:8])}")
    return texts


def _in_float32(experiment: Experiment) -> tuple[Experiment, list[str]]:
    """The experiment with every setting `dtype` at float32, and a note if it has none."""
    changed, has_dtype = _with_dtype(experiment)
    note = "note: no setting of the experiment is named dtype, so its model ran in the dtypes that it chooses itself"
    return changed, [] if has_dtype else [note]


def _with_dtype(settings: Any) -> tuple[Any, bool]:
    new, has_dtype = {}, False
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name == "dtype" and isinstance(value, str):
            has_dtype = True
            if value != "float32":
                new[field.name] = "float32"
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            inner, inner_has_dtype = _with_dtype(value)
            has_dtype |= inner_has_dtype
            if inner is not value:
                new[field.name] = inner
    return (dataclasses.replace(settings, **new) if new else settings), has_dtype


def _wide(tree: Any) -> Any:
    """The tree with floating-point arrays of fewer than 32 bits cast to float32."""

    def widen(x: Any) -> Any:
        is_narrow = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4
        return jnp.asarray(x, jnp.float32) if is_narrow else x

    return jax.tree.map(widen, tree)


@dataclasses.dataclass(frozen=True)
class _EagerStep:
    """One step, microbatch after microbatch."""

    experiment: Experiment
    run: config.Run
    step: int
    ids: list[int]
    frozen: Collection[str]  # paths of parameters, whose gradients the run does not compute

    def execute(self, params: Any, collections: Any, batch: Batch) -> NotFinite:
        """The first things that are not finite, in the first microbatch that has any."""
        key, example_key = keys_of(self.run, self.step)
        batch = {**batch, "example_key": per_example_keys(example_key, len(self.ids), None)}
        many, ids = self.run.microbatches, np.asarray(self.ids)
        for index in range(many):
            part = {name: array[index::many] for name, array in batch.items()}
            found, collections = self._microbatch(
                params, collections, part, jax.random.fold_in(key, index), ids[index::many]
            )
            if found:
                return found
        return NotFinite()

    def _microbatch(
        self, params: Any, collections: Any, batch: Batch, key: Any, ids: np.ndarray
    ) -> tuple[NotFinite, Any]:
        def loss(params: Any, mask: Any) -> Any:
            variables = {"params": params, **collections}
            metrics, new = self.experiment.loss(variables, {**batch, "mask": mask}, key=key, train=True)
            return metrics["loss"].total, {name: c for name, c in new.items() if name in collections}

        found, watch = NotFinite(), _CallRecorder()
        mask = jnp.asarray(batch["mask"])
        with jax.disable_jit(), nn.intercept_methods(watch):
            total, new = loss(params, mask)
        found.module = watch.first
        found.loss = None if np.isfinite(float(total)) else float(total)
        gradients = jax.jit(jax.grad(loss, has_aux=True))(params, mask)[0]
        leaves = [(path_of(keys), leaf) for keys, leaf in jax.tree_util.tree_leaves_with_path(gradients)]
        bad = [path for path, leaf in leaves if path not in self.frozen and not bool(jnp.isfinite(leaf).all())]
        found.params = len(bad)
        # The backward pass comes first to the module that was called last.
        found.param = max(bad, key=watch.order_of, default=None)
        if found:
            own = jax.jit(lambda p, masks: jax.lax.map(lambda mask: loss(p, mask)[0], masks))
            found.ids = tuple(ids[~np.isfinite(np.asarray(own(params, jnp.diag(mask))))].tolist())
        return found, new


class _CallRecorder:
    """Interceptor of Linen calls: notes their order, and the first module whose output is not finite."""

    def __init__(self) -> None:
        self.first: str | None = None
        self._calls: dict[str, int] = {}  # the number of the last call of each module, by its path
        self._count = 0
        self._root: str | None = None

    def __call__(self, call: Callable, arguments: Any, keywords: Mapping[str, Any], context: Any) -> Any:
        """Calls the method."""
        module, path = context.module, "/".join(context.module.path)
        self._root = self._root or type(module).__name__
        output = call(*arguments, **keywords)
        self._calls[path], self._count = self._count, self._count + 1
        if self.first is None and _is_bad(output):
            method = "" if context.method_name == "__call__" else f".{context.method_name}"
            self.first = "/".join(filter(None, (self._root, path))) + method
        return output

    def order_of(self, param: str) -> int:
        """The number of the last call of a parameter's module, −1 if there was none."""
        return self._calls.get(param.rpartition("/")[0], -1)


def _is_bad(output: Any) -> bool:
    arrays = [x for x in jax.tree.leaves(output) if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)]
    return any(jnp.issubdtype(x.dtype, jnp.inexact) and not bool(jnp.isfinite(x).all()) for x in arrays)
