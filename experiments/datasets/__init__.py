"""TFDS builders for data that ships in packages. Importing this package registers them by name."""

from experiments.datasets.digits import Digits
from experiments.datasets.fashion_mnist_local import FashionMnistLocal
from experiments.datasets.mnist5k import Mnist5k
from experiments.datasets.shakespeare import Shakespeare

__all__ = ["Digits", "FashionMnistLocal", "Mnist5k", "Shakespeare"]
