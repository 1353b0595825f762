"""Remat policies change which activations the backward pass recomputes, and nothing else."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.remat import POLICIES, remat
from trainer.errors import UserError

LAYERS = 2
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 5)), jnp.float32)


class Layer(nn.Module):
    """A product with a kernel, products within the batch, and operations that XLA recomputes for free."""

    @nn.compact
    def __call__(self, x: Any, _: None) -> tuple[Any, None]:
        y = nn.tanh(nn.Dense(5, name="dense")(x))
        return x + nn.tanh(jnp.einsum("bij,bkj->bik", y, y) @ y), None


class Stack(nn.Module):
    """Layers under a remat policy, in a loop or under `nn.scan`."""

    policy: str
    scanned: bool

    @nn.compact
    def __call__(self, x: Any) -> Any:
        layer = remat(Layer, self.policy, scanned=self.scanned)
        if self.scanned:
            layers = nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
            return layers(name="layers")(x, None)[0]
        for i in range(LAYERS):
            x, _ = layer(name=f"layer_{i}")(x, None)
        return x


@functools.cache
def gradient_and_params(policy: str, scanned: bool) -> tuple[Any, Any]:
    """The gradient as a function, and the parameters."""
    stack = Stack(policy, scanned)
    params = jax.jit(stack.init)(jax.random.key(0), X)

    def loss(params: Any) -> Any:
        result: Any = stack.apply(params, X)
        return jnp.sum(result**2)

    return jax.grad(loss), params


@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "none"])
def test_a_policy_changes_neither_parameters_nor_gradients(policy, scanned):
    plain, expected = gradient_and_params("none", scanned)
    gradient, params = gradient_and_params(policy, scanned)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    actual, expected_gradient = jax.jit(gradient)(params), jax.jit(plain)(params)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected_gradient), strict=True):
        assert np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(b)


def products(policy: str) -> int:
    """The number of matrix products in the gradient."""
    gradient, params = gradient_and_params(policy, scanned=False)
    return str(jax.make_jaxpr(gradient)(params)).count("dot_general[")


def test_policies_compute_ever_more_products_again():
    # A layer's forward pass has three products: one with parameters, two within the batch. No gradient needs the last
    # product of the last layer.
    assert products("dots") == products("none")
    assert products("none") < products("dots_no_batch") < products("full")
    assert products("full") - products("dots_no_batch") == LAYERS


@pytest.mark.parametrize(("scanned", "barriers"), [(False, True), (True, False)])
def test_only_outside_of_a_scan_does_recomputation_need_barriers(scanned, barriers):
    gradient, params = gradient_and_params("full", scanned)
    text = str(jax.make_jaxpr(gradient)(params))
    assert (f"prevent_cse={barriers}" in text, f"prevent_cse={not barriers}" in text) == (True, False)


def test_an_unknown_policy_is_refused_with_the_nearest_name():
    with pytest.raises(UserError, match="no remat policy 'dot'; did you mean 'dots'") as refusal:
        remat(Layer, "dot")
    assert "\n" not in str(refusal.value)
