"""From the checkpoints of a workdir to the state that a run continues with, or to the reason why it cannot."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from trainer import config, distributed
from trainer.checkpoint import DataIdentity, Metadata, Store, leaf_differences, leaves_of, version_changes
from trainer.checkpoint.reading import restore_fitting
from trainer.data.identity import fingerprint
from trainer.errors import UserError
from trainer.experiment import RandomAccessSource
from trainer.files import DamagedError
from trainer.optim.transforms import candidate_paths, recounted, set_count
from trainer.program import Program
from trainer.rules import path_of
from trainer.state import TrainState
from trainer.workdir import Workdir, listed


class _Skipped(NamedTuple):
    step: int
    kind: str  # for the name of its new folder
    problem: str


class Resumed(NamedTuple):
    """How a run begins."""

    state: TrainState | None  # None: it begins anew
    start: int  # steps made before this launch
    row_count: int | None  # number of rows in metrics.jsonl when the checkpoint was saved; None for a new run
    data: DataIdentity  # the training examples
    accepted: list[dict[str, Any]]  # all accepted changes of the trajectory: step, texts, hash of the config before
    notes: list[str]  # lines to show
    newly_accepted: list[str]  # the texts of those that this launch accepted


@dataclasses.dataclass
class Resume:
    """Looks for the newest good checkpoint of a run in its workdir. All processes call it together.

    A damaged checkpoint, or one of another run, is skipped, and moved aside once a good one was found.
    """

    program: Program
    store: Store
    workdir: Workdir
    data: DataIdentity
    accept_changes: bool = False
    from_step: int | None = None

    def newest(self) -> Resumed:
        """The state of the newest good checkpoint; raises `UserError` if there are checkpoints, but no good one."""
        steps = json.loads(distributed.gather("checkpoints", json.dumps(self.store.step_names()))[0])
        kept, notes = self._kept()
        candidates = [s for s in reversed(steps) if self.from_step is None or s <= self.from_step]
        if self.from_step is not None and self.from_step not in steps:
            known = f"there are {', '.join(map(str, steps))}" if steps else "there are none"
            raise UserError(f"--from-step is {self.from_step}, which is no checkpoint; {known}")
        skipped: list[tuple[int, str, str]] = [
            (s, "later", "it is later than --from-step") for s in steps if s not in candidates
        ]
        bad: list[str] = []
        for step in candidates:
            metadata, problem = self._attempt(lambda step=step: self._own_metadata(step, kept))
            if metadata is not None and not problem:
                changed = self._changes(metadata)
                state, problem = self._attempt(lambda step=step, m=metadata, c=changed: self._state(step, m, bool(c)))
                if state is not None and not problem:
                    return self._resumed(state, metadata, changed, notes, skipped)
            bad.append(f"{step}: {problem}")
            skipped.append(_Skipped(step, "unused", problem))
        if bad:
            none = f"no checkpoint of workdir {self.workdir.path} can be used, and all are kept as they are"
            raise UserError(f"{none}: {listed(bad)}; mend them, or choose another --workdir to begin anew")
        return Resumed(None, 0, None, self.data, [], notes, [])

    def _kept(self) -> tuple[Mapping[str, Any] | None, list[str]]:
        """The JSON of the run kept in the workdir, and a note if it is damaged or lost."""
        try:
            kept, problem = self.workdir.stored_json(), "config.json is missing"
        except DamagedError as error:
            kept, problem = None, str(error)
        lost = kept is None and bool(self.store.steps())
        return kept, [f"note: {problem}; it is written again from the checkpoint and the command"] if lost else []

    def _attempt(self, read: Any) -> tuple[Any, str]:
        """The result of `read` and "", or None and the first problem that a process found."""
        result, problem = None, ""
        try:
            result = read()
        except (DamagedError, FileNotFoundError) as error:
            problem = str(error)
        return result, next(filter(None, distributed.gather("a checkpoint", problem)), "")

    def _own_metadata(self, step: int, kept: Mapping[str, Any] | None) -> Metadata:
        """The metadata of a step; raises `DamagedError` if it does not belong to this run."""
        metadata = self.store.metadata(step)
        if kept is not None and not self.accept_changes:
            theirs, ours = (set(self._trajectory_changes(c)) for c in (metadata.config, kept))
            known = {entry.get("config") for entry in self.workdir.accepted() if isinstance(entry, dict)}
            if theirs != ours and _hash(metadata.config) not in known:
                raise DamagedError(f"it belongs to another run: {listed(sorted(theirs - ours or ours - theirs))}")
        # If settings differ, `_changes` reports them together with any difference of the data. So the data is compared
        # here only if all settings are equal.
        is_same = not self._trajectory_changes(metadata.config)
        if is_same and not self.accept_changes and (problem := _data_difference(metadata.data, self.data)):
            raise DamagedError(f"it was trained on other examples: {problem} (--accept-changes goes on with these)")
        return metadata

    def _trajectory_changes(self, kept: Mapping[str, Any]) -> list[str]:
        return [change.text for change in config.changed_settings(kept, self.program.run) if not change.harmless]

    def _changes(self, metadata: Metadata) -> list[str]:
        """The accepted changes of the trajectory; raises `UserError` if there are any that nobody accepted."""
        with distributed.collective_errors("the changes"):
            changed = self._trajectory_changes(metadata.config)
            asked, other_source = self.program.run.init_from, [text for text in changed if text.startswith("init_from")]
            if asked is not None and other_source:
                why = f"workdir {self.workdir.path} has checkpoints, and a run begins from one source only"
                new = f"choose another --workdir to begin from {asked.source}"
                raise UserError(f"{why}: {listed(other_source)}; {new}")
            labels = {p.path: (p.label, p.weight_decay) for p in self.program.param_table.rows}
            for path, (label, decay) in labels.items():
                old = tuple(metadata.param_labels.get(path, (label, decay)))
                if old != (label, decay):
                    changed.append(f"{path} was labelled {old[0]} (weight decay {old[1]}), is {label} ({decay})")
            changed += [f"{path} is no parameter any more" for path in metadata.param_labels if path not in labels]
            if problem := _data_difference(metadata.data, self.data):
                changed.append(f"the training examples: {problem}")
            if changed and not self.accept_changes:
                go_on = f"go on with these settings from step {metadata.step} with --accept-changes"
                carried = f"--init-from={self.workdir.path} --config.init_from.optimizer_state=carried"
                new = f"choose another --workdir (to begin there from this state: {carried})"
                other = self.workdir.other_settings(self.program.run, self._with_length(metadata.config, changed))
                raise UserError(f"{other}; {new}, or {go_on}")
            return changed

    def _with_length(self, kept: Mapping[str, Any], changed: list[str]) -> list[str]:
        """The texts, with that of `total_steps` before the first schedule's `run_steps`, which follows it."""
        length = [c.text for c in config.changed_settings(kept, self.program.run) if c.text.startswith("total_steps ")]
        place = next((i for i, text in enumerate(changed) if ".run_steps was " in text), None)
        return changed if place is None else [*changed[:place], *length, *changed[place:]]

    def _state(self, step: int, metadata: Metadata, changed: bool) -> TrainState:
        """The state of a step; of a changed run, with fresh arrays where the saved ones do not fit."""
        like = self.program.state
        here = leaves_of(like)
        differences = leaf_differences(metadata.leaves, here)
        if not differences:
            state = self.store.restore(like, step, metadata)
            return self._recounted(state) if changed else state
        others = [text for text in differences if not text.startswith("guard/")]  # as `numerics` may change
        fixed = [text for text in others if text.startswith(("params/", "collections/"))]
        if fixed or (others and not changed):
            raise UserError(f"the checkpoint at step {step} does not fit this run: {listed(fixed or others, 8)}")
        # When an Optax transformation updates some labels, the moments of the fused pass lie under opt_state/fused/.
        saved_paths = {path: next((p for p in candidate_paths(path) if p in metadata.leaves), path) for path in here}
        saved = restore_fitting(self.store.path(step), like, metadata, saved_paths)
        fresh = self.program.init()
        count = jnp.asarray(step, jnp.int32)
        opt_state = set_count(fresh.opt_state, self.program.groups, count)
        fresh = dataclasses.replace(fresh, opt_state=opt_state)
        state = jax.tree_util.tree_map_with_path(lambda keys, x: saved.get(path_of(keys), x), fresh)
        if like.ema is not None and not any(path.startswith("ema/") for path in saved):
            ema = jax.tree.map(lambda e, p: jnp.asarray(p, e.dtype), fresh.ema, state.params)
            state = state.replace(ema=jax.tree.map(lambda e, x: jax.device_put(e, x.sharding), ema, fresh.ema))
        return self._recounted(state) if changed else state

    def _recounted(self, state: TrainState) -> TrainState:
        opt_state = recounted(state.opt_state, self.program.groups, self.program.state.opt_state)
        return dataclasses.replace(state, opt_state=opt_state)

    def _resumed(
        self,
        state: TrainState,
        metadata: Metadata,
        changed: Sequence[str],
        notes: list[str],
        skipped: Sequence[tuple[int, str, str]],
    ) -> Resumed:
        run, start = self.program.run, metadata.step
        harmless = [change.text for change in config.changed_settings(metadata.config, run) if change.harmless]
        notes += [f"note: since the checkpoint, {text} (harmless)" for text in harmless]
        notes += [
            f"note: since the checkpoint, {text}; the numbers may differ in their last bits"
            for text in version_changes(metadata)
        ]
        notes += [f"note: accepted from step {start} on: {text}" for text in changed]
        if distributed.is_primary():
            for step, reason, problem in skipped:
                place = self.store.set_aside(step, reason)
                notes.append(f"note: checkpoint {step} is not used and was moved to {place}: {problem}")
        accepted = [entry for entry in self.workdir.accepted() if entry.get("step", 0) <= start]
        if changed:
            accepted.append({"step": start, "changes": list(changed), "config": _hash(metadata.config)})
        done = " (finished: nothing is left to do)" if start >= run.total_steps else ""
        notes.append(f"resumed from step {start}{done}")
        return Resumed(state, start, metadata.row_count, self.data, accepted, notes, list(changed))


def recover_run(workdir: Workdir) -> config.Run | None:
    """The run stored in a workdir; where config.json is lost or damaged, that of its newest good checkpoint.

    None if there is neither. Raises `UserError` if a class that the JSON names has changed.
    """
    try:
        run, problem = workdir.stored_run(), None
    except DamagedError as error:
        run, problem = None, error
    if run is not None:
        return run
    store = Store(workdir.checkpoints, config.Checkpoint())
    for step in reversed(store.steps()):
        with suppress(DamagedError, FileNotFoundError):  # an earlier one may be good
            return config.from_json(json.dumps(dict(store.metadata(step).config)))
    if problem is not None:
        raise problem
    return None


def describe_data(source: RandomAccessSource) -> DataIdentity:
    """Number and fingerprint of the training examples."""
    return DataIdentity(len(source), fingerprint(source))


def _data_difference(there: DataIdentity, here: DataIdentity) -> str:
    if there.examples != here.examples:
        return f"{there.examples:,} then, {here.examples:,} now"
    if None not in (there.fingerprint, here.fingerprint) and there.fingerprint != here.fingerprint:
        return "as many as then, but with other content"
    return ""


def _hash(kept: Mapping[str, Any]) -> str:
    plain = {key: value for key, value in kept.items() if key != "$accepted"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
