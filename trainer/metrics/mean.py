"""The protocol of a metric, and the mean."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Num

_Numbers = Num[Array, "..."] | Bool[Array, "..."]


@runtime_checkable
class Metric(Protocol):
    """A pytree of arrays that are added over any parts of the data, and what is computed from the sums.

    Microbatches and replicas are added on the devices, in the dtype of the arrays; the batches of an evaluation on the
    host, in float64 or int64.
    """

    def compute(self) -> float | Mapping[str, float]:
        """The number, or several by name, NaN where nothing was counted. The arrays are on the host or a device."""
        ...


Metrics = Mapping[str, Any]  # metrics by name; "loss", if there is one, is a `Mean`


def check_shapes(name: str, values: Any, weights: Any) -> None:
    """Raises `ValueError` if values and weights differ in shape; broadcasting would hide a mistake."""
    if values.shape != weights.shape:
        raise ValueError(f"{name}.of needs values and weights of one shape, not {values.shape} and {weights.shape}")


class Mean(NamedTuple):
    """A mean before its division: two sums that can be added over any parts of the data without bias.

    Attributes:
      total: scalar sum of the weighted values.
      weight: scalar sum of the weights, 0 or more.
    """

    total: Float[Array, ""]
    weight: Float[Array, ""]

    @classmethod
    def of(cls, values: _Numbers, weights: _Numbers) -> "Mean":
        """The mean of `values` under `weights` of the same shape, summed in float32 or wider."""
        check_shapes("Mean", values, weights)
        dtype = jnp.promote_types(values.dtype, jnp.float32)
        weights = weights.astype(dtype)
        # A masked example may hold anything, so its value is replaced and not multiplied: 0·inf would be NaN.
        values = jnp.where(weights == 0, 0, values.astype(dtype))
        return cls(jnp.sum(values * weights), jnp.sum(weights))

    @classmethod
    def single(cls, value: object) -> "Mean":
        """A number that is computed once for the whole batch, such as a learning rate, in float32."""
        return cls(jnp.asarray(value, jnp.float32), jnp.ones((), jnp.float32))

    def compute(self) -> float:
        """The one division; NaN when nothing was counted. Waits for the device."""
        total, weight = float(np.asarray(self.total)), float(np.asarray(self.weight))
        return total / weight if weight else float("nan")
