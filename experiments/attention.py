"""Causal attention by name: `plain`, or `splash`, the Pallas kernel for TPUs that ships with JAX.

    mixed = attend("splash", query, key, value, segments)

`plain` is the reference. Its memory grows with the square of the length; that of `splash` grows with the length.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

ATTENTIONS = ("plain", "splash")
_AXES = ("batch", "length", "heads", "head_dim")  # logical axes of queries, keys and values
_BLOCKS = (512, 256, 128)  # block sizes along the length; the kernel needs a length that is a multiple of 128

Heads = Float[Array, "examples length heads head_dim"]
FewerHeads = Float[Array, "examples length kv_heads head_dim"]
Segments = Int[Array, "examples length"]


def attend(name: str, query: Heads, key: FewerHeads, value: FewerHeads, segments: Segments | None = None) -> Heads:
    """Each position attends to itself and to the positions before it, of the same segment if there are segments.

    Sums of products and the softmax are in float32. Where the logical axis "heads" is sharded over more devices than
    there are key heads, each device gets a copy of those that its query heads use.

    Args:
      name: one of ATTENTIONS.
      query: scaled by 1/√head_dim in here.
      key: heads is a multiple of kv_heads; query head h uses key head h // (heads / kv_heads).
      value: as `key`.
      segments: the document of each position, in order along a row; None if a row is one document.
    """
    mesh = jax.sharding.get_abstract_mesh()
    spec: Any = nn.logical_to_mesh_axes(_AXES)
    batch_axes, _, head_axes, _ = spec
    over = head_axes if isinstance(head_axes, tuple) else (head_axes,)
    shards = 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in over if axis is not None)
    copies = shards // math.gcd(shards, key.shape[2])
    if copies > 1:
        key, value = (jnp.repeat(x, copies, axis=2) for x in (key, value))
    query, key, value = (nn.with_logical_constraint(x, _AXES) for x in (query, key, value))
    if name == "plain":
        return plain(query, key, value, segments)
    if mesh.empty:
        return splash(query, key, value, segments)
    # XLA cannot shard the kernel by itself. A device has whole rows, and some heads of each.
    heads, rows = PartitionSpec(batch_axes, None, head_axes, None), PartitionSpec(batch_axes, None)
    sharded = jax.shard_map(splash, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)
    return sharded(query, key, value, segments)


def plain(query: Heads, key: FewerHeads, value: FewerHeads, segments: Segments | None) -> Heads:
    """Attention as XLA compiles it, with all weights [examples, heads, length, length] in memory."""
    same = None if segments is None else (segments[:, None, :, None] == segments[:, None, None, :])
    return jax.nn.dot_product_attention(query, key, value, mask=same, is_causal=True)


def splash(query: Heads, key: FewerHeads, value: FewerHeads, segments: Segments | None) -> Heads:
    """The kernel on TPUs. Elsewhere Pallas interprets the kernel, for the same numbers, slowly."""
    run = functools.partial(jax.lax.platform_dependent, query, key, value, segments)
    return run(tpu=functools.partial(_splash, interpret=False), default=functools.partial(_splash, interpret=True))


def _splash(query: Array, key: Array, value: Array, segments: Array | None, *, interpret: bool) -> Array:
    length, heads = query.shape[1:3]
    missing = -length % _BLOCKS[-1]  # positions at the end, which no other position sees
    scaled = (query.astype(jnp.float32) * query.shape[-1] ** -0.5).astype(query.dtype)
    padded = [jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) for x in (scaled, key, value)]
    ids = None if segments is None else jnp.pad(segments, ((0, 0), (0, missing)), mode="edge").astype(jnp.int32)
    kernel = _kernel(length + missing, heads, interpret)

    def one(query: Array, key: Array, value: Array, ids: Array | None) -> Array:
        return kernel(query, key, value, None if ids is None else splash_kernel.SegmentIds(ids, ids))

    query, key, value = (jnp.swapaxes(x, 1, 2) for x in padded)
    mixed = jax.vmap(one)(query, key, value, ids)
    return jnp.swapaxes(mixed, 1, 2)[:, :length]


def _kernel(length: int, heads: int, interpret: bool) -> Any:
    """The kernel for rows of `length`, a multiple of 128, and this many query heads."""
    block = next(size for size in _BLOCKS if length % size == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    blocks: dict[str, Any] = {f"block_{name}": block for name in names}
    return splash_kernel.make_splash_mha(
        splash_mask.MultiHeadMask([splash_mask.CausalMask((length, length))] * heads),
        block_sizes=splash_kernel.BlockSizes(**blocks),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
