"""JPEG and PNG images, decoded and cropped on the host by OpenCV."""

import functools
import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.data import read_examples
from trainer.data.encoded import Encoded
from trainer.errors import UserError
from trainer.experiment import RandomAccessSource

if TYPE_CHECKING:
    from types import ModuleType

_REDUCED = ((8, "IMREAD_REDUCED_COLOR_8"), (4, "IMREAD_REDUCED_COLOR_4"), (2, "IMREAD_REDUCED_COLOR_2"))


class EncodedImage(Encoded):
    """The bytes of a JPEG, PNG or WebP image, which is decoded as RGB, whatever its colours, to a square.

    Results are the same on every machine with the same release of OpenCV.
    """

    def __init__(self, data: bytes, size: int, shorter: int) -> None:
        """`size`: pixels of the square's sides; `shorter`: of the shorter side from whose centre `decode` takes it."""
        self.data, self.size, self.shorter = data, size, shorter

    def decode(self) -> np.ndarray:
        """The centre of the image, uint8 [size, size, 3], after its shorter side was made `shorter` pixels long."""
        height, width = self._shape
        side = min(height, width) * self.size / self.shorter
        return self.crop((height - side) / 2, (width - side) / 2, side, side)

    def random_crop(self, rng: np.random.Generator, smallest: float = 0.08) -> np.ndarray:
        """A rectangle of the image, resized to uint8 [size, size, 3] (Szegedy et al., 2014, arXiv:1409.4842).

        Its area is uniform between the share `smallest` and the largest that fits; the logarithm of its aspect ratio is
        uniform between those of 3/4 and 4/3, where it fits; its place is uniform.
        """
        height, width = self._shape
        largest = min(1.0, 4 / 3 * height / width, 4 / 3 * width / height)
        area, ratio, down, right = rng.random(4)
        area = min(smallest, largest) + area * (largest - min(smallest, largest))
        low = max(math.log(3 / 4), math.log(area * width / height))  # a crop as high as the image
        high = min(math.log(4 / 3), -math.log(area * height / width))  # a crop as wide as the image
        stretch = math.exp(low + ratio * max(high - low, 0))
        lines = min(math.sqrt(area * height * width / stretch), height)
        columns = min(math.sqrt(area * height * width * stretch), width)
        return self.crop(down * (height - lines), right * (width - columns), lines, columns)

    def crop(self, top: float, left: float, lines: float, columns: float) -> np.ndarray:
        """The rectangle resized to uint8 [size, size, 3], linearly; in pixels, its edges are rounded to whole ones.

        An image of which the rectangle is at least twice as large as the result is decoded at a half, a quarter or an
        eighth of its size, which is the mean of its pixels and costs less.
        """
        cv2 = _opencv()
        shrink = min(lines, columns) / self.size
        flag = next((getattr(cv2, name) for factor, name in _REDUCED if shrink >= factor), cv2.IMREAD_COLOR)
        pixels = cv2.imdecode(np.frombuffer(self.data, np.uint8), flag | cv2.IMREAD_IGNORE_ORIENTATION)
        if pixels is None:
            raise UserError(f"an image of {len(self.data):,} bytes is damaged, or no JPEG, PNG or WebP image")
        height, width = self._shape
        down, right = pixels.shape[0] / height, pixels.shape[1] / width
        first, last = round(top * down), max(round((top + lines) * down), round(top * down) + 1)
        start, stop = round(left * right), max(round((left + columns) * right), round(left * right) + 1)
        # "Exact" gives the same bits on every CPU, and takes a twentieth longer.
        square = (self.size, self.size)
        resized = cv2.resize(pixels[first:last, start:stop], square, interpolation=cv2.INTER_LINEAR_EXACT)
        return cv2.cvtColor(resized, cv2.COLOR_BGR2RGB)

    @functools.cached_property
    def _shape(self) -> tuple[int, int]:
        """Height and width, from the header."""
        from PIL import Image, UnidentifiedImageError

        try:
            width, height = Image.open(io.BytesIO(self.data)).size
        except UnidentifiedImageError as error:
            raise UserError(f"an image of {len(self.data):,} bytes is no JPEG, PNG or WebP image") from error
        return height, width


class EncodedImages:
    """A source whose entry "image", the bytes of a file, becomes an `EncodedImage`."""

    def __init__(self, source: RandomAccessSource, size: int, shorter: int) -> None:
        """`size` and `shorter` are those of `EncodedImage`."""
        self._source, self._size, self._shorter = source, size, shorter

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        (example,) = self.__getitems__([index])
        return example

    def __getitems__(self, indices: Sequence[int]) -> list[Mapping[str, Any]]:
        """Many examples at once."""
        examples = read_examples(self._source, indices)
        return [{**example, "image": EncodedImage(example["image"], self._size, self._shorter)} for example in examples]


def _opencv() -> "ModuleType":
    try:
        import cv2
    except ImportError as error:
        raise UserError("encoded images need OpenCV: pip install 'belief-trainer[images]'") from error
    cv2.setNumThreads(1)  # batches are decoded in parallel already
    return cv2
