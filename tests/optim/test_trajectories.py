"""AdaBelief against trajectories of the authors' own package, which `make_trajectories.py` made.

Every parameter moves away from zero, so a relative tolerance needs no absolute one beside it.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.optim.reference import adam, deviation, reference, run
from trainer.optim.adabelief import adabelief

GOLDEN: dict[str, Any] = json.loads(Path(__file__).with_name("trajectories.json").read_text())
START, GRADS = np.array(GOLDEN["start"]), np.array(GOLDEN["grads"])
EXPECTED = {name: np.array(case["params"]) for name, case in GOLDEN["cases"].items()}


def settings(name: str, array: Callable[[Any], Any]) -> dict[str, Any]:
    """The options of a case; where the file has a list of learning rates, a schedule."""
    options = dict(GOLDEN["cases"][name]["options"])
    if isinstance(rates := options["learning_rate"], list):
        options["learning_rate"] = lambda count: array(rates)[count]
    return options


def stored(path: np.ndarray) -> np.ndarray:
    """The steps that the file has."""
    return path[GOLDEN["every"] - 1 :: GOLDEN["every"]]


@functools.cache
def paths(make: Callable[..., optax.GradientTransformation]) -> dict[str, np.ndarray]:
    """The parameters of every case after each stored step of an optimizer."""
    with jax.enable_x64(True):
        optimizers = {name: make(**settings(name, jnp.asarray)) for name in EXPECTED}
        return {name: stored(path) for name, (path, _) in run(optimizers, START, GRADS).items()}


@pytest.mark.parametrize("name", EXPECTED)
def test_follows_the_authors_in_float64(name):
    np.testing.assert_allclose(paths(adabelief)[name], EXPECTED[name], rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", EXPECTED)
def test_adam_would_fail_the_same_comparison(name):
    assert deviation(paths(adam)[name], EXPECTED[name]) > 1e-2


@pytest.mark.parametrize("name", EXPECTED)
def test_the_reference_of_the_other_tests_follows_the_authors(name):
    np.testing.assert_allclose(
        stored(reference(START, GRADS, **settings(name, list))), EXPECTED[name], rtol=1e-12, atol=0
    )


def test_no_two_cases_are_alike():
    """A case that an option leaves unchanged would not test that option."""
    names = list(EXPECTED)
    alike = [(a, b) for i, a in enumerate(names) for b in names[:i] if deviation(EXPECTED[a], EXPECTED[b]) < 1e-9]
    assert not alike
