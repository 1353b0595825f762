"""AdaBelief at the ends of its ranges: its updates, and its errors."""

import functools
import inspect
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.optim.reference import reference, run
from trainer.optim.adabelief import adabelief, scale_by_belief

RATE = 0.1
LARGEST = np.iinfo(np.int32).max
LOW: dict[str, Any] = {"mu_dtype": "bfloat16", "nu_dtype": "bfloat16"}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "nesterov": {"nesterov": True},
    "amsgrad": {"amsgrad": True},
    "rectify": {"rectify": True},
    "rectify, still": {"rectify": True, "sgd_fallback": False},
    "bfloat16": LOW,
}
EXACT = [way for way in WAYS if way != "bfloat16"]  # nothing is rounded at random
OPTIMIZERS = {name: adabelief(RATE, **way) for name, way in WAYS.items()}


def one(optimizer: Any, grads: Any, params: Any, **state: Any) -> tuple[Any, Any]:
    """The updates and the state after one update, from the first state with `state` as some of its fields."""
    return jax.jit(optimizer.update)(grads, optimizer.init(params)._replace(**state), params)


def updates(optimizers: Any, grads: Any) -> dict[str, np.ndarray]:
    """Of one parameter, in each step."""
    grads = np.asarray(grads, np.float32)
    return {name: found for name, (_, found) in run(optimizers, np.float32(0), grads).items()}


# The ends of the hyperparameters' ranges.


@pytest.mark.parametrize("b1", [0, 0.0])
def test_without_b1_there_is_no_error_and_eps_root_alone_divides(b1):
    """s / (1 − b2^t) is eps_root / (1 − b2) at every step."""
    grads = [1.0, -2.0, 0.0, 1e-3]
    found = updates({"ours": adabelief(RATE, b1=b1, eps_root=1e-4)}, grads)["ours"]
    np.testing.assert_allclose(found, -RATE * np.array(grads) / math.sqrt(1e-4 / 0.001), rtol=1e-5)


def test_without_b2_only_the_last_error_counts():
    """The error is 0.9 g in the first step and 0.81 g in the second, of the same gradient."""
    found = updates({"ours": adabelief(RATE, b2=0.0)}, [2.0, 2.0])["ours"]
    np.testing.assert_allclose(found, [-RATE / 0.9, -RATE / 0.81], rtol=1e-5)


@pytest.mark.parametrize("options", [{"eps": 0.0, "eps_root": 1e-8}, {"eps": 1e-8, "eps_root": 0.0}], ids=str)
def test_either_eps_may_be_0(options):
    """With no gradient there is nothing but it in the denominator: the update is 0 all the same."""
    grads = np.array([0.0, 0.0, 1.0, 0.0])
    found = updates({"ours": adabelief(RATE, **options)}, grads)["ours"]
    expected = np.diff(reference(np.zeros(()), grads, RATE, **options), prepend=0)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=0)
    assert np.all(found[:2] == 0)


@pytest.mark.parametrize("make", [lambda **options: adabelief(RATE, **options), scale_by_belief])
@pytest.mark.parametrize("zero", [0, 0.0])
def test_both_eps_0_are_refused(make, zero):
    with pytest.raises(ValueError, match=r"eps and eps_root"):
        make(eps=zero, eps_root=zero)


@pytest.mark.parametrize("value", [-0.1, 1, 1.0, 1.5, math.inf, math.nan, np.float64(1.5), np.float32(1.0)], ids=repr)
@pytest.mark.parametrize("name", ["b1", "b2"])
def test_decays_outside_their_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"^{name} is "):
        adabelief(RATE, **{name: value})


@pytest.mark.parametrize("value", [-1e-8, -1, math.nan], ids=repr)
@pytest.mark.parametrize("name", ["eps", "eps_root"])
def test_negative_eps_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"^{name} is "):
        adabelief(RATE, **{name: value})


@pytest.mark.parametrize("make", [lambda **options: adabelief(RATE, **options), scale_by_belief])
def test_rectification_with_the_largest_moment_is_refused(make):
    with pytest.raises(ValueError, match=r"^rectify and amsgrad"):
        make(rectify=True, amsgrad=True)


def test_unknown_decay_is_refused():
    """By itself, without the annotations that are checked in tests."""
    with pytest.raises(ValueError, match=r"^decay is 'both'"):
        inspect.unwrap(adabelief)(RATE, decay="both")


@pytest.mark.parametrize("way", EXACT)
def test_rate_0_moves_nothing_and_counts_all_the_same(way):
    params, grads = jnp.array([1.0, -2.0]), jnp.array([3.0, 4.0])
    found, state = one(adabelief(0.0, weight_decay=0.1, **WAYS[way]), grads, params)
    _, expected = one(adabelief(RATE, weight_decay=0.1, **WAYS[way]), grads, params)
    assert np.all(found == 0)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), state, expected)


# Gradients of every size.


@pytest.mark.parametrize("way", WAYS)
def test_gradients_of_0_leave_parameters_as_they_are(way):
    params = jnp.array([1.0, -1e-30, 0.0, -0.0, 3e38])
    state: Any = OPTIMIZERS[way].init(params)
    for _ in range(10):
        found, state = jax.jit(OPTIMIZERS[way].update)(jnp.zeros(5), state, params)
        assert np.asarray(optax.apply_updates(params, found)).tobytes() == np.asarray(params).tobytes()


def test_first_gradient_after_many_of_0_is_right():
    """All that s has by then is eps_root."""
    grads = np.append(np.zeros(5000), [1.0, 0.5])
    found = updates({"ours": adabelief(RATE)}, grads)["ours"]
    expected = np.diff(reference(np.zeros(()), grads, RATE), prepend=0)
    assert np.all(found[:5000] == 0)
    np.testing.assert_allclose(found[5000:], expected[5000:], rtol=1e-4)


HUGE = [1e30, 1e30, 1.0, -3e38, 0.0, 1.0, -1.0, 2e19]


def test_squares_that_overflow_leave_updates_finite():
    """1e30² is not a float32. A division by infinity would move nothing, and infinity less infinity would be NaN."""
    found = updates(OPTIMIZERS | {"coupled": adabelief(RATE, weight_decay=0.1, decay="coupled")}, HUGE)
    assert {name: bool(np.all(np.isfinite(u))) for name, u in found.items()} == dict.fromkeys(found, True)


def test_gradients_whose_squares_overflow_make_updates_of_the_usual_size():
    """AdaBelief does not depend on the scale of gradients; of 1e30 it sees 4.6e18, but in the mean, too."""
    found = [updates({"ours": OPTIMIZERS["plain"]}, np.full(20, scale))["ours"] for scale in (1.0, 1e30)]
    ratio = found[1] / found[0]
    assert np.all((ratio > 0.3) & (ratio < 10)), ratio


@pytest.mark.parametrize("way", ["plain", "nesterov", "amsgrad", "bfloat16"])
def test_direction_of_the_largest_squares_is_that_of_smaller_ones(way):
    """1e18 is squared to 1e36; the update does not depend on the scale of the gradients."""
    grads = np.array([1.0, -0.5, 0.25, 2.0])
    found = [updates({"ours": OPTIMIZERS[way]}, scale * grads)["ours"] for scale in (1.0, 2.0**60)]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)


@pytest.mark.parametrize("way", ["plain", "nesterov", "amsgrad", "rectify"])
def test_tiny_gradients_make_tiny_updates(way):
    """1e-30 is 0 when squared, and the divisor is about √(eps_root / (1 − b2))."""
    grads = 1e-30 * np.random.default_rng(0).uniform(0.5, 1.5, 20)
    found = updates({"ours": OPTIMIZERS[way]}, grads)["ours"]
    expected = np.diff(reference(np.zeros(()), grads, RATE, **WAYS[way]), prepend=0)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradients_that_are_not_finite_spoil_their_own_element_alone(bad):
    grads = jnp.array([bad, 1.0])
    for optimizer in (OPTIMIZERS["plain"], OPTIMIZERS["bfloat16"]):
        found, state = one(optimizer, grads, jnp.zeros(2))
        assert np.isnan(found[0])
        assert np.isfinite([found[1], state.mu[1], state.nu[1]]).all()


# Trees and leaves of every size.


@pytest.mark.parametrize("way", WAYS)
def test_leaves_of_few_elements_are_as_larger_ones(way):
    """All elements are 1, and so all updates are the same, but for the rounding of bfloat16."""
    shapes = [(8,), (), (1,), (1, 1), (0,), (3, 0, 2)]
    ones = [jnp.ones(shape) for shape in shapes]
    found, state = one(OPTIMIZERS[way], ones, ones)
    assert [x.shape for x in found] == [x.shape for x in state.mu] == [x.shape for x in state.nu] == shapes
    for x in found:
        np.testing.assert_allclose(x, np.full_like(x, found[0][0]), rtol=0.02 if way == "bfloat16" else 1e-6)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "weight_decay_mask": True}, LOW])
@pytest.mark.parametrize("tree", [{}, [], None, {"a": {}, "b": None}], ids=str)
def test_tree_without_leaves(tree, options):
    found, state = one(adabelief(RATE, amsgrad=True, **options), tree, tree)
    assert found == state.mu == state.nu == state.nu_max == tree
    assert int(state.count) == 1


@pytest.mark.parametrize("way", ["plain", "amsgrad", "bfloat16"])
def test_parameter_without_gradient_keeps_its_moments(way):
    params = {"a": jnp.ones(3), "b": jnp.ones(3)}
    optimizer: Any = adabelief(RATE, weight_decay=0.1, **WAYS[way])
    _, before = one(optimizer, params, params)
    found, after = jax.jit(optimizer.update)({"a": None, "b": params["b"]}, before, params)
    assert found["a"] is None
    for moment in ("mu", "nu", "nu_max"):
        if getattr(before, moment) is not None:
            np.testing.assert_array_equal(getattr(after, moment)["a"], getattr(before, moment)["a"])
    assert np.all(after.mu["b"] != before.mu["b"])


def test_parameter_without_gradient_leaves_the_others_as_they_are():
    """Also the random numbers of their rounding."""
    params = {"a": jnp.ones(100), "b": jnp.ones(100)}
    with_both, _ = one(OPTIMIZERS["bfloat16"], params, params)
    with_one, _ = one(OPTIMIZERS["bfloat16"], {"a": None, "b": params["b"]}, params)
    np.testing.assert_array_equal(with_one["b"], with_both["b"])


# The end of the count.


@pytest.mark.parametrize("way", EXACT)
@pytest.mark.parametrize("count", [LARGEST - 2, LARGEST - 1, LARGEST])
def test_count_at_its_end_changes_nothing(count, way):
    """b1^t and b2^t are 0 long before."""
    params = jnp.array([1.0, -2.0])
    moments = {"mu": params / 2, "nu": jnp.ones(2)} | ({"nu_max": 2 * jnp.ones(2)} if way == "amsgrad" else {})
    found, _ = one(OPTIMIZERS[way], params, params, count=jnp.int32(count), **moments)
    expected, _ = one(OPTIMIZERS[way], params, params, count=jnp.int32(10**6), **moments)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("count", [LARGEST - 1, LARGEST])
def test_count_stays_at_its_end(count):
    _, state = one(OPTIMIZERS["plain"], jnp.ones(2), jnp.ones(2), count=jnp.int32(count))
    assert state.count.dtype == jnp.int32
    assert int(state.count) == LARGEST


@pytest.mark.parametrize("count", [LARGEST - 1, LARGEST])
def test_count_at_its_end_rounds_at_random_all_the_same(count):
    ones = jnp.ones(100)
    _, state = one(OPTIMIZERS["bfloat16"], ones, ones, count=jnp.int32(count))
    assert len(np.unique(state.mu)) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"b1": np.float64(2.0)}, r"^b1 is 2.0; it must be in \[0, 1\)"),
        ({"b2": "x"}, "^b2 is 'x'; a number is expected"),
        ({"eps": None}, "^eps is None; a number is expected"),
        ({"eps": math.nan}, "^eps is nan; it must be a finite number"),
        ({"eps_root": math.inf}, "^eps_root is inf; it must be a finite number"),
        ({"b1": jnp.array(0)}, "^b1 is a int32 array"),
        ({"weight_decay_mask": jnp.array(True)}, "^weight_decay_mask is an array: .* static_args"),
    ],
)
def test_arguments_that_are_none_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        adabelief(RATE, **arguments)


def test_dtype_that_is_none_is_named():
    with pytest.raises(ValueError, match=r"^nu_dtype is 'bf16'; moments are stored as float32"):
        adabelief(RATE, nu_dtype="bf16").init(jnp.ones(3))


def test_state_of_another_optimizer_is_refused_with_the_way_over():
    with pytest.raises(ValueError, match=r"^the state is a tuple, .* trainer\.from_optax"):
        adabelief(RATE).update(jnp.ones(3), optax.adabelief(RATE).init(jnp.ones(3)))


def test_python_numbers_are_parameters():
    optimizer = adabelief(RATE)
    found: Any = optimizer.update(1.0, optimizer.init(1.0), 1.0)[0]
    np.testing.assert_allclose(found, -RATE / 0.9, rtol=1e-5)
