"""Layers of the image models: each has a name, and its kernel logical axes, so that tensor and fsdp shard it."""

from typing import Any

import flax.linen as nn

from trainer.experiment import replica_axis

_FAN_OUT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
_FAN_IN = nn.initializers.lecun_normal()


def conv(
    features: int,
    kernel_size: int,
    *,
    name: str,
    dtype: str,
    stride: int = 1,
    bias: bool = False,
    input_is_image: bool = False,
    padding: Any = None,
    kernel_init: Any = _FAN_OUT,
) -> nn.Conv:
    """A square convolution, padded by kernel_size // 2 pixels on all four sides, as PyTorch's models are.

    Args:
      features: output channels, over which `tensor` shards.
      kernel_size: sides of the kernel, in pixels.
      name: of the submodule.
      dtype: of the result.
      stride: in pixels.
      bias: whether the result has a bias; BatchNorm would cancel it.
      input_is_image: whether the input is an image, whose few channels are not sharded; else `fsdp` shards the input
        channels.
      padding: other padding, as `nn.Conv` takes it.
      kernel_init: initializer, by default normal with variance 2 / (kernel_size² · features) (He et al., 2015).
    """
    axes = (None, None, None if input_is_image else "embed", "mlp")
    return nn.Conv(
        features,
        (kernel_size, kernel_size),
        strides=stride,
        padding=kernel_size // 2 if padding is None else padding,
        use_bias=bias,
        dtype=dtype,
        kernel_init=nn.with_logical_partitioning(kernel_init, axes),
        name=name,
    )


def dense(
    features: int,
    *,
    name: str,
    dtype: str,
    axes: tuple[str | None, str | None] = ("embed", "mlp"),
    kernel_init: Any = _FAN_IN,
) -> nn.Dense:
    """A dense layer with a bias; by default the kernel is normal with variance 1 / inputs (LeCun)."""
    return nn.Dense(features, dtype=dtype, kernel_init=nn.with_logical_partitioning(kernel_init, axes), name=name)


def batch_norm(train: bool, *, name: str, dtype: str) -> nn.BatchNorm:
    """BatchNorm over all examples of a microbatch, on all devices.

    Running statistics move by a tenth in each microbatch.
    """
    return nn.BatchNorm(not train, momentum=0.9, axis_name=replica_axis(), dtype=dtype, name=name)
