"""`predict`: the predictions of a checkpoint for every example of a split, in a file."""

import argparse
import itertools
import json
import math
import secrets
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.commands.arguments import Arguments, add_group_options
from trainer.errors import HostError, UserError, did_you_mean

DESCRIPTION = "Writes what the experiment's method predict(variables, batch) returns for every example of a split."
_FORMATS = (".npz", ".jsonl")


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--output`, `--step`, `--split`, and the options of several processes."""
    output = "the file to write: .npz, an array [examples, …] for each name, or .jsonl, a line for each example"
    parser.add_argument("--output", metavar="FILE", help=output)
    parser.add_argument("--step", default="latest", help="which checkpoint: a step, best, or latest (the default)")
    parser.add_argument("--split", help="which split (default: the run's evaluation.split)")
    add_group_options(parser)


def main(arguments: Arguments) -> int:
    """Writes the file and prints its name. An older file stays until the new one is complete."""
    from trainer.distributed import collective_errors, is_primary
    from trainer.prediction import predict_split

    options = arguments.options
    with collective_errors("the command line"):
        workdir, output = arguments.required_workdir(), checked_output(options.output, _FORMATS)
    found = predict_split(workdir.path, arguments.run, step=options.step, split=options.split)
    if output.suffix == ".jsonl":
        _check_lines(found.outputs)
    if not is_primary():
        for _ in found.batches:  # computed together, written by the first process
            pass
        return 0
    with replacing(output) as temporary:
        (_write_npz if output.suffix == ".npz" else _write_lines)(temporary, found.batches)
    print(f"wrote {output}: {found.examples:,} examples, step {found.step} of {workdir.path}")
    return 0


def checked_output(text: str | None, formats: tuple[str, ...]) -> Path:
    """The path of a file to write; raises `UserError` unless its ending is known and its folder is there."""
    if text is None:
        raise UserError(f"give --output=FILE, which ends in {' or '.join(formats)}")
    path = Path(text)
    if path.suffix not in formats:
        raise UserError(f"--output={text} must end in {' or '.join(formats)}{did_you_mean(path.suffix, formats)}")
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"--output={text}: {f'{path} is a folder' if path.is_dir() else f'no folder {path.parent}'}")
    return path


@contextmanager
def replacing(output: Path) -> Iterator[Path]:
    """A path to write to, which becomes `output` when the block ends without an error."""
    temporary = output.with_name(f".{secrets.token_hex(8)}{output.suffix}")
    try:
        yield temporary
        temporary.replace(output)
    except OSError as error:
        raise HostError(f"{output} cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _write_npz(file: Path, batches: Iterator[dict[str, Any]]) -> None:
    import numpy as np

    parts = list(batches)
    with zipfile.ZipFile(file, "w") as archive:  # np.savez cannot store an array that is named "file"
        for name in parts[0]:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                array = np.concatenate([part[name] for part in parts])
                np.lib.format.write_array(stream, array, allow_pickle=False)


def _check_lines(outputs: Mapping[str, Any]) -> None:
    """Raises `UserError` if a line of a `.jsonl` file cannot hold these predictions."""
    if "example" in outputs:
        raise UserError("prediction 'example' has the name of each line's index in .jsonl: rename it, or use .npz")
    for name, x in outputs.items():
        if x.dtype.kind == "c":
            raise UserError(f"prediction {name!r} is {x.dtype}, which .jsonl cannot hold: use .npz")


def _write_lines(file: Path, batches: Iterator[dict[str, Any]]) -> None:
    count = itertools.count()
    with file.open("w", encoding="utf-8") as stream:
        for batch in batches:
            columns = {name: map(_as_json, x) for name, x in batch.items()}
            for values in zip(*columns.values(), strict=True):
                line = {"example": next(count)} | dict(zip(columns, values, strict=True))
                stream.write(json.dumps(line) + "\n")


def _as_json(x: Any) -> Any:
    """An array as nested lists, a scalar as a number; NaN and infinite numbers are null, as in metrics.jsonl."""
    value = x.tolist()
    if x.dtype.kind != "f":
        return value
    return [_as_json(part) for part in x] if x.ndim else value if math.isfinite(value) else None
