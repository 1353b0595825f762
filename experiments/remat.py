"""Rematerialisation by name: what the backward pass of a Linen module keeps, and what it computes again."""

import flax.linen as nn
import jax

from trainer.errors import UserError, nearest

POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
"""From the most memory to the least. `none` keeps all that gradients need; `dots` the results of matrix products;
`dots_no_batch` those of products with parameters, so that of attention nothing is kept; `full` only the inputs."""


def remat(module: type[nn.Module], policy: str, *, scanned: bool = False) -> type[nn.Module]:
    """The module class with its calls rematerialised; parameters, their paths and results stay what they are.

    Args:
      module: a class whose `__call__` takes arrays only.
      policy: a name in POLICIES; `none` gives `module` itself.
      scanned: whether `nn.scan` goes over the class. Its loop keeps XLA from merging the second computation with the
        first by itself; anywhere else that takes barriers, which cost a little.

    Raises:
      UserError: there is no such policy.
    """
    if policy not in POLICIES:
        raise UserError(f"no remat policy {policy!r}{nearest(policy, POLICIES)}")
    return module if policy == "none" else nn.remat(module, prevent_cse=not scanned, policy=POLICIES[policy])
