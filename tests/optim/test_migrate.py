"""A run of Optax's AdaBelief goes on here as if nothing had happened."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from trainer.optim.adabelief import adabelief, scale_by_belief
from trainer.optim.migrate import from_optax


def walk(optimizer: Any, params: Any, state: Any, grads: np.ndarray) -> tuple[Any, Any]:
    tree: Any = params
    for g in grads:
        updates, state = optimizer.update({"w": jnp.asarray(g)}, state, tree)
        tree = optax.apply_updates(tree, updates)
    return tree, state


def schedule(count: Any) -> Any:
    return 0.01 / (1.0 + 0.1 * count)


GRADS = 1 + 0.5 * np.random.default_rng(0).normal(size=(40, 5))
WRAPPED = {
    "alone": lambda rate: optax.adabelief(rate),
    "in a chain": lambda rate: optax.chain(optax.clip_by_global_norm(1e9), optax.adabelief(rate)),
    "with injected hyper-parameters": lambda rate: optax.inject_hyperparams(optax.adabelief)(rate),
}


@pytest.mark.parametrize("theirs", WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize("rate", [0.01, schedule], ids=["constant", "scheduled"])
def test_run_goes_on_as_in_optax(theirs, rate):
    with jax.enable_x64(True):
        start = {"w": jnp.zeros(5)}
        other = theirs(rate)
        expected, _ = walk(other, start, other.init(start), GRADS)
        middle, state = walk(other, start, other.init(start), GRADS[:20])
        ours: Any = adabelief(rate)
        found, after = walk(ours, middle, from_optax(state, ours.init(middle)), GRADS[20:])
        forgetful, _ = walk(ours, middle, ours.init(middle), GRADS[20:])
    np.testing.assert_allclose(found["w"], expected["w"], rtol=1e-12)
    assert int(after.count) == 40
    assert np.abs(np.asarray(forgetful["w"] - expected["w"])).max() > 1e-3


def test_moments_get_the_dtypes_that_are_asked_for():
    params = {"w": jnp.ones(5, jnp.bfloat16)}
    other = optax.scale_by_belief()
    _, state = other.update(params, other.init(params), params)
    like: Any = scale_by_belief().init(params)
    kept, cast = from_optax(state), from_optax(state, like)
    assert (kept.mu["w"].dtype, cast.mu["w"].dtype, cast.nu["w"].dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    np.testing.assert_array_equal(cast.mu["w"], kept.mu["w"])


@pytest.mark.parametrize(
    ("state", "like", "message"),
    [
        (optax.adam(1e-3).init({"w": jnp.ones(5)}), None, "there are 0 states of optax.scale_by_belief"),
        ((optax.adabelief(1e-3).init(1.0),) * 2, None, "there are 2 states of optax.scale_by_belief"),
        (
            optax.adabelief(1e-3).init({"w": jnp.ones(5)}),
            adabelief(1e-3).init({"w": jnp.ones(4)}),
            r"mu/w has shape \(5,\); \(4,\) is expected",
        ),
        (optax.adabelief(1e-3).init({"v": jnp.ones(5)}), adabelief(1e-3).init({"w": jnp.ones(5)}), "other parameters"),
        (
            optax.adabelief(1e-3).init({"w": jnp.ones(5)}),
            adabelief(1e-3, amsgrad=True).init({"w": jnp.ones(5)}),
            "amsgrad needs the largest second moment",
        ),
    ],
)
def test_what_cannot_be_carried_over_is_refused(state, like, message):
    with pytest.raises(ValueError, match=message):
        from_optax(state, like)
