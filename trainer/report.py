"""Reports of an experiment on its model: files in a workdir, and the same in TensorBoard."""

import errno
import io
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from trainer.errors import UserError

_FORBIDDEN = re.compile(r"[^\w.-]|^\.+")  # characters that the name of a file may not have


def on_host(x: Any) -> np.ndarray:
    """Numbers as a NumPy array. All processes call it together, since an array may be sharded over them."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        x = process_allgather(x, tiled=True)
    return np.asarray(x)


class ReportWriter:
    """Writes what an experiment reports after a step.

    In a process that writes nothing, a method does nothing but to send its shards of an image or a histogram.
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

    def rows(self) -> Sequence[Mapping[str, Any]]:
        """The rows of `metrics.jsonl` so far: "step", and metrics by names such as "train/loss".

        There are none in a process that writes nothing.
        """
        return self._rows()

    def image(self, name: str, image: Any) -> None:
        """An image [H, W], [H, W, 1] or [H, W, 3], or several with an axis before these, side by side in a grid.

        Numbers are 0 to 255 in uint8, else 0 to 1.
        """
        whole = on_host(image)
        if self._folder is None:
            return
        from PIL import Image

        pixels = _grid(whole, name)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format="PNG")
        self._write(f"{name}.png", file.getvalue())
        self._add_image(name, file.getvalue(), pixels.shape)

    def figure(self, name: str, figure: Any) -> None:
        """A figure of matplotlib."""
        if self._folder is None:
            return
        file = io.BytesIO()
        figure.savefig(file, format="png")
        self._write(f"{name}.png", file.getvalue())
        width, height = (round(inches * figure.dpi) for inches in figure.get_size_inches())
        self._add_image(name, file.getvalue(), (height, width))

    def text(self, name: str, text: str) -> None:
        """A text; TensorBoard reads it as Markdown."""
        if self._folder is None:
            return
        from tensorboardX.summary import text as summary

        self._write(f"{name}.txt", text.encode())
        self._add(self.step, summary(name, text))

    def histogram(self, name: str, values: Any, bins: int = 30) -> None:
        """How numbers of any shape are distributed: counts between edges, in an `.npz` with these two arrays."""
        numbers = on_host(values)
        if self._folder is None:
            return
        from tensorboardX.summary import histogram as summary

        numbers = numbers.astype(np.float64).reshape(-1)
        finite = numbers[np.isfinite(numbers)]
        if left_out := numbers.size - finite.size:
            self._show(f"warning: histogram {name!r} has {left_out:,} NaN or Inf, which are left out")
        numbers = finite
        counts, edges = np.histogram(numbers, bins)
        file = io.BytesIO()
        np.savez(file, counts=counts, edges=edges)
        self._write(f"{name}.npz", file.getvalue())
        if numbers.size:
            self._add(self.step, summary(name, numbers, bins))

    def show_written(self) -> None:
        """Shows what was written."""
        if self._names:
            self._show(f"step {self.step}: reports/{self.step} has {', '.join(self._names)}")

    def _add_image(self, name: str, png: bytes, shape: Sequence[int]) -> None:
        from tensorboardX.proto.summary_pb2 import Summary  # pyrefly: ignore[missing-module-attribute] - made at import

        image = Summary.Image(height=shape[0], width=shape[1], colorspace=3, encoded_image_string=png)
        self._add(self.step, Summary(value=[Summary.Value(tag=name, image=image)]))

    def _write(self, name: str, data: bytes) -> None:
        assert self._folder is not None
        place, name = self._folder / str(self.step), _FORBIDDEN.sub("_", name)
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
