"""Rematerialisation policies by name: the activations of a Linen module that the backward pass keeps."""

import flax.linen as nn
import jax

from trainer.errors import UserError, did_you_mean

POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
"""From the most memory to the least. `none` keeps every activation that gradients need. `dots` keeps the results of
matrix products. `dots_no_batch` keeps the results of products with parameters, so no attention weights. `full` keeps
only the inputs. The backward pass computes the others again."""


def remat(module: type[nn.Module], policy: str, *, scanned: bool = False) -> type[nn.Module]:
    """Rematerialises the calls of a module class; parameters, their paths and results are unchanged.

    Args:
      module: a class whose `__call__` takes arrays only.
      policy: a name in POLICIES; `none` returns `module` itself.
      scanned: whether the class is used under `nn.scan`. A loop keeps XLA from merging the recomputation with the
        forward pass; elsewhere that needs barriers, which cost a little time.

    Raises:
      UserError: the policy is unknown.
    """
    if policy not in POLICIES:
        raise UserError(f"no remat policy {policy!r}{did_you_mean(policy, POLICIES)}")
    return module if policy == "none" else nn.remat(module, prevent_cse=not scanned, policy=POLICIES[policy])
