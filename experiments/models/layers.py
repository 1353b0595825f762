"""Layers of the image models: each has a name, and its kernel logical axes, so that tensor and fsdp shard it."""

from typing import Any

import flax.linen as nn

from trainer.experiment import replica_axis

_FAN_OUT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
_FAN_IN = nn.initializers.lecun_normal()


def conv(
    features: int,
    side: int,
    *,
    name: str,
    dtype: str,
    stride: int = 1,
    bias: bool = False,
    first: bool = False,
    padding: Any = None,
    fresh: Any = _FAN_OUT,
) -> nn.Conv:
    """A square convolution, padded by side // 2 pixels on all four sides, as PyTorch's models are.

    Args:
      features: output channels, over which `tensor` shards.
      side: of the kernel, in pixels.
      name: of the submodule.
      dtype: of the result.
      stride: in pixels.
      bias: whether the result has a bias; BatchNorm would cancel it.
      first: whether the input is an image, whose few channels are not sharded; else `fsdp` shards the input channels.
      padding: other padding, as `nn.Conv` takes it.
      fresh: initializer of the kernel, by default normal with variance 2 / (side² · features) (He et al., 2015).
    """
    axes = (None, None, None if first else "embed", "mlp")
    return nn.Conv(
        features,
        (side, side),
        strides=stride,
        padding=side // 2 if padding is None else padding,
        use_bias=bias,
        dtype=dtype,
        kernel_init=nn.with_logical_partitioning(fresh, axes),
        name=name,
    )


def dense(
    features: int,
    *,
    name: str,
    dtype: str,
    axes: tuple[str | None, str | None] = ("embed", "mlp"),
    fresh: Any = _FAN_IN,
) -> nn.Dense:
    """A dense layer with a bias; by default the kernel is normal with variance 1 / inputs (LeCun)."""
    return nn.Dense(features, dtype=dtype, kernel_init=nn.with_logical_partitioning(fresh, axes), name=name)


def batch_norm(train: bool, *, name: str, dtype: str) -> nn.BatchNorm:
    """BatchNorm over all examples of a microbatch, on all devices; running statistics move by a tenth a step."""
    return nn.BatchNorm(not train, momentum=0.9, axis_name=replica_axis(), dtype=dtype, name=name)
