"""AdaBelief in 16 bits: the dtypes of updates and moments, and the rounding of bfloat16 moments.

Where Optax goes wrong, the same test shows it.
"""

import functools
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests.optim.reference import reference
from trainer.optim.adabelief import adabelief, scale_by_belief
from trainer.optim.fused import ScaleByBeliefState
from trainer.optim.precision import _carry_but_for_nan, _hash, divide, round_to_storage, rounding_bits

HALF = ["bfloat16", "float16"]
LOW: dict[str, Any] = {"mu_dtype": jnp.bfloat16, "nu_dtype": jnp.bfloat16}
SIGMAS = 5.0  # how far from its expectation a mean may be; by chance once in 1.7 million


def dtypes(tree: Any) -> Any:
    """The dtype of each leaf, and whether it is weak."""
    return jax.tree.map(lambda x: (x.dtype.name, getattr(x, "weak_type", False)), tree)


def moments(state: Any) -> ScaleByBeliefState:
    """The moments of our state, or of Optax's."""
    return ScaleByBeliefState(*(optax.tree.get(state, name) for name in ("count", "mu", "nu")))


def walk(optimizers: Mapping[str, optax.GradientTransformation], params: Any, grads: Any) -> dict[str, Any]:
    """The updates and moments of each step, for each optimizer; the parameters stay as they are."""

    def step(states: dict[str, Any], grad: Any) -> tuple[Any, Any]:
        found = {name: optimizers[name].update(grad, state, params) for name, state in states.items()}
        states = {name: state for name, (_, state) in found.items()}
        return states, {name: (updates, moments(state)) for name, (updates, state) in found.items()}

    def steps(grads: Any) -> Any:
        return jax.lax.scan(step, {name: o.init(params) for name, o in optimizers.items()}, grads)[1]

    return jax.tree.map(np.asarray, jax.jit(steps)(grads))


def after_one(optimizer: optax.GradientTransformation, params: Any) -> tuple[Any, Any, Any]:
    """The state before, the updates, and the state after: shapes and dtypes alone."""
    state = jax.eval_shape(optimizer.init, params)
    return state, *jax.eval_shape(optimizer.update, params, state, params)


# 16-bit parameters.


@pytest.mark.parametrize("dtype", HALF)
def test_moments_of_16_bit_parameters_are_float32(dtype):
    params = jnp.ones(3, dtype)
    _, _, state = after_one(adabelief(0.1, amsgrad=True), params)
    assert {x.dtype for x in (state.mu, state.nu, state.nu_max)} == {jnp.dtype("float32")}
    assert moments(after_one(optax.adabelief(0.1), params)[2]).nu.dtype == dtype


def test_second_moment_decays_under_bfloat16_parameters():
    """0.999 is 1 in bfloat16, where Optax has nu."""
    grads = jnp.zeros((2000, 1), jnp.bfloat16).at[:10].set(1.0)
    found = walk({"ours": adabelief(0.1), "optax": optax.adabelief(0.1)}, jnp.ones(1, jnp.bfloat16), grads)
    ours, theirs = (found[name][1].nu.astype(np.float64)[:, 0] for name in ("ours", "optax"))
    np.testing.assert_allclose(ours[-1] / ours[-1001], 0.999**1000, rtol=1e-3)
    assert np.all(np.diff(theirs) >= 0)


def test_first_update_of_float16_parameters_is_right():
    """1e-16 is 0 in float16, and so is the square of 1e-4: Optax divides by 0."""
    grads = jnp.asarray([[1e-3, -1e-4, 1.0, -1e-5, 0.0]], jnp.float16)
    params = jnp.zeros(5, jnp.float16)
    found = walk({"ours": adabelief(1.0), "optax": optax.adabelief(1.0)}, params, grads)
    np.testing.assert_allclose(found["ours"][0], reference(params, grads, 1.0), rtol=2**-11 + 1e-5, atol=0)
    assert not np.all(np.isfinite(found["optax"][0]))


@functools.cache
def half(dtype: str) -> tuple[np.ndarray, dict[str, Any]]:
    """Gradients, and the updates they give for parameters of `dtype` and for the same parameters in float32."""
    rng = np.random.default_rng(0)
    sign, noise = rng.choice([-1.0, 1.0], 50), rng.uniform(-1, 1, (100, 50))
    grads = np.asarray(jnp.asarray(1e-3 * sign * (1 + 0.8 * noise), dtype))
    params = jnp.asarray(rng.standard_normal(50), dtype)
    options: dict[str, Any] = {"learning_rate": 0.5, "weight_decay": 0.1, "nesterov": True}
    found = walk({"ours": adabelief(**options), "optax": optax.adabelief(0.5, nesterov=True)}, params, grads)
    wide = walk({"wide": adabelief(**options)}, params.astype(jnp.float32), grads.astype(np.float32))
    found["decay"] = (-0.05 * np.asarray(params, np.float64), None)
    return grads.astype(np.float64), found | wide


@pytest.mark.parametrize("dtype", HALF)
def test_16_bit_updates_are_the_reference_to_the_rounding_of_their_dtype(dtype):
    grads, found = half(dtype)
    update = np.diff(reference(np.zeros(50), grads, 0.5, nesterov=True), axis=0, prepend=0)
    expected, rounding = update + found["decay"][0], float(jnp.finfo(dtype).eps) / 2
    np.testing.assert_allclose(found["ours"][0].astype(np.float64), expected, rtol=rounding * 1.01, atol=1e-5)
    errors = np.abs(found["optax"][0].astype(np.float64) - update) / np.abs(update)
    assert not np.max(errors) < 10 * rounding


@pytest.mark.parametrize("dtype", HALF)
def test_16_bit_updates_are_those_of_float32_rounded_once(dtype):
    """Compiled apart, the two may differ in the last place of float32, which rarely shows."""
    _, found = half(dtype)
    assert np.mean(found["ours"][0] != found["wide"][0].astype(dtype)) < 1e-3


@pytest.mark.parametrize(
    ("params", "grads"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "bfloat16")]
)
def test_updates_have_the_dtype_of_the_parameters_whatever_that_of_the_gradients(params, grads):
    optimizer: Any = adabelief(0.1, weight_decay=0.1)
    state = jax.eval_shape(optimizer.init, jnp.ones(3, params))
    updates, after = jax.eval_shape(optimizer.update, jnp.ones(3, grads), state, jnp.ones(3, params))
    assert updates.dtype == params
    assert dtypes(after) == dtypes(state)


@pytest.mark.parametrize("decay", ["decoupled", "coupled", "fixed"])
@pytest.mark.parametrize("value", [optax.linear_schedule(0.1, 0.0, 10), jnp.float32(0.1)], ids=["schedule", "array"])
def test_scheduled_rate_and_decay_keep_updates_in_bfloat16(value, decay):
    params = jnp.ones(3, jnp.bfloat16)
    assert after_one(adabelief(value, weight_decay=value, decay=decay), params)[1].dtype == jnp.bfloat16
    assert after_one(optax.adamw(0.1, weight_decay=value), params)[1].dtype == jnp.float32


def test_each_leaf_of_a_mixed_tree_is_as_if_it_were_alone():
    dtypes = ["float32", "bfloat16", "float16", "complex64"]
    params = {dtype: jnp.asarray([1.0, -0.5, 0.25], dtype) for dtype in dtypes}
    grads = {dtype: jnp.asarray([[0.1, -1.0, 2.0], [0.2, 1.0, 1.0]], dtype) for dtype in dtypes}
    optimizers = {"ours": adabelief(0.1, weight_decay=0.1)}
    together, mixed = walk(optimizers, params, grads)["ours"]
    for dtype in dtypes:
        updates, alone = walk(optimizers, params[dtype], grads[dtype])["ours"]
        assert together[dtype].dtype == dtype
        rounding = float(jnp.finfo(dtype).eps)
        wide = "complex128" if dtype == "complex64" else "float64"
        np.testing.assert_allclose(together[dtype].astype(wide), updates.astype(wide), rtol=rounding, atol=0)
        np.testing.assert_allclose(mixed.nu[dtype], alone.nu, rtol=1e-6, atol=0)


# Arrays as hyperparameters.

NARROW = ["float32", "bfloat16", "float16", "complex64"]
DTYPES = [(dtype, x64) for x64 in (False, True) for dtype in NARROW] + [("float64", True), ("complex128", True)]


def arrays() -> dict[str, Any]:
    """In the widest float that is enabled, and not weakly so."""
    numbers = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "eps_root": 1e-8, "learning_rate": 0.1}
    return {name: jnp.asarray(np.array(number)) for name, number in numbers.items()}


def scan(optimizer: optax.GradientTransformation, params: Any) -> Any:
    """Three updates in a loop, which refuses a state that changes its dtypes."""

    def step(state: Any, _: None) -> tuple[Any, Any]:
        updates, state = optimizer.update(params, state, params)
        return state, updates

    return jax.eval_shape(lambda: jax.lax.scan(step, optimizer.init(params), length=3))


@pytest.mark.parametrize(
    "options", [{"nesterov": True, "amsgrad": True}, {"rectify": True}], ids=["amsgrad", "rectify"]
)
@pytest.mark.parametrize(("dtype", "x64"), DTYPES)
def test_updates_with_arrays_keep_the_dtypes_of_the_state(dtype, x64, options):
    with jax.enable_x64(x64):
        optimizer = adabelief(**arrays(), weight_decay=jnp.asarray(np.array(0.1)), **options)
        params = jnp.ones(3, dtype)
        before, updates, after = after_one(optimizer, params)
        assert dtypes(after) == dtypes(before)
        assert updates.dtype == dtype
        scan(optimizer, params)


def test_optax_with_arrays_changes_the_dtypes_of_its_state():
    with pytest.raises(TypeError, match="carry"):
        scan(optax.adabelief(**arrays()), jnp.ones(3, jnp.bfloat16))


@pytest.mark.parametrize("array", [jnp.asarray, np.asarray], ids=["jax", "numpy"])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["b1", "b2", "eps", "eps_root"])
def test_16_bit_arrays_are_refused_by_name(name, dtype, array):
    for make in (functools.partial(adabelief, 0.1), scale_by_belief):
        with pytest.raises(ValueError, match=rf"^{name} is a {dtype} array"):
            make(**{name: array(0.5, dtype)})


def test_injected_hyperparameters_of_bfloat16_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"^b1 .*inject_hyperparams hyperparam_dtype=jnp\.float32"):
        optax.inject_hyperparams(adabelief)(0.1).init(jnp.ones(3, jnp.bfloat16))


def test_injected_hyperparameters_of_float32_train_bfloat16_parameters():
    """Without the remedy Optax never moves: 1 − b2^t is 0."""
    optimizers = {
        "ours": optax.inject_hyperparams(adabelief, hyperparam_dtype=jnp.float32)(0.05),
        "optax": optax.inject_hyperparams(optax.adabelief)(0.05),
    }
    start = jnp.asarray([2.0, -1.0, 0.5], jnp.bfloat16)

    def loss(params: Any) -> jax.Array:
        return jnp.sum(jnp.square(params.astype(jnp.float32) - 1))

    def step(carry: Any, _: None) -> tuple[Any, Any]:
        losses = {}
        for name, (params, state) in carry.items():
            updates, state = optimizers[name].update(jax.grad(loss)(params), state, params)
            carry[name] = optax.apply_updates(params, updates), state
            losses[name] = loss(carry[name][0])
        return carry, losses

    losses = jax.jit(lambda c: jax.lax.scan(step, c, length=40)[1])(
        {n: (start, o.init(start)) for n, o in optimizers.items()}
    )
    assert losses["ours"][-1] < 0.1 * loss(start)
    assert np.all(losses["optax"] == loss(start))


# Which dtypes moments may have.


@pytest.mark.parametrize("params", ["float32", "bfloat16"])
@pytest.mark.parametrize("mu_dtype", [None, "float32", "bfloat16"])
@pytest.mark.parametrize("nu_dtype", [None, "float32", "bfloat16"])
def test_moments_have_the_dtypes_asked_for(params, mu_dtype, nu_dtype):
    optimizer = adabelief(0.1, mu_dtype=mu_dtype, nu_dtype=nu_dtype, amsgrad=True, weight_decay=0.1)
    before, updates, after = after_one(optimizer, jnp.ones(3, params))
    assert dtypes(after) == dtypes(before)
    assert updates.dtype == params
    assert after.mu.dtype == (mu_dtype or "float32")
    assert after.nu.dtype == after.nu_max.dtype == (nu_dtype or "float32")


def test_moments_are_float64_under_x64_when_asked_for():
    with jax.enable_x64(True):
        _, updates, state = after_one(adabelief(0.1, mu_dtype="float64", nu_dtype="float64"), jnp.ones(3, jnp.float32))
    assert (state.mu.dtype, state.nu.dtype, updates.dtype) == ("float64", "float64", "float32")


@pytest.mark.parametrize("dtype", ["float16", "int8", "complex64"])
@pytest.mark.parametrize("name", ["mu_dtype", "nu_dtype"])
def test_other_dtypes_are_refused_by_name(name, dtype):
    with pytest.raises(ValueError, match=rf"^{name} is {dtype}"):
        adabelief(0.1, **{name: dtype}).init(jnp.ones(3))


def options(name: str) -> dict[str, Any]:
    """1e-50 for that one of eps and eps_root, and 0 for the other."""
    return {"eps": 0.0, "eps_root": 0.0} | {name: 1e-50}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
@pytest.mark.parametrize("name", ["eps", "eps_root"])
def test_numbers_lost_in_float32_are_refused_by_name(name, dtype):
    with pytest.raises(ValueError, match=rf"^{name} is 1e-50.*float32"):
        adabelief(0.1, **options(name)).init(jnp.ones(3, dtype))


@pytest.mark.parametrize("name", ["eps", "eps_root"])
def test_small_numbers_are_accepted_in_float64(name):
    """An update of 1e-30/√1e-50 shows that they are used."""
    with jax.enable_x64(True):
        found = walk({"ours": adabelief(1.0, b1=0.0, **options(name))}, jnp.zeros(1), jnp.array([[1e-30]]))
    np.testing.assert_allclose(found["ours"][0], [[{"eps": -1e20, "eps_root": -(1e-5 * 0.001**0.5)}[name]]], rtol=1e-12)


@pytest.mark.parametrize("nu_dtype", ["float32", "bfloat16"])
def test_eps_root_lost_in_nu_dtype_is_refused(nu_dtype):
    with jax.enable_x64(True), pytest.raises(ValueError, match=r"^eps_root is 1e-50"):
        adabelief(0.1, eps_root=1e-50, nu_dtype=nu_dtype).init(jnp.ones(3))


@pytest.mark.parametrize(("options", "bytes_each"), [({}, 8), (LOW, 4)], ids=["float32", "bfloat16"])
def test_bytes_of_state_per_parameter(options, bytes_each):
    state = jax.eval_shape(adabelief(0.1, **options).init, {"a": jnp.ones((8, 16)), "b": jnp.ones(72)})
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((state.mu, state.nu))) == 200 * bytes_each


# Stochastic rounding of one array.


def keys(seed: int, counts: jax.Array, stream: int) -> jax.Array:
    return jax.vmap(lambda count: rounding_bits(seed, count, stream))(counts)


@jax.jit
def rounded(x: jax.Array, counts: jax.Array) -> jax.Array:
    """x as it is stored at each count."""
    return jax.vmap(lambda count: round_to_storage(x, jnp.bfloat16, rounding_bits(0, count, 0)))(counts)


def bits(x: Any) -> np.ndarray:
    return np.asarray(x).view(np.uint16)


def ulp(x: np.ndarray) -> np.ndarray:
    """The distance between the two bfloat16 that x is between."""
    return 2.0 ** (np.maximum(np.frexp(x)[1] - 1, -126) - 7)


@functools.cache
def samples() -> tuple[np.ndarray, np.ndarray]:
    """Numbers of every size and both signs, and the same as they are stored at 2^14 counts."""
    rng = np.random.default_rng(0)
    x = (rng.uniform(1, 2, 60) * 2.0 ** rng.integers(-120, 120, 60) * rng.choice([-1, 1], 60)).astype(np.float32)
    return x.astype(np.float64), np.asarray(rounded(x, jnp.arange(2**14)), np.float64)


def test_rounding_is_without_bias_for_each_element():
    x, found = samples()
    share = np.abs(x) / ulp(x) % 1
    sigma = np.sqrt(share * (1 - share) / len(found))
    np.testing.assert_array_less(np.abs(np.mean(found / ulp(x), axis=0) - x / ulp(x)), SIGMAS * sigma)


def test_rounding_is_without_bias_over_the_elements_of_one_array():
    """Every 1/64 of the way between two bfloat16, 1024 times each."""
    share = np.repeat(np.arange(64) / 64, 1024)
    x = np.random.default_rng(0).permutation(np.float32(1) + share.astype(np.float32) / 128)
    found = np.asarray(rounded(x, jnp.arange(1))[0], np.float64)
    assert abs(np.mean((found - x) * 128)) < SIGMAS * np.sqrt(np.mean(share * (1 - share)) / len(x))


def test_rounding_takes_one_of_the_two_neighbours():
    x, found = samples()
    assert np.all(np.abs(found - x) < ulp(x))
    assert np.all(np.abs(found) % ulp(x) == 0)


def test_rounding_of_the_negative_is_the_negative():
    x, found = samples()
    np.testing.assert_array_equal(np.asarray(rounded(-x.astype(np.float32), jnp.arange(100)), np.float64), -found[:100])


def test_rounding_leaves_every_bfloat16_as_it_is():
    """Zeros of both signs, denormals and infinities among them."""
    every = np.arange(2**16, dtype=np.uint32)
    x = (every << 16).view(np.float32)
    x = x[~np.isnan(x)]
    np.testing.assert_array_equal(bits(rounded(x, jnp.arange(3))), np.tile(x.view(np.uint32) >> 16, (3, 1)))


@pytest.mark.parametrize("pattern", [0x7FC00000, 0xFFC00000], ids=hex)
def test_rounding_leaves_the_nans_of_arithmetic_nan(pattern):
    found = np.asarray(rounded(np.full(64, pattern, np.uint32).view(np.float32), jnp.arange(100)), np.float32)
    assert np.isnan(found).all()


@pytest.mark.parametrize("pattern", [0x7FC00000, 0xFFC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001], ids=hex)
def test_rounding_on_other_platforms_leaves_every_nan_nan(pattern):
    """0x7FFFFFFF is the NaN of NVIDIA's devices."""
    x = np.full(64, pattern, np.uint32).view(np.float32)
    for count in range(20):
        found = np.asarray(_carry_but_for_nan(jnp.asarray(x), rounding_bits(0, jnp.int32(count), 0)), np.float32)
        assert np.isnan(found).all()


def test_rounding_on_other_platforms_is_the_same_for_numbers():
    x, key = jnp.linspace(-3, 3, 1000), rounding_bits(0, jnp.int32(5), 0)
    np.testing.assert_array_equal(_carry_but_for_nan(x, key), round_to_storage(x, jnp.bfloat16, key))


def test_rounding_takes_denormals_to_a_neighbour():
    x = np.random.default_rng(0).integers(1, 2**23, 1000, np.uint32).view(np.float32)
    found = (bits(rounded(x, jnp.arange(100))).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    np.testing.assert_array_less(np.abs(found - x), 2.0**-133)


# The dependences of its random numbers.


def stored(seed: int = 0, count: int = 0, stream: int = 0) -> np.ndarray:
    """Of 4096 numbers half-way between two bfloat16: a bit of each random number."""
    x = jnp.full((64, 64), 1 + 1 / 256, jnp.float32)
    return bits(round_to_storage(x, jnp.bfloat16, rounding_bits(seed, jnp.int32(count), stream)))


@pytest.mark.parametrize("other", [{"seed": 1}, {"count": 1}, {"stream": 1}], ids=str)
def test_rounding_differs_with(other):
    """For about half of the elements."""
    assert 0.2 < np.mean(stored() != stored(**other)) < 0.8


def test_rounding_is_the_same_inside_jit_and_vmap():
    expected = stored(3, 5, 7)
    x = jnp.full((64, 64), 1 + 1 / 256, jnp.float32)

    def inside(x: jax.Array) -> jax.Array:
        return round_to_storage(x, jnp.bfloat16, rounding_bits(jnp.int32(3), jnp.int32(5), 7))

    np.testing.assert_array_equal(bits(jax.jit(inside)(x)), expected)
    np.testing.assert_array_equal(bits(jax.jit(jax.vmap(inside))(jnp.stack([x, x]))), np.stack([expected, expected]))


@functools.cache
def low_optimizer() -> tuple[Any, Any]:
    """One whose arithmetic is exact up to the rounding, and its update compiled: its order cannot matter then."""
    optimizer = adabelief(0.1, b1=0.5, b2=0.5, eps=1e-8, eps_root=0.0, **LOW)
    return optimizer, jax.jit(optimizer.update)


def nine_bits() -> dict[str, jax.Array]:
    """One more than bfloat16 has, for two equal leaves; squares have 18."""
    grads = np.random.default_rng(0).integers(256, 512, (4, 8, 4)) * np.random.default_rng(1).choice([-1, 1], (4, 8, 4))
    return {name: jnp.asarray(grads, jnp.float32) for name in "ab"}


def two_steps(grads: Any) -> Any:
    optimizer, update = low_optimizer()
    _, state = update(grads, optimizer.init(grads), grads)
    return update(grads, state, grads)


SHARDS = [("x",), (None, "x"), (None, None, "x"), ("y", None, "x"), (None, ("y", "x"))]


@pytest.mark.parametrize("spec", SHARDS, ids=str)
def test_rounding_is_the_same_on_four_devices(spec):
    grads = nine_bits()
    mesh = jax.make_mesh((2, 2) if "y" in str(spec) else (4,), ("x", "y")[: 1 + ("y" in str(spec))])
    mesh = jax.sharding.Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * mesh.devices.ndim)
    updates, state = two_steps(jax.device_put(grads, NamedSharding(mesh, PartitionSpec(*spec))))
    assert len(state.nu["a"].sharding.device_set) == 4
    assert state.nu["a"].addressable_shards[0].data.size == 32
    expected, expected_state = two_steps(grads)
    jax.tree.map(np.testing.assert_array_equal, state, expected_state)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), updates, expected)


def test_leaves_and_moments_are_rounded_apart():
    """Three quarters of this number are half-way between two bfloat16; nu is so large that its error adds nothing."""
    number = jnp.full((64, 64), 1 + 1 / 128, jnp.bfloat16)
    optimizer: Any = adabelief(0.1, b1=0.75, b2=0.75, **LOW)
    zeros = {name: jnp.zeros((64, 64)) for name in "ab"}
    before = ScaleByBeliefState(jnp.int32(0), dict.fromkeys("ab", number), dict.fromkeys("ab", number * 2.0**40))
    _, state = jax.jit(optimizer.update)(zeros, before, zeros)
    up = [bits(x) > bits(x).min() for x in jax.tree.leaves((state.mu, state.nu))]
    for x, y in itertools.combinations(up, 2):
        assert 0.2 < np.mean(x != y) < 0.8


# How random they are.


def uniform(key: jax.Array, element: int = 0) -> np.ndarray:
    """The upper 16 bits of an element's random number for each key."""
    return np.asarray(jax.jit(jax.vmap(lambda k: _hash((8, 1 << 10), k).reshape(-1)[element] >> 16))(key))


def chi_squared(*numbers: np.ndarray) -> float:
    """How far the joint distribution of numbers below 2^16, in 256 cells, is from uniform: in standard deviations."""
    width = 256 ** (1 / len(numbers))
    cells = np.zeros(len(numbers[0]), np.int64)
    for x in numbers:
        cells = cells * int(width) + x * int(width) // 2**16
    expected = len(cells) / 256
    statistic = np.sum((np.bincount(cells, minlength=256) - expected) ** 2 / expected)
    return float(abs(statistic - 255) / np.sqrt(2 * 255))


COUNTS = 1 << 17


@functools.cache
def numbers(seed: int = 0, stream: int = 0, element: int = 0) -> np.ndarray:
    """The random numbers of an element in consecutive updates."""
    return uniform(keys(seed, jnp.arange(COUNTS), stream), element)


@pytest.mark.parametrize("element", [0, 1, 1000, 8191])
@pytest.mark.parametrize("stream", [0, 1, 6])
def test_random_numbers_of_an_element_are_uniform(stream, element):
    assert chi_squared(numbers(0, stream, element)) < SIGMAS


def test_low_bits_of_random_numbers_are_uniform():
    assert chi_squared(numbers() % 256 * 256) < SIGMAS


@pytest.mark.parametrize("lag", [1, 2, 3, 10, 1024])
def test_random_numbers_of_different_updates_are_independent(lag):
    assert chi_squared(numbers()[lag:], numbers()[:-lag]) < SIGMAS


@pytest.mark.parametrize(
    "other", [{"stream": 1}, {"stream": 2}, {"stream": 3}, {"seed": 1}, {"seed": 2**31 - 1}], ids=str
)
def test_random_numbers_of_different_arrays_are_independent(other):
    """Stream 1 is the second moment of the leaf whose first moment is stream 0."""
    assert chi_squared(numbers(), numbers(**other)) < SIGMAS


@pytest.mark.parametrize("other", [{"stream": 1}, {"stream": 2}, {"seed": 1}], ids=str)
def test_random_numbers_of_different_arrays_in_different_updates_are_independent(other):
    assert chi_squared(numbers()[1:], numbers(**other)[:-1]) < SIGMAS


@pytest.mark.parametrize("share", ["equal", "random"])
def test_errors_of_an_array_sum_to_no_more_than_those_of_independent_numbers(share):
    """Neighbours' numbers are not independent, but spread more evenly."""
    shares = {"equal": np.full(4096, 0.3), "random": np.random.default_rng(0).uniform(0, 1, 4096)}[share]
    x = (1 + shares / 128).astype(np.float32)
    found = np.asarray(rounded(x, jnp.arange(1000)), np.float64)
    shares = (x.astype(np.float64) - 1) * 128
    errors = np.sum((found - x) * 128, axis=1)
    assert np.mean(errors**2) < 1.1 * np.sum(shares * (1 - shares))


# Training with stored bfloat16 moments.


def test_first_step_is_that_of_float32_moments_but_for_one_rounding():
    grads = np.random.default_rng(0).standard_normal((1, 500)).astype(np.float32)
    updates, state = walk({"ours": adabelief(1.0, **LOW)}, jnp.zeros(500), grads)["ours"]
    m, s = state.mu[0].astype(np.float64), state.nu[0].astype(np.float64)
    np.testing.assert_array_less(np.abs(m - 0.1 * grads[0]), 1.001 * ulp(m))
    expected = 0.001 * (grads[0] - m) ** 2
    np.testing.assert_array_less(np.abs(s - expected), 1.001 * ulp(expected))
    # The update is made of the stored moments.
    np.testing.assert_allclose(updates[0], -(m / 0.1) / np.sqrt(s / 0.001), rtol=1e-5)


def test_bfloat16_moments_do_not_depend_on_the_dtype_of_the_parameters():
    """Nothing of the arithmetic is in bfloat16, not even when everything that it works on is."""
    grads = jnp.asarray(np.random.default_rng(0).standard_normal((20, 500)), jnp.bfloat16)
    optimizers = {"ours": adabelief(1.0, weight_decay=0.1, **LOW)}
    _, low = walk(optimizers, grads[0], grads)["ours"]
    _, full = walk(optimizers, grads[0].astype(jnp.float32), grads.astype(jnp.float32))["ours"]
    for found, expected in ((low.mu, full.mu), (low.nu, full.nu)):
        assert np.mean(found != expected) < 0.01


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decay_of_the_second_moment_survives_in_bfloat16(dtype):
    """It changes by a thousandth at a time, a quarter of the distance between two bfloat16."""
    grads = jnp.zeros((1200, 256), dtype).at[:10].set(1.0)
    optimizers = {"rounded": scale_by_belief(**LOW), "nearest": nearest(scale_by_belief())}
    found = {
        name: state.nu[[199, -1]].astype(np.float64) for name, (_, state) in walk(optimizers, grads[0], grads).items()
    }
    # Each step adds an error of at most half a distance, 2^-8 of the value: 0.09 in a thousand steps.
    assert abs(np.mean(found["rounded"][1] / found["rounded"][0]) / 0.999**1000 - 1) < SIGMAS * 0.09 / np.sqrt(256)
    np.testing.assert_array_equal(*found["nearest"])


def nearest(optimizer: Any) -> optax.GradientTransformation:
    """Ours, with moments rounded to the nearest bfloat16 after each update."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = optimizer.update(updates, state, params)
        mu, nu = jax.tree.map(lambda x: jax.lax.reduce_precision(x, 8, 7), (state.mu, state.nu))
        return updates, state._replace(mu=mu, nu=nu)

    return optax.GradientTransformation(optimizer.init, update)


def mean_squared_error(params: Any, x: Any, y: Any) -> jax.Array:
    return jnp.mean((jnp.tanh(x @ params["first"] + params["bias"]) @ params["second"] - y) ** 2)


@functools.cache
def final_losses() -> dict[str, float]:
    """Of a small network after 3,000 steps from the same start with the same batches."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((256, 8)).astype(np.float32)
    target = np.tanh(x @ rng.standard_normal((8, 16)) / 2) @ rng.standard_normal(16) / 2
    y = (target + 0.3 * rng.standard_normal(256)).astype(np.float32)
    start = {"first": rng.standard_normal((8, 32)) / 3, "bias": np.zeros(32), "second": rng.standard_normal(32) / 6}
    start = jax.tree.map(np.float32, start)
    batches = rng.integers(0, 256, (3000, 16))
    rate = optax.cosine_decay_schedule(1e-3, 3000)
    optimizers = {"float32": adabelief(rate), "rounded": adabelief(rate, **LOW), "nearest": nearest(adabelief(rate))}

    def step(carry: Any, batch: Any) -> tuple[Any, None]:
        for name, (params, state) in carry.items():
            grads = jax.grad(mean_squared_error)(params, *batch)
            updates, state = optimizers[name].update(grads, state, params)
            carry[name] = optax.apply_updates(params, updates), state
        return carry, None

    carry = {name: (start, optimizer.init(start)) for name, optimizer in optimizers.items()}
    carry, _ = jax.jit(lambda carry, batches: jax.lax.scan(step, carry, batches))(carry, (x[batches], y[batches]))
    return {name: float(mean_squared_error(params, x, y)) for name, (params, _) in carry.items()}


def test_bfloat16_moments_train_like_float32():
    losses = final_losses()
    assert abs(losses["rounded"] / losses["float32"] - 1) < 0.01


def test_moments_rounded_to_nearest_train_worse():
    losses = final_losses()
    assert losses["nearest"] / losses["float32"] - 1 > 0.03


def test_derivatives_go_through_bfloat16_moments():
    """As through those of float32, to the precision of bfloat16: a derivative of the rounding itself would be 0."""
    grads = jnp.asarray(np.random.default_rng(0).standard_normal((3, 20)), jnp.float32)

    def loss(scale: jax.Array, options: Any) -> jax.Array:
        optimizer: Any = scale_by_belief(**options)
        total, state = jnp.zeros(20), optimizer.init(grads[0])
        for i in range(3):
            update, state = optimizer.update(grads[i] + scale, state)
            total = total + update
        return jnp.sum(total**2)

    low, full = jax.jit(lambda scale: [jax.grad(loss)(scale, options) for options in (LOW, {})])(jnp.zeros(20))
    np.testing.assert_allclose(low, full, rtol=0.1, atol=0.02 * np.max(np.abs(full)))
    assert np.all(low != 0)


@pytest.mark.parametrize(("dtype", "places"), [("float32", 2), ("bfloat16", 1), ("float64", 2)])
@pytest.mark.parametrize("weight", [1.0, 3.0, 1024.0, 999_999.0, 1e-3])
def test_sums_over_a_weight_are_quotients_to_the_last_places(dtype, places, weight):
    """Also a bfloat16 sum is divided by the weight itself, and not by the weight in bfloat16."""
    with jax.enable_x64(dtype == "float64"):
        sums = jnp.asarray(np.random.default_rng(0).normal(size=1000) * 1e3, dtype)
        kept = jnp.asarray(weight, jnp.float32)
        found = np.asarray(divide({"a": sums}, kept)["a"])
        assert found.dtype == dtype
        exact = np.asarray(sums).astype(np.float64) / float(np.float32(weight))
        unit = float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(found.astype(np.float64), exact, rtol=places * unit, atol=0)


def test_sums_over_a_power_of_two_are_exact_and_a_sum_of_zero_stays_zero():
    sums = jnp.asarray([1.0, 1 / 3, -2e30, 0.0, -0.0], jnp.float32)
    np.testing.assert_array_equal(divide(sums, jnp.float32(64)), np.asarray(sums) / 64)
    tiny = jnp.float32(np.finfo(np.float32).tiny)  # the weight of a batch in which every example is masked
    np.testing.assert_array_equal(divide(sums[3:], tiny), [0.0, -0.0])
