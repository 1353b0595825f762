"""AdaBelief as one of Optax's transformations: whatever Optax does with its own can be done with ours."""

import doctest
import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import trainer.optim.adabelief
from tests.optim.reference import reference, run
from trainer.optim.adabelief import adabelief, scale_by_belief
from trainer.optim.fused import ScaleByBeliefState

STEPS = 6
RATE, DECAY = 0.1, 0.2
LOW: dict[str, Any] = {"mu_dtype": "bfloat16", "nu_dtype": "bfloat16"}


def is_shape(x: Any) -> bool:
    return isinstance(x, tuple)


def problem() -> tuple[Any, Any]:
    """Parameters, and the gradients of some steps."""
    rng = np.random.default_rng(0)
    shapes = {"dense": {"kernel": (2, 3), "bias": (3,)}, "scale": ()}

    def make(*first: int) -> Any:
        return jax.tree.map(lambda shape: rng.standard_normal(first + shape, np.float32), shapes, is_leaf=is_shape)

    return make(), make(STEPS)


def at(tree: Any, i: int) -> Any:
    """One step's, or one problem's."""
    return jax.tree.map(lambda x: jnp.asarray(x[i]), tree)


def table(values: list[float]) -> optax.Schedule:
    return lambda count: jnp.asarray(values)[count]


RATES, DECAYS = [0.3, 0.1, 0.0, 0.2, 0.5, 0.4], [0.1, 0.5, 0.2, 0.0, 0.3, 0.4]
MASKS: dict[str, Any] = {
    "tree": {"dense": {"kernel": True, "bias": True}, "scale": False},
    "prefix": {"dense": True, "scale": False},
    "callable": lambda params: jax.tree.map(lambda p: p.ndim > 0, params),
}
DECAYING: dict[str, Any] = {"weight_decay": DECAY}


def injected(learning_rate: Any, **options: Any) -> optax.GradientTransformation:
    return optax.inject_hyperparams(adabelief, static_args="weight_decay_mask")(learning_rate, **options)


OPTIMIZERS: dict[str, Any] = {
    "plain": adabelief(RATE),
    "decaying": adabelief(RATE, **DECAYING),
    "rate array": adabelief(jnp.asarray(np.array(RATE))),
    "rate constant": adabelief(lambda _: RATE),
    "rates": adabelief(table(RATES)),
    "decay array": adabelief(RATE, weight_decay=jnp.asarray(np.array(DECAY))),
    "decay constant": adabelief(RATE, weight_decay=lambda _: DECAY),
    "decays": adabelief(RATE, weight_decay=table(DECAYS)),
    "decays, fixed": adabelief(RATE, weight_decay=table(DECAYS), decay="fixed"),
    "parts": optax.chain(scale_by_belief(), optax.scale_by_learning_rate(RATE)),
    "decaying parts": optax.chain(
        scale_by_belief(), optax.add_decayed_weights(DECAY), optax.scale_by_learning_rate(RATE)
    ),
    "optax": optax.adabelief(RATE),
    "optax, rates": optax.adabelief(table(RATES)),
    "clipped": optax.chain(optax.clip_by_global_norm(1e9), adabelief(RATE), optax.identity()),
    "injected": injected(RATE, **DECAYING),
    "injected rates": injected(table(RATES)),
    "injected decays": injected(RATE, weight_decay=table(DECAYS)),
    "injected b2": injected(RATE, b2=table([0.999] * STEPS)),
    "masked": optax.masked(adabelief(RATE, **DECAYING), MASKS["tree"]),
    "groups": optax.multi_transform(
        {"first": adabelief(RATE, **DECAYING), "second": adabelief(table(RATES))}, {"dense": "first", "scale": "second"}
    ),
}
OPTIMIZERS |= {f"mask: {name}": adabelief(RATE, **DECAYING, weight_decay_mask=m) for name, m in MASKS.items()}
OPTIMIZERS |= {f"injected mask: {name}": injected(RATE, **DECAYING, weight_decay_mask=m) for name, m in MASKS.items()}
OPTIMIZERS |= {
    f"masked, mask: {name}": optax.masked(
        adabelief(RATE, **DECAYING, weight_decay_mask=m), {"dense": True, "scale": False}
    )
    for name, m in MASKS.items()
}


@functools.cache
def found() -> dict[str, tuple[Any, Any]]:
    """The parameters and the updates of every step of all of them, which compile together."""
    return run(OPTIMIZERS, *problem())


def updates(name: str) -> Any:
    return found()[name][1]


def before(name: str) -> Any:
    """The parameters before each step."""
    return jax.tree.map(lambda first, p: np.concatenate([first[None], p[:-1]]), problem()[0], found()[name][0])


def close(actual: Any, expected: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=rtol, atol=atol), actual, expected)


def times(factors: list[float], tree: Any) -> Any:
    """Each step's values times that step's factor."""
    return jax.tree.map(lambda x: np.reshape(factors, (-1,) + (1,) * (x.ndim - 1)) * x, tree)


# Signature and documentation.


def test_annotations_are_those_of_optax():
    """The objects, not their names: libraries that turn a signature into a command line look at them."""
    parameters = inspect.signature(adabelief).parameters
    assert parameters["learning_rate"].annotation is optax.ScalarOrSchedule
    assert parameters["weight_decay"].annotation == optax.ScalarOrSchedule | None
    assert not any(isinstance(p.annotation, str) for p in parameters.values())


@pytest.mark.parametrize(("ours", "theirs"), [(adabelief, optax.adabelief), (scale_by_belief, optax.scale_by_belief)])
def test_arguments_of_optax_have_their_place_and_value(ours, theirs):
    arguments = list(inspect.signature(theirs).parameters.values())
    mine = inspect.signature(ours).parameters
    assert {p.name: (mine[p.name].kind, mine[p.name].default) for p in arguments} == {
        p.name: (p.kind, p.default) for p in arguments
    }
    positions = [p.name for p in arguments if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert list(mine)[: len(positions)] == positions


def test_docstring_shows_what_happens():
    results = doctest.testmod(trainer.optim.adabelief)
    assert results.attempted
    assert not results.failed


@pytest.mark.parametrize("name", ["rates", "decaying parts", "clipped"])
def test_optax_finds_the_state(name):
    params, _ = problem()
    state = OPTIMIZERS[name].init(params)
    assert jax.tree.structure(optax.tree.get(state, "mu")) == jax.tree.structure(params)
    assert jax.tree.structure(optax.tree.get(state, "nu")) == jax.tree.structure(params)
    assert int(optax.tree.get(state, "count")) == 0


def test_schedules_share_the_count_of_the_moments():
    """With Optax a schedule brings one of its own, and then there is no one count to be found."""
    params, _ = problem()
    with pytest.raises(KeyError, match="count"):
        optax.tree.get(OPTIMIZERS["optax, rates"].init(params), "count")
    state = adabelief(table(RATES), weight_decay=table(DECAYS)).init(params)
    assert int(optax.tree.get(state, "count")) == 0


# Numbers, arrays and schedules.


@pytest.mark.parametrize("kind", ["array", "constant"])
@pytest.mark.parametrize(("name", "plain"), [("rate", "plain"), ("decay", "decaying")])
def test_array_and_schedule_of_one_value_are_that_number(name, plain, kind):
    close(updates(f"{name} {kind}"), updates(plain), 1e-6)


def test_schedule_of_the_rate_sees_the_count_before_the_update():
    close(updates("rates"), times([rate / RATE for rate in RATES], updates("plain")))


def test_schedule_of_the_rate_is_as_with_optax():
    close(updates("rates"), updates("optax, rates"), 1e-4)


@pytest.mark.parametrize(("name", "factor"), [("decays", -RATE), ("decays, fixed", -1.0)])
def test_schedule_of_the_decay_sees_the_count_before_the_update(name, factor):
    decayed = times([factor * decay for decay in DECAYS], before(name))
    close(updates(name), jax.tree.map(np.add, updates("plain"), decayed))


def test_scaling_and_rate_are_the_whole():
    close(updates("parts"), updates("plain"), 1e-6)


def test_scaling_decay_and_rate_are_the_whole():
    close(updates("decaying parts"), updates("decaying"), 1e-6)


# Inside Optax's transformations.


def test_chain_hands_it_gradients_and_hands_on_updates():
    close(updates("clipped"), updates("plain"), 1e-6)


@pytest.mark.parametrize(
    ("name", "plain"),
    [("injected", "decaying"), ("injected rates", "rates"), ("injected decays", "decays"), ("injected b2", "plain")],
)
def test_injected_hyperparameters_are_used(name, plain):
    close(updates(name), updates(plain))


def test_injected_rate_can_be_changed():
    params, grads = problem()
    optimizer: Any = injected(RATE)
    state = optimizer.init(params)
    changed = state._replace(hyperparams=state.hyperparams | {"learning_rate": jnp.float32(2 * RATE)})
    first, second = jax.jit(lambda *states: [optimizer.update(at(grads, 0), s, params)[0] for s in states])(
        state, changed
    )
    close(second, jax.tree.map(lambda u: 2 * u, first))


@pytest.mark.parametrize("mask", MASKS)
def test_mask_of_any_form_can_be_injected(mask):
    close(updates(f"injected mask: {mask}"), updates(f"mask: {mask}"))


@pytest.mark.parametrize("mask", MASKS)
def test_mask_says_what_decays(mask):
    assert jax.tree.all(jax.tree.map(np.array_equal, updates(f"mask: {mask}")["scale"], updates("plain")["scale"]))
    close(updates(f"mask: {mask}")["dense"], updates("decaying")["dense"], 1e-6)


@pytest.mark.parametrize("name", ["masked", *(f"masked, mask: {mask}" for mask in MASKS)])
def test_masked_leaves_are_passed_through(name):
    np.testing.assert_array_equal(updates(name)["scale"], problem()[1]["scale"])
    close(updates(name)["dense"], updates("decaying")["dense"], 1e-6)


def test_masked_leaves_have_no_moments():
    state: Any = OPTIMIZERS["masked"].init(problem()[0])
    assert isinstance(state.inner_state.mu["scale"], optax.MaskedNode)
    assert isinstance(state.inner_state.nu["scale"], optax.MaskedNode)


def test_groups_are_each_treated_as_alone():
    close(updates("groups")["dense"], updates("decaying")["dense"], 1e-6)
    close(updates("groups")["scale"], updates("rates")["scale"], 1e-6)


@pytest.mark.parametrize("options", [{}, LOW], ids=["float32", "bfloat16"])
def test_two_accumulated_gradients_are_their_mean(options):
    params, grads = problem()
    optimizer = adabelief(RATE, **DECAYING, **options)
    pairs = jax.tree.map(lambda g: g.reshape(STEPS // 2, 2, *g.shape[1:]).mean(1), grads)
    _, expected = run({"alone": optimizer}, params, pairs)["alone"]
    several = optax.MultiSteps(optimizer, 2).gradient_transformation()
    _, accumulated = run({"several": several}, params, grads)["several"]
    rounding = 0.02 if options else 1e-4
    close(jax.tree.map(lambda u: u[1::2], accumulated), expected, rounding, rounding * RATE)
    assert not any(np.any(u[::2]) for u in jax.tree.leaves(accumulated))


@pytest.mark.parametrize("mask", [None, *MASKS])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_optax_tells_parameters_of_the_state_from_the_rest(mask, amsgrad):
    """As code that shards a state does."""
    params, _ = problem()
    optimizer: Any = adabelief(RATE, **DECAYING, weight_decay_mask=MASKS.get(mask), amsgrad=amsgrad)
    kinds: Any = optax.tree_map_params(
        optimizer, lambda _: "moment", optimizer.init(params), transform_non_params=lambda _: "other"
    )
    moments = jax.tree.map(lambda _: "moment", params)
    assert isinstance(kinds, ScaleByBeliefState)
    assert tuple(kinds) == ("other", moments, moments, moments if amsgrad else None)


# Under JAX's transformations.


@functools.cache
def steps(options: tuple[tuple[str, Any], ...] = ()) -> Any:
    """Two updates in a row as a function of parameters and gradients."""
    optimizer: Any = adabelief(RATE, **DECAYING, **dict(options))

    def both(params: Any, grads: Any) -> Any:
        state = optimizer.init(params)
        for i in range(2):
            found, state = optimizer.update(at(grads, i), state, params)
        return found, state

    return both


def test_shapes_are_known_without_computing():
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), jax.eval_shape(steps(), *problem()))
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), jax.jit(steps())(*problem()))


def test_compiled_updates_are_those_of_single_operations():
    arguments = jax.tree.map(jnp.asarray, problem())
    close(jax.jit(steps())(*arguments), steps()(*arguments), 1e-6)


def test_scanned_updates_are_those_of_a_loop():
    start, _ = problem()
    optimizer: Any = OPTIMIZERS["plain"]
    update, state = jax.jit(optimizer.update), optimizer.init(start)
    for i in range(STEPS):
        one, state = update(at(problem()[1], i), state, start)
        close(one, at(updates("plain"), i), 1e-5)


@pytest.mark.parametrize("options", [{}, LOW], ids=["float32", "bfloat16"])
def test_vectorized_updates_are_those_of_each_alone(options):
    both = steps(tuple(options.items()))
    several = jax.tree.map(lambda x: jnp.stack([x, -2 * x, 0.5 * x]), problem())
    together, compiled = jax.jit(jax.vmap(both))(*several), jax.jit(both)
    rounding = 0.02 if options else 1e-5
    for i in range(3):
        close(at(together, i), compiled(*at(several, i)), rounding, rounding * RATE)


def trained(make: Any, **options: Any) -> Any:
    """The objective after six steps of an optimizer, as a function of the start and its hyperparameters.

    Rectification divides from the sixth on.
    """

    def objective(params: jax.Array, hyperparameters: dict[str, Any]) -> jax.Array:
        optimizer = make(**hyperparameters, **options)

        def step(carry: Any, _: None) -> tuple[Any, None]:
            params, state = carry
            found, state = optimizer.update(jax.grad(f)(params), state, params)
            return (params + found, state), None

        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=6)
        return f(params)

    return objective


def f(x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.arange(1.0, 4.0) * x**2) + jnp.prod(x)


def hyperparameters() -> dict[str, Any]:
    numbers = {"learning_rate": 0.1, "b1": 0.8, "b2": 0.9, "eps": 1e-3, "eps_root": 1e-3}
    return {name: jnp.asarray(np.array(number)) for name, number in numbers.items()}


@pytest.mark.parametrize(
    "options",
    [{"nesterov": True}, {"rectify": True, "decay": "coupled"}, {"amsgrad": True, "decay": "fixed"}],
    ids=lambda options: next(iter(options)),
)
def test_derivatives_are_those_of_finite_differences(options):
    with jax.enable_x64(True):
        point, unravel = ravel_pytree((jnp.array([1.0, -0.5, 0.7]), hyperparameters()))
        steps = 1e-5 * jnp.eye(point.size)

        def objective(x: jax.Array) -> jax.Array:
            return trained(adabelief, weight_decay=0.1, **options)(*unravel(x))

        def values(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            return jax.vmap(objective)(x + steps), jax.vmap(objective)(x - steps), jax.grad(objective)(x)

        above, below, gradient = (np.asarray(value) for value in jax.jit(values)(point))
    np.testing.assert_allclose(gradient, (above - below) / 2e-5, rtol=1e-5)
    assert np.all(gradient != 0)


def test_derivatives_are_those_of_optax():
    with jax.enable_x64(True):
        arguments = jnp.array([1.0, -0.5, 0.7]), hyperparameters()
        both = [jax.jit(jax.grad(trained(make), argnums=(0, 1)))(*arguments) for make in (adabelief, optax.adabelief)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), *both)


# Arguments of update.


def test_other_keyword_arguments_are_accepted():
    params, _ = problem()
    for optimizer in (adabelief(RATE), scale_by_belief(), optax.chain(adabelief(RATE), scale_by_belief())):
        update: Any = functools.partial(optimizer.update, value=1.0, value_fn=f)
        found, _ = jax.eval_shape(update, params, optimizer.init(params), params)
        assert jax.tree.structure(found) == jax.tree.structure(params)


@pytest.mark.parametrize(
    "options",
    [{}, {"weight_decay_mask": True}, {"weight_decay": 0.1, "weight_decay_mask": False}],
    ids=["none", "mask alone", "all masked"],
)
def test_parameters_are_not_needed_without_decay(options):
    params, grads = problem()
    optimizer: Any = adabelief(RATE, **options)
    found, _ = jax.jit(lambda: optimizer.update(at(grads, 0), optimizer.init(params)))()
    close(found, at(updates("plain"), 0), 1e-6)


@pytest.mark.parametrize("decay", ["decoupled", "coupled", "fixed"])
def test_parameters_are_asked_for_with_decay(decay):
    params, _ = problem()
    optimizer: Any = adabelief(RATE, **DECAYING, decay=decay)
    with pytest.raises(ValueError, match="params"):
        optimizer.update(params, optimizer.init(params))


def test_updates_without_parameters_have_the_dtype_of_the_gradients():
    optimizer: Any = adabelief(RATE)
    params = jnp.ones(3)
    assert jax.eval_shape(optimizer.update, params.astype(jnp.bfloat16), optimizer.init(params))[0].dtype == "bfloat16"


@pytest.mark.parametrize("mask", [None, {"a": True, "none": None}, {"a": True, "none": True}, lambda params: True])
def test_none_is_passed_through_like_any_empty_tree(mask):
    params = {"a": jnp.ones(3), "none": None}
    optimizer: Any = adabelief(RATE, **DECAYING, weight_decay_mask=mask)
    found, state = optimizer.update(params, optimizer.init(params), params)
    assert found["none"] is state.mu["none"] is state.nu["none"] is None
    np.testing.assert_allclose(found["a"], np.full(3, -RATE / 0.9 - RATE * DECAY), rtol=1e-5)


def test_masked_nodes_are_passed_through():
    params = {"a": jnp.ones(3), "masked": optax.MaskedNode()}
    optimizer: Any = adabelief(RATE, **DECAYING, weight_decay_mask={"a": True, "masked": False})
    found, state = optimizer.update(params, optimizer.init(params), params)
    assert found["masked"] == state.mu["masked"] == state.nu["masked"] == optax.MaskedNode()
    np.testing.assert_allclose(found["a"], np.full(3, -RATE / 0.9 - RATE * DECAY), rtol=1e-5)


# Complex parameters.


@functools.cache
def complex_paths() -> tuple[Any, Any, dict[str, Any]]:
    rng = np.random.default_rng(0)
    params, grads = (rng.standard_normal((*first, 4, 2)) @ [1, 1j] for first in ((), (20,)))
    with jax.enable_x64(True):
        return params, grads, run({"ours": adabelief(RATE), "optax": optax.adabelief(RATE)}, params, grads)


def test_complex_parameters_follow_the_formulas():
    params, grads, paths = complex_paths()
    np.testing.assert_allclose(paths["ours"][0], reference(params, grads, RATE), rtol=1e-12, atol=0)


def test_complex_parameters_are_as_with_optax():
    paths = complex_paths()[2]
    np.testing.assert_allclose(paths["ours"][0], paths["optax"][0], rtol=1e-12, atol=0)


def test_second_moment_of_complex_parameters_is_real():
    params = jnp.ones(3, jnp.complex64)
    optimizer: Any = adabelief(RATE, amsgrad=True)
    found, state = jax.eval_shape(lambda: optimizer.update(params, optimizer.init(params), params))
    assert [x.dtype for x in (found, state.mu)] == ["complex64", "complex64"]
    assert [x.dtype for x in (state.nu, state.nu_max)] == ["float32", "float32"]
