"""Reports of an experiment on its model: files in a workdir, and the same in TensorBoard."""

import errno
import io
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from trainer.errors import UserError, kind_of

_MOST_BINS = 10_000
_FORBIDDEN = re.compile(r"[^\w.-]|^\.+")  # characters that the name of a file may not have


def on_host(x: Any) -> np.ndarray:
    """Numbers as a NumPy array. All processes call it together, since an array may be sharded over them."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        x = process_allgather(x, tiled=True)
    return np.asarray(x)


class ReportWriter:
    """Writes what an experiment reports after a step.

    In a process that writes nothing, a method only checks its arguments, and sends its shards of an image or a
    histogram. A method raises `UserError` for an argument that it does not take, and no error of the disk.
    """

    def __init__(
        self,
        folder: Path | None,
        step: int,
        rows: Callable[[], Sequence[Mapping[str, Any]]],
        add: Callable[[int, Any], None],
        show: Callable[[str], None],
    ) -> None:
        """Writes below `folder`, if it is not None; `add` takes a `Summary` of TensorBoard, and `show` a line."""
        self._folder, self.step, self._rows, self._add, self._show = folder, step, rows, add, show
        self._names: list[str] = []
        self._claimed: dict[str, tuple[str, str]] = {}  # by file: the kind and the name of its report

    def rows(self) -> Sequence[Mapping[str, Any]]:
        """The rows of `metrics.jsonl` so far: "step", and metrics by names such as "train/loss".

        There are none in a process that writes nothing.
        """
        return self._rows()

    def image(self, name: str, image: Any) -> None:
        """An image [H, W], [H, W, 1] or [H, W, 3], or several with an axis before these, side by side in a grid.

        Numbers are 0 to 255 in uint8, else 0 to 1.
        """
        file_name = self._claim("image", name, "png")
        whole = _numbers("image", name, image)
        if self._folder is None:
            return
        from PIL import Image

        pixels = _grid(whole, name)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format="PNG")
        self._write(file_name, file.getvalue())
        self._add_image(name, file.getvalue(), pixels.shape)

    def figure(self, name: str, figure: Any) -> None:
        """A figure of matplotlib."""
        file_name = self._claim("figure", name, "png")
        if not (hasattr(figure, "savefig") and hasattr(figure, "get_size_inches")):
            raise UserError(f"figure {name!r} is {kind_of(figure)}; a figure of matplotlib is expected")
        if self._folder is None:
            return
        file = io.BytesIO()
        figure.savefig(file, format="png")
        self._write(file_name, file.getvalue())
        width, height = (round(inches * figure.dpi) for inches in figure.get_size_inches())
        self._add_image(name, file.getvalue(), (height, width))

    def text(self, name: str, text: str) -> None:
        """A text; TensorBoard reads it as Markdown."""
        file_name = self._claim("text", name, "txt")
        if not isinstance(text, str):
            raise UserError(f"text {name!r} is {kind_of(text)}; a str is expected")
        if self._folder is None:
            return
        from tensorboardX.summary import text as summary

        data = text.encode(errors="replace")
        if data.decode() != text:
            self._show(f"warning: text {name!r} has characters that UTF-8 cannot hold, which become '?'")
        self._write(file_name, data)
        self._add(self.step, summary(name, data.decode()))

    def histogram(self, name: str, values: Any, bins: int = 30) -> None:
        """How numbers of any shape are distributed: counts between edges, in an `.npz` with these two arrays.

        There is one bin if the numbers are too close for so many.
        """
        file_name = self._claim("histogram", name, "npz")
        if not isinstance(bins, int | np.integer) or isinstance(bins, bool) or not 1 <= bins <= _MOST_BINS:
            raise UserError(f"histogram {name!r} has bins={bins!r}; an int from 1 to {_MOST_BINS:,} is expected")
        numbers = _numbers("histogram", name, values)
        if self._folder is None:
            return
        from tensorboardX.summary import histogram as summary

        numbers = numbers.astype(np.float64).reshape(-1)
        finite = numbers[np.isfinite(numbers)]
        if left_out := numbers.size - finite.size:
            self._show(f"warning: histogram {name!r} has {left_out:,} NaN or Inf, which are left out")
        counts, edges = _histogram(finite, int(bins))
        file = io.BytesIO()
        np.savez(file, counts=counts, edges=edges)
        self._write(file_name, file.getvalue())
        if finite.size:
            with np.errstate(over="ignore"):  # the sum of squares may become Inf
                self._add(self.step, summary(name, finite, edges))

    def show_written(self) -> None:
        """Shows what was written."""
        if self._names:
            self._show(f"step {self.step}: reports/{self.step} has {', '.join(self._names)}")

    def _claim(self, kind: str, name: str, ending: str) -> str:
        """The name of the file of a report; raises `UserError` if another report has it, or if `name` is no text."""
        if not (isinstance(name, str) and name and name.isprintable()):
            raise UserError(f"{kind} {name!r} of a report has no name: a printable text is expected")
        file_name = _FORBIDDEN.sub("_", f"{name}.{ending}")
        other_kind, other = self._claimed.setdefault(file_name, (kind, name))
        if (other_kind, other) != (kind, name):
            raise UserError(f"{kind} {name!r} and {other_kind} {other!r} have the same file {file_name}: rename one")
        return file_name

    def _add_image(self, name: str, png: bytes, shape: Sequence[int]) -> None:
        from tensorboardX.proto.summary_pb2 import Summary  # pyrefly: ignore[missing-module-attribute] - made at import

        image = Summary.Image(height=shape[0], width=shape[1], colorspace=3, encoded_image_string=png)
        self._add(self.step, Summary(value=[Summary.Value(tag=name, image=image)]))

    def _write(self, name: str, data: bytes) -> None:
        assert self._folder is not None
        place = self._folder / str(self.step)
        try:
            if place.is_symlink() or place.parent.is_symlink():
                raise OSError(errno.ELOOP, "it is a link, which is not followed")
            place.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            with os.fdopen(os.open(place / name, flags, 0o666), "wb") as file:
                file.write(data)
            self._names.append(name)
        except OSError as error:
            self._show(f"warning: {place / name}: {error.strerror or error}; the report lacks it")


def _numbers(kind: str, name: str, x: Any) -> np.ndarray:
    """The numbers of a report, as `on_host` gives them; raises `UserError` if they are none."""
    expected = "an array of real numbers is expected"
    try:
        found = on_host(x)
    except (TypeError, ValueError) as error:
        raise UserError(f"{kind} {name!r} is {kind_of(x)}; {expected}") from error
    dtype = found.dtype
    if jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer) or dtype.kind == "b":
        return found
    raise UserError(f"{kind} {name!r} is {kind_of(x) if dtype.kind == 'O' else f'an array of {dtype}'}; {expected}")


def _histogram(numbers: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """As `np.histogram` for finite numbers of any size: one bin where the numbers are too close for as many."""
    # The width of the range must not overflow. A power of two changes no number that is not tiny beside the largest.
    scale = 0.25 if numbers.size and np.abs(numbers).max() > 1e307 else 1.0
    try:
        counts, edges = np.histogram(numbers * scale, bins)
    except ValueError:  # too many bins for the range
        return np.array([numbers.size]), np.array([numbers.min(), numbers.max()])
    return counts, edges / scale


def _grid(images: np.ndarray, name: str) -> np.ndarray:
    """Images as one, uint8 [height, width] or [height, width, 3]."""
    if images.ndim == 4 and images.shape[-1] not in (1, 3):
        raise UserError(f"image {name!r} has shape {list(images.shape)}; its last axis must be 1 or 3 channels")
    if images.ndim == 2 or (images.ndim == 3 and images.shape[-1] not in (1, 3)):
        images = images[..., None]
    if images.ndim == 3:
        images = images[None]
    if images.ndim != 4 or not images.size:
        raise UserError(f"image {name!r} has shape {list(images.shape)}; [H, W], [H, W, C] or [N, H, W, C] is expected")
    if images.dtype != np.uint8:
        images = np.round(np.clip(np.nan_to_num(images.astype(np.float64)), 0, 1) * 255).astype(np.uint8)
    count, height, width, channels = images.shape
    columns = int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    padded = np.zeros((rows * columns, height, width, channels), np.uint8)
    padded[:count] = images
    grid = padded.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    grid = grid.reshape(rows * height, columns * width, channels)
    return grid[..., 0] if channels == 1 else grid
