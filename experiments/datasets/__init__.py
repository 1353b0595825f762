"""TFDS builders for data that ships in packages. Importing this package registers them by name."""

from experiments.datasets.digits import Digits
from experiments.datasets.fashion_mnist_local import FashionMnistLocal
from experiments.datasets.linux_source import LinuxSource
from experiments.datasets.mnist5k import Mnist5k
from experiments.datasets.packed_text import PackedText
from experiments.datasets.shakespeare import Shakespeare

__all__ = ["Digits", "FashionMnistLocal", "LinuxSource", "Mnist5k", "PackedText", "Shakespeare"]
