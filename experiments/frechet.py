"""The Fréchet distance between two sets of images, in the features of a classifier that this repository trained."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from etils import epath
from jaxtyping import Array, Float, Float64, UInt8

import trainer
from trainer.errors import UserError

Features = Callable[[UInt8[Array, "examples height width channels"]], Float[Array, "examples features"]]


def frechet_distance(first: Float64[np.ndarray, "n features"], second: Float64[np.ndarray, "m features"]) -> float:
    """The squared Fréchet distance between the normal distributions that are fitted to two sets of features.

    It is |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2·(Σ₁Σ₂)^½) (Dowson and Landau, 1982), the formula of FID, which takes the features
    of another network. Each set has two examples or more; covariances are divided by n − 1.
    """
    # Σ = RᵀR. The trace of (Σ₁Σ₂)^½ is then the sum of the singular values of R₁R₂ᵀ, which is real and exact even for a
    # feature that never varies, such as a unit that is always 0.
    (mean_1, root_1), (mean_2, root_2) = (_mean_and_root(features) for features in (first, second))
    overlap = np.linalg.svd(root_1 @ root_2.T, compute_uv=False).sum()
    return float(np.square(mean_1 - mean_2).sum() + np.square(root_1).sum() + np.square(root_2).sum() - 2 * overlap)


def _mean_and_root(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean, and R of the covariance RᵀR."""
    mean = features.mean(0)
    return mean, np.asarray(np.linalg.qr((features - mean) / np.sqrt(len(features) - 1), mode="r"))


def load_features(source: str, sharding: jax.sharding.Sharding) -> Features:
    """The function that gives the features of images: the input of the classifier's layer "head".

    Args:
      source: the classifier's workdir, or WORKDIR@STEP, where STEP is a number, latest or best.
      sharding: of its variables.

    It is read and compiled once for all evaluations of a run, and again if another training was launched in the
    workdir. Raises `UserError` if there is no such checkpoint. The function does so if the model has no layer of that
    name.
    """
    workdir, _, step = source.partition("@")
    settings = epath.Path(workdir) / "config.json"  # which each launch writes
    launch = f"{settings.stat().mtime} {settings.read_text()}" if settings.exists() else ""
    return _load_features(workdir, step, sharding, launch)


@functools.lru_cache(maxsize=1)
def _load_features(workdir: str, step: str, sharding: jax.sharding.Sharding, launch: str) -> Features:
    del launch  # part of the cache's key only
    trained = trainer.load(workdir, int(step) if step.isdecimal() else step or "latest", sharding=sharding)
    experiment: Any = trained.experiment

    @jax.jit
    def features(variables: Any, images: Array) -> Array:
        inputs = []

        def keep(call: Callable, arguments: tuple, options: dict, context: nn.module.InterceptorContext) -> Any:
            if context.module.name == "head":
                inputs.append(arguments[0])
            return call(*arguments, **options)

        with nn.intercept_methods(keep):
            experiment.predict(variables, {"image": images})
        if len(inputs) != 1:
            raise UserError(f"the classifier in {workdir} calls a layer 'head' {len(inputs)} times; once is expected")
        return inputs[0]

    return functools.partial(features, trained.variables)
