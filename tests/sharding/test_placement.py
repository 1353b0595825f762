"""What splits each parameter: rules before logical axes before size; and every mistake is named with its path."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from trainer import config
from trainer.errors import UserError
from trainer.sharding.specs import place

SIZES = {"data": 1, "fsdp": 4, "tensor": 2}


def leaf(*shape: int, names: tuple[str | None, ...] | None = None):
    array = jax.ShapeDtypeStruct(shape, jnp.float32)
    return array if names is None else nn.LogicallyPartitioned(array, names)


def placed(params, sizes=SIZES, **settings: Any) -> dict:
    settings: dict[str, Any] = {"strategy": "fsdp_tensor", "min_shard_size": 0} | settings
    return {p.path: (p.axes, p.why) for p in place(params, config.Parallel(**settings), sizes)}


NO_TENSOR = SIZES | {"tensor": 1}


def test_rules_decide_before_logical_axes_and_these_before_size():
    params = {"named": leaf(8, 8, names=("embed", "mlp")), "plain": leaf(8, 8)}
    assert placed(params, rules=((".*", (None, "tensor")),)) == {
        "named": ((None, "tensor"), "rule"),
        "plain": ((None, "tensor"), "rule"),
    }
    assert placed(params) == {
        "named": (("fsdp", "tensor"), "logical axes embed, mlp"),
        "plain": ((None, "fsdp"), "largest dimension"),
    }


def test_first_rule_that_matches_the_whole_path_decides():
    rules = (("a/kernel", ("fsdp",)), (".*/kernel", ("tensor",)), (".*", ()))
    found = placed({"a": {"kernel": leaf(8)}, "b": {"kernel": leaf(8), "bias": leaf(8)}}, rules=rules)
    assert {path: axes for path, (axes, _) in found.items()} == {
        "a/kernel": ("fsdp",),
        "b/kernel": ("tensor",),
        "b/bias": (),
    }


@pytest.mark.parametrize(
    ("shape", "axes", "why"),
    [
        ((8, 12), (None, "fsdp"), "largest dimension"),
        ((12, 8), ("fsdp", None), "largest dimension"),
        ((8, 8), (None, "fsdp"), "largest dimension"),  # the last of several
        ((8, 13), ("fsdp", None), "largest dimension"),  # 13 does not divide
        ((7, 13), (None, None), "no dimension divides by 4"),
        ((), (), "no dimension divides by 4"),
    ],
)
def test_largest_dimension_that_divides_is_split(shape, axes, why):
    assert placed({"w": leaf(*shape)}, NO_TENSOR) == {"w": (axes, why)}


def test_leaves_under_a_size_stay_whole_and_say_so():
    found = placed({"small": leaf(4, 8), "enough": leaf(4, 9)}, NO_TENSOR, min_shard_size=36)
    assert found == {
        "small": ((None, None), "fewer than 36 numbers"),
        "enough": (("fsdp", None), "largest dimension"),
    }


def test_logical_axes_of_one_array_share_no_axis():
    # As in Flax: rules are asked in order, so `mlp` has tensor before `heads` may, and the other stays whole.
    rules = (("mlp", "tensor"), ("heads", "tensor"))
    found = placed({"w": leaf(8, 8, names=("heads", "mlp"))}, axis_rules=rules)
    assert found["w"][0] == (None, "tensor")


def test_a_dimension_without_a_name_stays_whole():
    assert placed({"w": leaf(3, 8, names=(None, "mlp"))})["w"] == ((None, "tensor"), "logical axes None, mlp")


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ((None, None, "fsdp"), r"rule for a/w names 3 dimensions; its shape is \(6, 5\)"),
        (("model",), "rule for a/w names axis 'model'; there are data, fsdp, tensor"),
        (("fsdp",), r"a/w \(6, 5\) does not divide over axis 'fsdp' of size 4 \(rule\)"),
        ((None, "tensor"), r"a/w \(6, 5\) does not divide over axis 'tensor' of size 2 \(rule\)"),
    ],
)
def test_a_rule_that_does_not_fit_is_an_error_with_the_path(rule, message):
    with pytest.raises(UserError, match=message):
        placed({"a": {"w": leaf(6, 5)}}, rules=((".*", rule),))


def test_an_axis_named_twice_is_an_error_with_the_path():
    with pytest.raises(UserError, match=r"rule for a/w names an axis twice: \('fsdp', 'fsdp'\)"):
        placed({"a": {"w": leaf(8, 8)}}, rules=((".*", ("fsdp", "fsdp")),))


def test_a_logical_axis_that_does_not_divide_is_an_error_with_the_path():
    with pytest.raises(
        UserError, match=r"a/w \(7, 8\) does not divide over axis 'fsdp' of size 4 \(logical axes embed"
    ):
        placed({"a": {"w": leaf(7, 8, names=("embed", "mlp"))}})


def test_a_logical_axis_without_a_rule_is_an_error_with_the_path():
    with pytest.raises(UserError, match=r"a/w has the logical axis 'expert', which parallel.axis_rules does not map"):
        placed({"a": {"w": leaf(8, names=("expert",))}})


def test_a_parameter_that_no_rule_matches_is_an_error_with_the_path():
    with pytest.raises(UserError, match="no sharding rule matches b/w; rules match whole paths"):
        placed({"a": {"w": leaf(8)}, "b": {"w": leaf(8)}}, rules=(("a/.*", ()),))


def test_a_rule_that_decides_nothing_is_an_error():
    with pytest.raises(
        UserError, match=r"sharding rule 'c/\.\*' decides nothing: no path matches it; paths look like a/w"
    ):
        placed({"a": {"w": leaf(8)}}, rules=((".*", ()), ("c/.*", ("fsdp",))))


@pytest.mark.parametrize("strategy", ["tensor", "zero1_tensor", "fsdp_tensor"])
def test_tensor_without_anything_that_says_what_to_split_is_an_error(strategy):
    with pytest.raises(UserError, match=f"strategy '{strategy}' splits what parallel.rules or the logical axes"):
        placed({"w": leaf(8, 8)}, strategy=strategy)
