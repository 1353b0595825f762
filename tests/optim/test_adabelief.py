"""AdaBelief against a float64 reference written from the formulas, for every option and every pair of options.

Parameters start near zero and move away from it: a share of a parameter is about the same share of the way it has gone,
at every step, and no absolute tolerance is needed. Adam misses each comparison by more than a thousandth.
"""

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.optim.reference import adam, deviation, reference, run
from trainer.optim.adabelief import adabelief, scale_by_belief
from trainer.optim.fused import ScaleByBeliefState

STEPS = 300


def falling(peak: float) -> Callable[[Any], Any]:
    """A schedule for Python's numbers and JAX's: count / 100 would be float32 even under x64, 0.01 * count is not."""
    return lambda count: peak / (1 + 0.01 * count)


# The options and the ways to set each: two ways from different rows make a pair, in which the later row wins.
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "nesterov": {"nesterov": {"nesterov": True}},
    "rectify": {"rectify": {"rectify": True}, "rectify-still": {"rectify": True, "sgd_fallback": False}},
    "amsgrad": {"amsgrad": {"amsgrad": True}},
    "mask": {"mask": {"weight_decay": 0.1, "weight_decay_mask": {"kernel": True, "bias": False}}},
    "decay": {
        "decoupled": {"decay": "decoupled", "weight_decay": 0.1},
        "decoupled-schedule": {"decay": "decoupled", "weight_decay": falling(0.2)},
        "coupled": {"decay": "coupled", "weight_decay": 0.01},
        "coupled-schedule": {"decay": "coupled", "weight_decay": falling(0.02)},
        "fixed": {"decay": "fixed", "weight_decay": 0.002},
        "fixed-schedule": {"decay": "fixed", "weight_decay": falling(0.005)},
    },
    "learning_rate": {"lr-schedule": {"learning_rate": falling(0.02)}, "lr-array": {"learning_rate": np.array(0.02)}},
    # The prediction error is 0, which leaves eps and eps_root alone in the denominator.
    "b1": {"b1=0": {"b1": 0.0, "eps_root": 1e-4}},
    "b2": {"b2=0.9": {"b2": 0.9}, "b2=0.99": {"b2": 0.99}},
    "eps": {
        "eps=1e-8,0": {"eps": 1e-8, "eps_root": 0.0},
        "eps=0,1e-8": {"eps": 0.0, "eps_root": 1e-8},
        "eps=1e-3,1e-3": {"eps": 1e-3, "eps_root": 1e-3},
    },
    "arrays": {
        "arrays": {"b1": np.array(0.8), "b2": np.array(0.98), "eps": np.array(1e-6), "eps_root": np.array(1e-7)}
    },
}
REFUSED = {"rectify", "amsgrad"}


def cases() -> dict[str, dict[str, Any]]:
    """The defaults, each option alone and each pair, by name. Pairs have a + in their names."""
    ways = [(row, name, way) for row, options in OPTIONS.items() for name, way in options.items()]
    found = {"defaults": {}, "decay-array": {"weight_decay": np.array(0.05)}} | {name: way for _, name, way in ways}
    for (row, name, way), (row2, name2, way2) in itertools.combinations(ways, 2):
        if row != row2 and {row, row2} != REFUSED and way | way2 != way2:
            found[f"{name}+{name2}"] = way | way2
    return found


CASES = cases()
OPTAX_CASES = [
    name for name, way in CASES.items() if way.keys() <= {"learning_rate", "b1", "b2", "eps", "eps_root", "nesterov"}
]
GROUP_SIZE = 61  # cases that compile together


def params(names: Iterable[str]) -> list[Any]:
    """The cases as parameters of a test; pairs are exhaustive."""
    return [pytest.param(name, marks=[pytest.mark.exhaustive] if "+" in name else []) for name in names]


@functools.cache
def problem() -> tuple[Any, Any]:
    """Parameters near zero, and gradients that move them away from it.

    The mean gradient is well away from zero, else the belief would be Adam's; its scale differs between elements. Noise
    falls after 100 steps, and with it s, without which AMSGrad's maximum would be idle.
    """
    rng = np.random.default_rng(0)
    sign = rng.choice([-1.0, 1.0], 9)
    noise = rng.uniform(-1, 1, (STEPS, 9)) * np.where(np.arange(STEPS) < 100, 0.8, 0.2)[:, None]
    return tree(-0.01 * sign * rng.uniform(1, 2, 9)), tree(sign * 10 ** rng.uniform(-1, 1, 9) * (1 + noise))


def tree(x: np.ndarray) -> dict[str, np.ndarray]:
    """Nine elements as parameters, after any number of other axes."""
    return {"kernel": x[..., :6].reshape(*x.shape[:-1], 2, 3), "bias": x[..., 6:]}


def flat(x: dict[str, Any]) -> np.ndarray:
    """The inverse of `tree`."""
    return np.concatenate([x["kernel"].reshape(*x["bias"].shape[:-1], 6), x["bias"]], axis=-1)


def settings(name: str, array: Callable[[np.ndarray], Any]) -> dict[str, Any]:
    """All options of a case."""
    options = {"learning_rate": 0.01} | CASES[name]
    return {key: array(value) if isinstance(value, np.ndarray) else value for key, value in options.items()}


def path(make: Callable[..., optax.GradientTransformation], name: str) -> np.ndarray:
    """The parameters of a case after each step of an optimizer in float64."""
    known = OPTAX_CASES if make is optax.adabelief else list(CASES)
    names = [other for other in known if ("+" in other) == ("+" in name)]
    start = names.index(name) // GROUP_SIZE * GROUP_SIZE
    return paths(make, tuple(names[start : start + GROUP_SIZE]))[name]


@functools.cache
def paths(make: Callable[..., optax.GradientTransformation], names: tuple[str, ...]) -> dict[str, np.ndarray]:
    with jax.enable_x64(True):
        found = run({name: make(**settings(name, jnp.asarray)) for name in names}, *problem())
    return {name: flat(params) for name, (params, _) in found.items()}


@functools.cache
def expected(name: str, given: Any = np.float64) -> np.ndarray:
    """The parameters of a case after each step of the reference, from parameters and gradients as `given`."""
    options = settings(name, float)
    if mask := options.get("weight_decay_mask"):
        options["weight_decay_mask"] = np.repeat([mask["kernel"], mask["bias"]], [6, 3])
    params, grads = (flat(x).astype(given) for x in problem())
    return reference(params, grads, **options)


@pytest.mark.parametrize("name", params(CASES))
def test_follows_the_formulas_in_float64(name):
    np.testing.assert_allclose(path(adabelief, name), expected(name), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", params(OPTAX_CASES))
def test_agrees_with_optax_in_float64(name):
    np.testing.assert_allclose(path(adabelief, name), path(optax.adabelief, name), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", params(CASES))
def test_adam_would_fail_the_same_comparison(name):
    assert deviation(path(adam, name), expected(name)) > 1e-3


@pytest.mark.parametrize("name", params(OPTAX_CASES))
def test_adam_would_fail_the_same_comparison_with_optax(name):
    assert deviation(path(adam, name), path(optax.adabelief, name)) > 1e-3


def test_rectification_that_never_comes_is_momentum():
    """With b2 = 0.6, N∞ is 4."""
    options: dict[str, Any] = {"learning_rate": 0.01, "b2": 0.6, "rectify": True, "weight_decay": 0.1}
    with jax.enable_x64(True):
        found = flat(run({"ours": adabelief(**options)}, *problem())["ours"][0])
    np.testing.assert_allclose(found, reference(*map(flat, problem()), **options), rtol=1e-12, atol=0)


@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"rectify": True}, {"amsgrad": True}], ids=str)
def test_complex_parameters_are_divided_by_the_modulus_of_the_error(options):
    turn = np.exp(1j * np.arange(9))
    params, grads = (flat(x) * turn for x in problem())
    optimizers = {"ours": adabelief(0.01, **options), "adam": adam(0.01, **options)}
    with jax.enable_x64(True):
        found = run(optimizers, params, grads)
    expected = reference(params, grads, 0.01, **options)
    np.testing.assert_allclose(found["ours"][0], expected, rtol=1e-12, atol=0)
    assert deviation(found["adam"][0], expected) > 1e-3


@pytest.mark.parametrize("decay", ["decoupled", "coupled", "fixed"])
@pytest.mark.parametrize(
    "mask",
    [
        {"dense": {"kernel": True, "bias": True}, "scale": False},
        {"dense": True, "scale": False},
        lambda params: jax.tree.map(lambda p: p.ndim > 0, params),
        lambda params: {"dense": True, "scale": False},
    ],
    ids=["tree", "prefix", "callable", "callable prefix"],
)
def test_mask_of_any_form_leaves_the_rest_as_it_is_without_decay(mask, decay):
    params = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}, "scale": jnp.ones(())}
    grads = jax.tree.map(jnp.ones_like, params)

    def second(**options: Any) -> Any:
        """Updates of the second step: the first step normalizes coupled decay away."""
        optimizer = adabelief(0.01, **options)
        _, state = optimizer.update(grads, optimizer.init(params), params)
        return optimizer.update(jax.tree.map(jnp.zeros_like, grads), state, params)[0]

    masked, everywhere, nowhere = (
        second(decay=decay, weight_decay=0.1, weight_decay_mask=mask),
        second(decay=decay, weight_decay=0.1),
        second(),
    )
    jax.tree.map(np.testing.assert_array_equal, masked, everywhere | {"scale": nowhere["scale"]})
    assert all(np.all(a != b) for a, b in zip(*map(jax.tree.leaves, (everywhere, nowhere)), strict=True))


# In float32.


ALONE = tuple(name for name in CASES if "+" not in name)


@functools.cache
def updates32() -> dict[str, np.ndarray]:
    """The updates of the defaults and each option alone."""
    optimizers = {name: adabelief(**settings(name, jnp.asarray)) for name in ALONE}
    found = run(optimizers, *jax.tree.map(np.float32, problem()))
    return {name: flat(updates) for name, (_, updates) in found.items()}


@pytest.mark.parametrize("name", ALONE)
def test_float32_updates_are_right_to_a_few_roundings(name):
    """Rectification is the hard one: N, 5 at first, is a difference of numbers near 2000."""
    updates = np.diff(expected(name, np.float32), axis=0, prepend=flat(problem()[0]).astype(np.float32)[None])
    largest = np.maximum.accumulate(np.abs(updates))  # so far
    np.testing.assert_array_less(np.abs(updates32()[name] - updates), 1e-5 * largest + 1e-30)


@functools.cache
def float32_errors(elements: int, steps: int) -> dict[str, np.ndarray]:
    """The error of each step's updates in float32, as a share of the updates, both as root mean squares.

    Not a mean of the elements' own shares: the few updates next to zero would decide it.
    """
    grads = np.random.default_rng(0).standard_normal((steps, elements), np.float32)
    optimizers = {"ours": adabelief(1e-3), "optax": optax.adabelief(1e-3), "adam": optax.adam(1e-3)}
    found = run(optimizers, np.zeros(elements, np.float32), grads)
    updates = np.diff(reference(np.zeros(elements), grads, 1e-3), axis=0, prepend=np.zeros((1, elements)))
    return {name: rms(u - updates) / rms(updates) for name, (_, u) in found.items()}


def rms(x: np.ndarray) -> np.ndarray:
    return np.sqrt(np.mean(np.square(x), axis=1))


@pytest.mark.parametrize(("elements", "steps"), [(10_000, 100), (1_000, 3_000)])
def test_float32_is_no_less_accurate_than_optax_at_any_step(elements, steps):
    errors = float32_errors(elements, steps)
    assert np.all(errors["ours"] <= errors["optax"])


@pytest.mark.parametrize(("elements", "steps"), [(10_000, 100), (1_000, 3_000)])
def test_float32_error_is_at_most_a_fifth_of_that_of_optax(elements, steps):
    errors = float32_errors(elements, steps)
    assert np.mean(errors["ours"]) <= np.mean(errors["optax"]) / 5


def test_adam_would_fail_the_comparison_of_accuracy():
    errors = float32_errors(10_000, 100)
    assert np.all(errors["adam"] > 1e3 * errors["optax"])


def step(optimizer: optax.GradientTransformation, grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
    """Parameters and state after one update."""
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def objective(optimizer: optax.GradientTransformation) -> list[str]:
    """Σx² from (1, 2, 3), as printed before the first and after each of five steps."""
    params = jnp.array([1.0, 2.0, 3.0])
    state = optimizer.init(params)
    printed = [str(jnp.sum(params**2))]
    for _ in range(5):
        params, state = step(optimizer, 2 * params, state, params)
        printed.append(f"{jnp.sum(params**2):.2E}")
    return printed


def test_prints_what_optax_documents():
    assert objective(adabelief(0.003)) == ["14.0", "1.40E+01", "1.39E+01", "1.39E+01", "1.38E+01", "1.38E+01"]
    assert objective(optax.adam(0.003)) != objective(optax.adabelief(0.003))


def test_scaling_alone_gives_the_direction_before_rate_and_sign():
    grads = jnp.array([1.0, -2.0, 3.0])
    rule, optimizer = scale_by_belief(nesterov=True), adabelief(1.0, nesterov=True)
    params = jnp.zeros(3)
    scaled, _ = step(rule, grads, rule.init(params), params)
    stepped, _ = step(optimizer, grads, optimizer.init(params), params)
    np.testing.assert_array_equal(scaled, -stepped)
    assert np.all(scaled * grads > 0)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_state_has_count_and_moments_like_the_parameters(amsgrad):
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones(())}
    for transform in (scale_by_belief(amsgrad=amsgrad), adabelief(0.1, weight_decay=0.1, amsgrad=amsgrad)):
        _, state = step(transform, params, transform.init(params), params)
        assert int(state.count) == 1
        np.testing.assert_allclose(state.mu["a"], np.full((2, 3), 0.1), rtol=1e-6)
        np.testing.assert_allclose(state.nu["b"], 0.001 * 0.9**2, rtol=1e-6)
        assert jax.tree.structure(state.nu_max) == jax.tree.structure(params if amsgrad else None)
        assert isinstance(state, ScaleByBeliefState)


def test_rectify_with_amsgrad_is_refused():
    with pytest.raises(ValueError, match=r"rectify.*amsgrad|amsgrad.*rectify"):
        adabelief(0.1, rectify=True, amsgrad=True)
