"""Image models compute in bfloat16 and train in float32."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.image_classification import ImageClassification

IMAGES = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 1), np.uint8)
BATCH = {"image": jnp.asarray(IMAGES), "label": jnp.arange(8) % 3, "mask": jnp.ones(8)}


def measured(**settings: Any) -> tuple[Any, Any, Any]:
    """Variables, the gradient, and the result of the loss."""
    task = ImageClassification(classes=3, widths=(4,), **settings)
    variables = jax.jit(task.init)(jax.random.key(0), BATCH)

    def loss(params: Any) -> Any:
        values = {**variables, "params": params}
        result = task.loss(values, BATCH, key=jax.random.key(0), train=True)
        return result[0]["loss"].total, result

    gradient, result = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    return variables, gradient, result


@pytest.mark.parametrize(
    "settings", [{"model": "mlp"}, {"batch_norm": True, "hidden": 5}], ids=["mlp", "cnn with batch_norm"]
)
def test_bfloat16_leaves_variables_gradients_and_metrics_in_float32_and_close_to_those_of_float32(settings):
    exact, half = measured(**settings), measured(**settings, dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(half)} == {np.dtype("float32")}
    jax.tree.map(np.testing.assert_array_equal, half[0], exact[0])
    actual, expected = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (half[1], exact[1]))
    # Bfloat16 has 8 bits of precision, 0.4 %; a few such errors add up.
    assert 0.001 < np.linalg.norm(actual - expected) / np.linalg.norm(expected) < 0.05
