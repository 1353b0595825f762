"""Image models by name. Each takes images and `train`, and returns logits; BatchNorm averages over all devices."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn

from experiments.models import densenet, resnet, vgg, vit
from experiments.models.cnn import StridedCNN
from experiments.models.mlp import MLP
from trainer.errors import UserError, did_you_mean


def make_model(name: str, *, classes: int, dtype: str = "float32", **given: Any) -> nn.Module:
    """The model of a name.

    Args:
      name: one of `MODELS`.
      classes: number of logits.
      dtype: of the activations. Parameters and batch statistics are float32; logits too, but not those of `cnn` and
        `mlp`, which have this dtype.
      given: the settings of `UNSET`, as `ImageClassification` describes them; by default those of the named model.

    Raises `UserError` for an unknown name, a setting that the model does not use, or a wrong number of sizes.
    """
    if name not in _MODELS:
        raise UserError(f"no model {name!r}{did_you_mean(name, MODELS)}")
    make, used = _MODELS[name]
    for setting, value in given.items():
        if setting not in used and value != UNSET[setting]:
            raise UserError(f"{setting} is {value!r}, which model {name!r} does not use (it uses {', '.join(used)})")
    return make({**UNSET, **given, "name": name, "classes": classes, "dtype": dtype})


def _cnn(given: Mapping[str, Any]) -> nn.Module:
    widths, hidden = given["widths"] or (32, 64), given["hidden"] or 128
    return StridedCNN(widths, hidden, given["classes"], given["dropout"], given["batch_norm"], given["dtype"])


def _mlp(given: Mapping[str, Any]) -> nn.Module:
    return MLP(given["widths"] or (32, 64), given["classes"], given["dropout"], given["dtype"])


def _vgg(given: Mapping[str, Any]) -> nn.Module:
    blocks, widths = _sizes(given, "blocks", vgg.VGG11), _sizes(given, "widths", vgg.WIDTHS)
    hidden = given["hidden"] or vgg.HIDDEN[given["stem"]]
    return vgg.VGG(blocks, widths, hidden, given["classes"], given["dropout"], given["dtype"])


def _resnet(given: Mapping[str, Any]) -> nn.Module:
    blocks, bottleneck = resnet.RESNETS[given["name"]]
    blocks, widths = _sizes(given, "blocks", blocks), _sizes(given, "widths", resnet.WIDTHS)
    return resnet.ResNet(blocks, widths, bottleneck, given["classes"], given["stem"], given["dtype"])


def _densenet(given: Mapping[str, Any]) -> nn.Module:
    blocks, (growth,) = _sizes(given, "blocks", densenet.DENSENET121), _sizes(given, "widths", (densenet.GROWTH,))
    return densenet.DenseNet(blocks, growth, given["classes"], given["stem"], given["dtype"])


def _vit(given: Mapping[str, Any]) -> nn.Module:
    width, heads = vit.VITS[given["name"]]
    (depth,) = _sizes(given, "blocks", (vit.DEPTH,))
    return vit.ViT(depth, width, heads, vit.PATCH, given["classes"], given["dropout"], given["dtype"])


def _sizes(given: Mapping[str, Any], setting: str, own: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes that are given, or those of the named model; `UserError` if they are not as many."""
    sizes = own if given[setting] is None else given[setting]
    if len(sizes) != len(own):
        raise UserError(f"{setting} is {sizes}; model {given['name']!r} has {len(own)} of them, as in {own}")
    return sizes


UNSET: Mapping[str, Any] = {
    "widths": None,
    "blocks": None,
    "hidden": None,
    "dropout": 0.0,
    "batch_norm": False,
    "stem": "cifar",
}
"""The settings of the models, with the values that leave each as its paper has it."""

# By name: what makes the model, and the settings that it uses.
_MODELS: dict[str, tuple[Callable[[Mapping[str, Any]], nn.Module], tuple[str, ...]]] = {
    "cnn": (_cnn, ("widths", "hidden", "dropout", "batch_norm")),
    "mlp": (_mlp, ("widths", "dropout")),
    "vgg11": (_vgg, ("widths", "blocks", "hidden", "dropout", "stem")),
    **dict.fromkeys(resnet.RESNETS, (_resnet, ("widths", "blocks", "stem"))),
    "densenet121": (_densenet, ("widths", "blocks", "stem")),
    **dict.fromkeys(vit.VITS, (_vit, ("blocks", "dropout"))),
}
MODELS = tuple(_MODELS)
