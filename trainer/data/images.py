"""JPEG, PNG and WebP images, decoded and cropped on the host by libjpeg-turbo and OpenCV."""

import contextlib
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

_REDUCTIONS = (8, 4, 2)  # by which an image can be made smaller while it is decoded
_JPEG = b"\xff\xd8\xff"  # its first bytes


class EncodedImage(Encoded):
    """The bytes of a JPEG, PNG or WebP image, which is decoded as RGB, whatever its colours, to a square.

    Results are the same on every machine with the same releases of OpenCV and simplejpeg.
    """

    def __init__(self, data: bytes, size: int, shorter: int) -> None:
        """Decodes nothing yet.

        Args:
          data: the bytes of the file.
          size: the side of the square, in pixels.
          shorter: `decode` takes the square from the centre of the image after its shorter side was resized to this
            many pixels; at least `size`.

        Raises `UserError` if `shorter` is less than `size`.
        """
        _check_sizes(size, shorter)
        self.data, self.size, self.shorter = data, size, shorter

    def decode(self) -> np.ndarray:
        """The centre of the image, uint8 [size, size, 3], after its shorter side was resized to `shorter` pixels."""
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
        u_area, u_aspect, u_top, u_left = rng.random(4)
        area = min(smallest, largest) + u_area * (largest - min(smallest, largest))
        low = max(math.log(3 / 4), math.log(area * width / height))  # a crop as high as the image
        high = min(math.log(4 / 3), -math.log(area * height / width))  # a crop as wide as the image
        aspect = math.exp(low + u_aspect * max(high - low, 0))
        crop_height = min(math.sqrt(area * height * width / aspect), height)
        crop_width = min(math.sqrt(area * height * width * aspect), width)
        return self.crop(u_top * (height - crop_height), u_left * (width - crop_width), crop_height, crop_width)

    def crop(self, top: float, left: float, crop_height: float, crop_width: float) -> np.ndarray:
        """The rectangle, resized linearly to uint8 [size, size, 3].

        If the rectangle is at least 2, 4 or 8 times as large as the result, the image is first reduced to a half, a
        quarter or an eighth of its size: each pixel is the mean of a block of pixels. A JPEG is reduced while it is
        decoded: this costs less, and the means are approximate. The edges of the rectangle are rounded to whole pixels
        of the reduced image.
        """
        cv2, _ = _decoders()
        shrink = min(crop_height, crop_width) / self.size
        factor = next((factor for factor in _REDUCTIONS if shrink >= factor), 1)
        pixels = self._reduced(factor)
        first, start = round(top / factor), round(left / factor)
        last = max(round((top + crop_height) / factor), first + 1)
        stop = max(round((left + crop_width) / factor), start + 1)
        # "Exact" gives the same bits on every CPU, and takes a twentieth longer.
        square = (self.size, self.size)
        return cv2.resize(pixels[first:last, start:stop], square, interpolation=cv2.INTER_LINEAR_EXACT)

    def _reduced(self, factor: int) -> np.ndarray:
        """The image at 1 / `factor` of its size, rounded up; uint8, RGB."""
        cv2, simplejpeg = _decoders()
        if self.data.startswith(_JPEG):
            height, width = (-(-count // factor) for count in self._shape)
            # It gives OpenCV's bits in nine tenths of the time, and refuses a file that is rare or damaged.
            with contextlib.suppress(ValueError):
                return simplejpeg.decode_jpeg(self.data, "RGB", min_height=height, min_width=width, min_factor=factor)
        pixels = cv2.imdecode(np.frombuffer(self.data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        if pixels is None:
            raise UserError(f"an image of {len(self.data):,} bytes is damaged, or no JPEG, PNG or WebP image")
        pixels = cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
        if factor == 1:
            return pixels
        # OpenCV can decode to a smaller size, but would drop most pixels of each block of 4 × 4 or 8 × 8.
        below, right = (-count % factor for count in pixels.shape[:2])
        whole_blocks = cv2.copyMakeBorder(pixels, 0, below, 0, right, cv2.BORDER_REPLICATE)
        height, width = (count // factor for count in whole_blocks.shape[:2])
        return cv2.resize(whole_blocks, (width, height), interpolation=cv2.INTER_AREA)

    @functools.cached_property
    def _shape(self) -> tuple[int, int]:
        """Height and width, from the header."""
        if self.data.startswith(_JPEG):
            with contextlib.suppress(KeyError, ValueError):  # of a file that is rare or damaged
                return _decoders()[1].decode_jpeg_header(self.data)[:2]
        from PIL import Image

        try:
            width, height = Image.open(io.BytesIO(self.data)).size
        except OSError as error:
            raise UserError(f"an image of {len(self.data):,} bytes is no JPEG, PNG or WebP image") from error
        return height, width


class EncodedImages:
    """A source whose entry "image", the bytes of a file, becomes an `EncodedImage`."""

    def __init__(self, source: RandomAccessSource, size: int, shorter: int) -> None:
        """`size` and `shorter` are those of `EncodedImage`, as is the error."""
        _check_sizes(size, shorter)
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


def _check_sizes(size: int, shorter: int) -> None:
    if shorter < size:
        raise UserError(f"images have no centre of {size} pixels: shorter is {shorter}, and must be at least {size}")


def _decoders() -> "tuple[ModuleType, ModuleType]":
    """OpenCV and simplejpeg."""
    try:
        import cv2
        import simplejpeg
    except ImportError as error:
        raise UserError(f"encoded images need {error.name}: pip install 'belief-trainer[images]'") from error
    cv2.setNumThreads(1)  # batches are decoded in parallel already
    return cv2, simplejpeg
