"""The comparison of a run that was killed and relaunched with an undisturbed one, from the files that both left."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from trainer.observe.phase_log import read_phase_log
from trainer.observe.rows import read_rows
from trainer.prove.rows import compare_losses, evaluation_differences, is_evaluation, row_differences
from trainer.rules import paths

# The files of a proof. Each of the folders `undisturbed` and `killed-1`, `killed-2`, … holds the workdir `run` and a
# folder for each launch with its trace, its output, and `before.json`, which tells the newest checkpoint before it.
SETTINGS, UNDISTURBED, KILLED, RUN, LAUNCH, BEFORE = (
    "proof.json",
    "undisturbed",
    "killed-",
    "run",
    "launch-",
    "before.json",
)

# Of Orbax, which raises an `AttributeError` if its own metadata are damaged.
READ_ERRORS = (AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError)


class Compared(NamedTuple):
    """How much was compared, and every difference, as a line of text."""

    arrays: int
    batches: int  # those that the killed run read; a batch counts once in each launch that read it
    rows: int
    evaluations: int
    # the largest difference between two losses, relative to the larger one; 0 if the comparison is bit for bit
    apart: float
    differences: list[str]


def compare(undisturbed: Path, killed: Path, *, tolerance: float | None = None) -> Compared:
    """Compares two folders, each with a workdir and its launches.

    Args:
      undisturbed: the folder of a run that one launch trained to its end.
      killed: the folder of a run that was killed and relaunched until it was finished.
      tolerance: None compares bit for bit. Otherwise the layouts differ: then the losses may differ by this much,
        relative to the larger one; the state at each restore, the example ids and the steps of the rows must be equal.
    """
    batches = [(folder.name, line) for folder in launches(killed) for line in _lines(folder, "batch")]
    differences = list(_batch_differences(_ids(undisturbed), batches))
    differences += _restore_differences(killed)
    files = [folder / RUN / "metrics.jsonl" for folder in (undisturbed, killed)]
    rows, others = (list(read_rows(file)) for file in files)
    evaluations = [row for row in rows if is_evaluation(row)]
    differences += evaluation_differences(evaluated_steps(undisturbed), *files)
    arrays: Mapping[str, np.ndarray] = {}
    apart = 0.0
    if tolerance is None:
        differences += row_differences(rows, others)
        if not differences and files[0].read_bytes() != files[1].read_bytes():
            differences.append("metrics.jsonl: the values are equal, the bytes are not")
        arrays, state_differences = _compare_states(undisturbed / RUN, killed / RUN)
        differences += state_differences
    else:
        apart, loss_differences = compare_losses(rows, others, tolerance)
        differences += loss_differences
    batch_count = len({(launch, line["batch"]) for launch, line in batches})
    return Compared(len(arrays), batch_count, len(rows), len(evaluations), apart, differences)


# States


def newest_step(workdir: Path) -> int | None:
    """The step of the newest checkpoint, None if there is none."""
    folder = workdir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return max((int(name) for name in names if name.isdecimal()), default=None)


def read_state(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by its path. Orbax alone reads it; only the text of the paths is this project's."""
    tree = read_tree(workdir, step)
    return dict(zip(paths(tree), jax.tree.leaves(tree), strict=True))


def read_tree(workdir: Path, step: int) -> Any:
    """The same arrays as the tree of dicts and lists that Orbax makes."""
    folder = (workdir / "checkpoints" / str(step) / "state").absolute()
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(folder).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return checkpointer.restore(folder, restore_args=as_numpy)


def _compare_states(undisturbed: Path, killed: Path) -> tuple[Mapping[str, np.ndarray], list[str]]:
    steps = [newest_step(folder) for folder in (undisturbed, killed)]
    if steps[0] is None or steps[0] != steps[1]:
        return {}, [f"final state: the newest checkpoint is {steps[0]} undisturbed, {steps[1]} killed"]
    expected = read_state(undisturbed, steps[0])
    try:
        found = read_state(killed, steps[0])
    except READ_ERRORS as error:
        return expected, [f"final state: the checkpoint of the killed run cannot be read: {str(error).splitlines()[0]}"]
    return expected, list(state_differences(expected, found))


def state_differences(undisturbed: Mapping[str, np.ndarray], killed: Mapping[str, np.ndarray]) -> Iterator[str]:
    """A line for each array that is not equal bit for bit, with the first element that differs."""
    for path in [*undisturbed, *(path for path in killed if path not in undisturbed)]:
        if path not in undisturbed:
            yield f"final state: {path} is missing undisturbed, there killed"
            continue
        if path not in killed:
            yield f"final state: {path} is there undisturbed, missing killed"
            continue
        a, b = np.asarray(undisturbed[path]), np.asarray(killed[path])
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            yield f"final state: {path} is {a.dtype}{list(a.shape)} undisturbed, {b.dtype}{list(b.shape)} killed"
        elif a.tobytes() != b.tobytes():
            raw = [np.frombuffer(x.tobytes(), np.uint8).reshape(max(x.size, 1), -1) for x in (a, b)]
            flat = int(np.argmax((raw[0] != raw[1]).any(axis=1)))
            index = [int(i) for i in np.unravel_index(flat, a.shape)]
            values = [
                f"{x.reshape(-1)[flat]} (bytes {bits[flat].tobytes().hex()})"
                for x, bits in zip((a, b), raw, strict=True)
            ]
            yield f"final state: {path}{index or ''} is {values[0]} undisturbed, {values[1]} killed"


def _restore_differences(killed: Path) -> Iterator[str]:
    """A line for each launch that did not restore, bit for bit, the newest checkpoint that was on disk before it.

    A process that was killed before its first batch may not have restored yet.
    """
    for folder in launches(killed):
        before = json.loads((folder / BEFORE).read_text())
        if before["step"] is None:
            continue  # a state that `init_from` made is in the trace, too, but there is no checkpoint to compare with
        if before["problem"]:
            yield f"checkpoint {before['step']} before {folder.name} cannot be read: {before['problem']}"
        for lines in _traces(folder):
            batches = [line["batch"] for line in lines if "batch" in line]
            if batches and not any("restored" in line for line in lines):
                text = f"step {batches[0]} came first and nothing was restored, the newest checkpoint on disk was"
                yield f"restore in {folder.name}: {text} {before['step']}"
        for line in _lines(folder, "restored"):
            if line["restored"] != before["step"]:
                text = f"step {line['restored']} was restored, the newest checkpoint on disk was {before['step']}"
                yield f"restore in {folder.name}: {text}"
            elif line["digests"] != before["digests"]:
                wrong = [path for path in before["digests"] if before["digests"][path] != line["digests"].get(path)]
                yield f"restore in {folder.name}: {', '.join(wrong[:3])} of step {before['step']} differs from the disk"


# Batches


def launches(folder: Path) -> list[Path]:
    """The folders of the launches of a run, in their order."""
    return sorted(folder.glob(f"{LAUNCH}*"))


def _lines(launch: Path, key: str) -> list[dict[str, Any]]:
    """The lines of all processes of a launch that have a key."""
    return [line for lines in _traces(launch) for line in lines if key in line]


def _traces(launch: Path) -> list[Sequence[dict[str, Any]]]:
    """The lines of each process of a launch; empty if it was killed before it wrote anything."""
    return read_phase_log(launch) if list(launch.glob("process_*.jsonl")) else []


def _ids(undisturbed: Path) -> dict[int, np.ndarray]:
    """The example ids of each step in the order of the global batch, −1 where no process read one."""
    found: dict[int, np.ndarray] = {}
    batches = [line for launch in launches(undisturbed) for line in _lines(launch, "batch")]
    size = max((max(line["places"]) + 1 for line in batches), default=0)
    for line in batches:
        found.setdefault(line["batch"], np.full(size, -1))[line["places"]] = line["ids"]
    return found


def _batch_differences(
    expected: Mapping[int, np.ndarray], batches: Sequence[tuple[str, dict[str, Any]]]
) -> Iterator[str]:
    """A line for each batch of any launch with another example at any place, and for each step without a batch."""
    covered = {step: np.zeros(len(ids), bool) for step, ids in expected.items()}
    for launch, line in batches:
        step, places, ids = line["batch"], np.asarray(line["places"]), np.asarray(line["ids"])
        if step not in expected:
            yield f"batch of step {step} in {launch}: the undisturbed run has no such step"
            continue
        covered[step][places] = True
        if len(wrong := np.flatnonzero(expected[step][places] != ids)):
            place, found = places[wrong[0]], ids[wrong[0]]
            where = f"batch of step {step} in {launch}, example {place}"
            yield f"{where}: id {expected[step][place]} undisturbed, {found} killed"
    for step, seen in covered.items():
        if not seen.all():
            yield f"batch of step {step}: no launch read example {int(np.argmin(seen))}"


# Evaluations


def evaluated_steps(undisturbed: Path) -> list[int]:
    """The steps after which the undisturbed run evaluated, as its trace says."""
    lines = _lines(launches(undisturbed)[0], "phase")
    return sorted({line["step"] for line in lines if line["phase"] == "evaluate"})
