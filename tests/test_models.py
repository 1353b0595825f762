"""The image models: sizes as published, outputs against a forward pass in float64 NumPy, names and logical axes."""

import functools
import math
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models import MODELS, make_model
from trainer.errors import UserError, model_errors
from trainer.rules import path_of

EXAMPLES, SIDE, CLASSES = 3, 32, 4
SMALL: dict[str, dict[str, Any]] = {
    "cnn": {"widths": (4, 6), "hidden": 5, "batch_norm": True},
    "mlp": {"widths": (5, 6)},
    "vgg11": {"widths": (4, 4, 6, 6, 6), "hidden": 8},
    "resnet18": {"widths": (4, 4, 6, 8), "blocks": (2, 1, 1, 1)},
    "resnet34": {"widths": (4, 4, 6, 8), "blocks": (1, 1, 1, 1), "stem": "imagenet"},
    "resnet50": {"widths": (3, 4, 5, 6), "blocks": (2, 1, 1, 1)},
    "densenet121": {"widths": (4,), "blocks": (2, 1, 1, 2)},
    "vit_ti16": {"blocks": (2,)},
}
# Parameters of the published models, of which those with BatchNorm do not count its statistics. ImageNet: torchvision's
# documentation of vgg11_bn, resnet18, resnet34, resnet50, densenet121 and vit_b_16; timm's vit_tiny_patch16_224 and
# vit_small_patch16_224. CIFAR-10: pytorch-cifar (kuangliu) for ResNets and DenseNet; pytorch-vgg-cifar10, whose VGG
# AdaBelief's authors use, for VGG.
PUBLISHED = [
    ("vgg11", "imagenet", 132_868_840),
    ("resnet18", "imagenet", 11_689_512),
    ("resnet34", "imagenet", 21_797_672),
    ("resnet50", "imagenet", 25_557_032),
    ("densenet121", "imagenet", 7_978_856),
    ("vgg11", "cifar", 9_756_426),
    ("resnet18", "cifar", 11_173_962),
    ("resnet34", "cifar", 21_282_122),
    ("resnet50", "cifar", 23_520_842),
    ("densenet121", "cifar", 6_956_298),
    ("vit_ti16", None, 5_717_416),
    ("vit_s16", None, 22_050_664),
    ("vit_b16", None, 86_567_656),
]


def boxed(model: nn.Module, side: int = SIDE) -> Any:
    """The abstract variables of a model for images of three channels, in their boxes."""
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, side, side, 3)), train=False))


@pytest.mark.parametrize(("name", "stem", "parameters"), PUBLISHED)
def test_models_have_as_many_parameters_as_published(name, stem, parameters):
    large = stem != "cifar"
    model = make_model(name, classes=1000 if large else 10, **({} if stem is None else {"stem": stem}))
    shapes = nn.unbox(boxed(model, 224 if large else 32)["params"])
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == parameters


@pytest.mark.parametrize(
    ("name", "stem", "too_small", "enough"),
    [("vgg11", "cifar", 28, 32), ("densenet121", "cifar", 7, 8), ("densenet121", "imagenet", 28, 32)],
)
def test_images_that_poolings_leave_nothing_of_are_one_line_of_the_model(name, stem, too_small, enough):
    model = make_model(name, classes=CLASSES, stem=stem, **SMALL[name])
    boxed(model, enough)
    with (
        pytest.raises(UserError, match=r"does not fit its batch .*/models/.*ValueError: .* too small"),
        model_errors({"image": jax.ShapeDtypeStruct((1, too_small, too_small, 3), np.uint8)}),
    ):
        boxed(model, too_small)


def small(name: str) -> nn.Module:
    return make_model(name, classes=CLASSES, **SMALL.get(name, {}))


@functools.cache
def variables(name: str) -> Any:
    """Random values in the right shapes: no bias or statistic is 0 or 1, and variances are positive."""
    rng = np.random.default_rng(0)

    def made_up(path: Any, x: Any) -> jax.Array:
        values = rng.normal(size=x.shape) * np.sqrt(2 * x.shape[-1] / x.size)
        if path[-1].key in ("var", "scale"):
            values = rng.uniform(0.5, 2, x.shape)
        return jnp.asarray(values, x.dtype)

    return jax.tree_util.tree_map_with_path(made_up, nn.unbox(boxed(small(name))))


def images() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(EXAMPLES, SIDE, SIDE, 3)).astype(np.float32)


class Reference:
    """The layers in float64 NumPy; `train` normalises by the batch itself and not by the statistics."""

    def __init__(self, values: Any, train: bool) -> None:
        self.values = jax.tree.map(lambda x: np.asarray(x, np.float64), values)
        self.train = train

    def params(self, path: str, collection: str = "params") -> Any:
        node = self.values[collection]
        for name in path.split("/"):
            node = node[name]
        return node

    def conv(self, x: np.ndarray, path: str, stride: int = 1, padding: int | None = None) -> np.ndarray:
        """A cross-correlation, by shifted products."""
        kernel = self.params(path)["kernel"]
        side = kernel.shape[0]
        pad = side // 2 if padding is None else padding
        x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(x, (side, side), axis=(1, 2))[:, ::stride, ::stride]
        return np.einsum("nhwcij,ijco->nhwo", windows, kernel) + self.params(path).get("bias", 0)

    def dense(self, x: np.ndarray, path: str) -> np.ndarray:
        return x @ self.params(path)["kernel"] + self.params(path)["bias"]

    def batch_norm(self, x: np.ndarray, path: str) -> np.ndarray:
        mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
        if not self.train:
            mean, var = (self.params(path, "batch_stats")[name] for name in ("mean", "var"))
        return (x - mean) / np.sqrt(var + 1e-5) * self.params(path)["scale"] + self.params(path)["bias"]

    def layer_norm(self, x: np.ndarray, path: str) -> np.ndarray:
        scaled = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return scaled * self.params(path)["scale"] + self.params(path)["bias"]


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def pooled(x: np.ndarray, side: int, stride: int, pad: int, reduce: Any) -> np.ndarray:
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)), constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(x, (side, side), axis=(1, 2))
    return reduce(windows[:, ::stride, ::stride], axis=(-2, -1))


def stem(ref: Reference, x: np.ndarray, kind: str, norm: bool) -> np.ndarray:
    x = ref.conv(x, "stem/conv", stride=2 if kind == "imagenet" else 1)
    x = relu(ref.batch_norm(x, "stem/norm")) if norm else x
    return pooled(x, 3, 2, 1, np.max) if kind == "imagenet" else x


def resnet(ref: Reference, x: np.ndarray, name: str) -> np.ndarray:
    settings = SMALL[name]
    x = stem(ref, x, settings.get("stem", "cifar"), norm=True)
    for stage, count in enumerate(settings["blocks"]):
        for i in range(count):
            block, y, stride = f"stage_{stage}_block_{i}", x, 2 if stage and i == 0 else 1
            convolutions = 3 if name == "resnet50" else 2
            for j in range(convolutions):
                is_strided = j == convolutions - 2
                y = ref.batch_norm(ref.conv(y, f"{block}/conv_{j}", stride if is_strided else 1), f"{block}/norm_{j}")
                y = relu(y) if j + 1 < convolutions else y
            if "conv_shortcut" in ref.params(block):
                x = ref.batch_norm(ref.conv(x, f"{block}/conv_shortcut", stride), f"{block}/norm_shortcut")
            x = relu(x + y)
    return ref.dense(x.mean((1, 2)), "head")


def vgg11(ref: Reference, x: np.ndarray, name: str) -> np.ndarray:
    for stage, count in enumerate((1, 1, 2, 2, 2)):
        for i in range(count):
            x = relu(ref.batch_norm(ref.conv(x, f"conv_{stage}_{i}"), f"norm_{stage}_{i}"))
        x = pooled(x, 2, 2, 0, np.max)
    x = x.reshape(len(x), -1)
    for i in range(2):
        x = relu(ref.dense(x, f"hidden_{i}"))
    return ref.dense(x, "head")


def densenet(ref: Reference, x: np.ndarray, name: str) -> np.ndarray:
    x = stem(ref, x, "cifar", norm=False)
    blocks = SMALL[name]["blocks"]
    for block, count in enumerate(blocks):
        for i in range(count):
            y, layer = x, f"block_{block}_layer_{i}"
            for j in range(2):
                y = ref.conv(relu(ref.batch_norm(y, f"{layer}/norm_{j}")), f"{layer}/conv_{j}")
            x = np.concatenate([x, y], axis=-1)
        if block + 1 < len(blocks):
            x = pooled(ref.conv(relu(ref.batch_norm(x, f"norm_{block}")), f"conv_{block}"), 2, 2, 0, np.mean)
    return ref.dense(relu(ref.batch_norm(x, "norm")).mean((1, 2)), "head")


def vit(ref: Reference, x: np.ndarray, name: str) -> np.ndarray:
    """One image, one head and one position at a time."""
    heads = 3
    x = ref.conv(x, "patches", stride=16, padding=0).reshape(EXAMPLES, 4, -1)
    logits = []
    for patches in x:
        y = np.concatenate([ref.params("class_token")[0], patches]) + ref.params("positions")[0]
        for i in range(2):
            block = f"block_{i}"
            z = ref.layer_norm(y, f"{block}/attention_norm")
            query, key, value = (ref.dense(z, f"{block}/attention/{one}") for one in ("query", "key", "value"))
            mixed = np.zeros_like(y)
            for units in np.split(np.arange(y.shape[1]), heads):
                for t in range(len(y)):
                    scores = np.exp(key[:, units] @ query[t, units] / np.sqrt(len(units)))
                    mixed[t, units] = scores / scores.sum() @ value[:, units]
            y = y + ref.dense(mixed, f"{block}/attention/out")
            z = ref.dense(ref.layer_norm(y, f"{block}/mlp_norm"), f"{block}/mlp/up")
            gelu = z / 2 * (1 + np.vectorize(math.erf)(z / math.sqrt(2)))
            y = y + ref.dense(gelu, f"{block}/mlp/down")
        logits.append(ref.dense(ref.layer_norm(y, "norm")[0], "head"))
    return np.stack(logits)


REFERENCES = {
    "vgg11": vgg11,
    "resnet18": resnet,
    "resnet34": resnet,
    "resnet50": resnet,
    "densenet121": densenet,
    "vit_ti16": vit,
}


@pytest.mark.parametrize("name", REFERENCES)
def test_logits_are_those_of_a_float64_forward_pass(name):
    model, values, x = small(name), variables(name), images()

    @jax.jit
    def both(values: Any, x: Any) -> Any:
        trained, _ = model.apply(values, x, train=True, mutable=["batch_stats"])
        return model.apply(values, x, train=False), trained

    for found, train in zip(both(values, x), (False, True), strict=True):
        expected = REFERENCES[name](Reference(values, train), x.astype(np.float64), name)
        assert len(np.unique(expected.round(6))) == EXAMPLES * CLASSES
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", MODELS)
def test_every_submodule_has_a_name_of_ours_and_every_kernel_its_logical_axes(name):
    shapes = boxed(small(name))["params"]
    leaves = jax.tree_util.tree_leaves_with_path(shapes, is_leaf=lambda x: isinstance(x, nn.Partitioned))
    kernels = 0
    for keys, leaf in leaves:
        path = path_of(keys)
        assert re.fullmatch(r"[a-z0-9_/]+", path)  # Flax's own names have capitals
        if not path.endswith("/kernel"):
            continue
        kernels += 1
        assert isinstance(leaf, nn.Partitioned), path
        axes = [axis for axis in leaf.names if axis is not None]
        assert axes, path
        assert len(leaf.names) == leaf.value.ndim
        assert set(axes) <= {"embed", "mlp", "heads"}
        assert len(set(axes)) == len(axes)
    assert kernels >= 3


@pytest.mark.parametrize("name", MODELS)
def test_activations_in_bfloat16_leave_variables_and_logits_in_float32(name):
    model = make_model(name, classes=CLASSES, dtype="bfloat16", **SMALL.get(name, {}))
    shapes = nn.unbox(boxed(model))
    assert {x.dtype for x in jax.tree.leaves(shapes)} == {np.dtype("float32")}
    jaxpr = jax.make_jaxpr(lambda values, x: model.apply(values, x, train=False))(shapes, images())
    in_dtype = ("cnn", "mlp")  # their logits have the dtype of the activations
    assert jaxpr.out_avals[0].dtype == ("bfloat16" if name in in_dtype else "float32")
    assert any(getattr(e.outvars[0].aval, "dtype", None) == "bfloat16" for e in jaxpr.eqns)
