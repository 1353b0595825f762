"""The sharding of each parameter: rules before logical axes before size. Errors name the path."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from trainer import config
from trainer.errors import UserError
from trainer.sharding import Strategy, build_strategy
from trainer.sharding.specs import param_specs

SIZES = {"data": 1, "fsdp": 4, "tensor": 2}


def leaf(*shape: int, names: tuple[str | None, ...] | None = None):
    array = jax.ShapeDtypeStruct(shape, jnp.float32)
    return array if names is None else nn.LogicallyPartitioned(array, names)


def specs_of(params, sizes=SIZES, **settings: Any) -> dict:
    settings: dict[str, Any] = {"strategy": "fsdp_tensor", "min_shard_size": 0} | settings
    return {p.path: (p.axes, p.why) for p in param_specs(params, config.Parallel(**settings), sizes)}


def built(params, strategy: str = "data", devices: int = 1, **settings: Any) -> Strategy:
    return build_strategy(config.Parallel(strategy, **settings), params, jax.devices()[:devices])


NO_TENSOR = SIZES | {"tensor": 1}


def test_rules_decide_before_logical_axes_and_these_before_size():
    params = {"named": leaf(8, 8, names=("embed", "mlp")), "plain": leaf(8, 8)}
    assert specs_of(params, rules=((".*", (None, "tensor")),)) == {
        "named": ((None, "tensor"), "rule"),
        "plain": ((None, "tensor"), "rule"),
    }
    assert specs_of(params) == {
        "named": (("fsdp", "tensor"), "logical axes embed, mlp"),
        "plain": ((None, "fsdp"), "largest dimension"),
    }


def test_first_rule_that_matches_the_whole_path_decides():
    rules = (("a/kernel", ("fsdp",)), (".*/kernel", ("tensor",)), (".*", ()))
    found = specs_of({"a": {"kernel": leaf(8)}, "b": {"kernel": leaf(8), "bias": leaf(8)}}, rules=rules)
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
    assert specs_of({"w": leaf(*shape)}, NO_TENSOR) == {"w": (axes, why)}


def test_leaves_under_a_size_stay_whole_and_say_so():
    found = specs_of({"small": leaf(4, 8), "enough": leaf(4, 9)}, NO_TENSOR, min_shard_size=36)
    assert found == {
        "small": ((None, None), "fewer than 36 numbers"),
        "enough": (("fsdp", None), "largest dimension"),
    }


def test_logical_axes_of_one_array_share_no_axis():
    # As in Flax: `mlp` comes first in the rules and takes tensor, so `heads` is replicated.
    rules = (("mlp", "tensor"), ("heads", "tensor"))
    found = specs_of({"w": leaf(8, 8, names=("heads", "mlp"))}, axis_rules=rules)
    assert found["w"][0] == (None, "tensor")


def test_a_dimension_without_a_name_stays_whole():
    assert specs_of({"w": leaf(3, 8, names=(None, "mlp"))})["w"] == ((None, "tensor"), "logical axes None, mlp")


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
        specs_of({"a": {"w": leaf(6, 5)}}, rules=((".*", rule),))


def test_an_axis_named_twice_is_an_error_with_the_path():
    with pytest.raises(UserError, match=r"rule for a/w names an axis twice: \('fsdp', 'fsdp'\)"):
        specs_of({"a": {"w": leaf(8, 8)}}, rules=((".*", ("fsdp", "fsdp")),))


def test_a_logical_axis_named_twice_is_an_error_with_the_path():
    with pytest.raises(UserError, match=r"a/w has the logical axis 'embed' twice: \('embed', None, 'embed'\)"):
        specs_of({"a": {"w": leaf(8, 8, 8, names=("embed", None, "embed"))}})


def test_a_logical_axis_that_does_not_divide_is_an_error_with_the_path():
    with pytest.raises(
        UserError, match=r"a/w \(7, 8\) does not divide over axis 'fsdp' of size 4 \(logical axes embed"
    ):
        specs_of({"a": {"w": leaf(7, 8, names=("embed", "mlp"))}})


def test_a_logical_axis_without_a_rule_is_an_error_with_the_path():
    with pytest.raises(UserError, match=r"a/w has the logical axis 'expert', which parallel.axis_rules does not map"):
        built({"a": {"w": leaf(8, names=("expert",))}}, strict_axes=True)


@pytest.mark.parametrize(("strategy", "devices"), [("data", 1), ("pmap", 8), ("fsdp", 8)])
def test_a_logical_axis_without_a_rule_is_replicated_and_listed_once(strategy, devices):
    params = {"a": leaf(8, 16, names=("expert", "embed")), "b": leaf(8, 4, names=("expert", None)), "c": leaf(8)}
    strategy = built(params, strategy, devices)
    assert [note.partition(": ")[2] for note in strategy.notes] == ["expert"]
    sharded = (None, "fsdp") if strategy.sizes["fsdp"] == 8 else (None, None)
    assert [spec.axes for spec in strategy.specs.values()][:2] == [sharded, (None, None)]
    assert built(params, strict_axes=True, rules=((".*", ()),)).notes == ()  # logical axes do not decide
    assert built(params, strict_axes=True, axis_rules=(("expert", None),)).notes == ()


def test_axis_rules_come_before_the_defaults():
    params = {"w": leaf(8, 8, names=("embed", "mlp"))}
    assert specs_of(params)["w"][0] == ("fsdp", "tensor")
    assert specs_of(params, axis_rules=(("mlp", "fsdp"),))["w"][0] == (None, "fsdp")
    assert specs_of(params, axis_rules=(("embed", None),))["w"][0] == (None, "tensor")


def test_an_axis_rule_for_an_axis_that_is_not_there_is_an_error():
    with pytest.raises(UserError, match=r"axis_rules maps 'mlp' to axis 'model'; there are data, fsdp, tensor"):
        built({"w": leaf(8)}, axis_rules=(("mlp", "model"),))


@pytest.mark.parametrize(
    ("settings", "devices", "why"),
    [
        ({"strategy": "data"}, 1, "strategy data"),
        ({"strategy": "data"}, 8, "strategy data"),
        ({"strategy": "pmap"}, 8, "strategy pmap"),
        ({"strategy": "fsdp"}, 1, "one device"),
        ({"strategy": "fsdp_tensor"}, 1, "one device"),
        ({"strategy": "zero1", "fsdp": 1}, 8, "fsdp of size 1"),
        ({"strategy": "fsdp_tensor", "fsdp": 1, "tensor": 1}, 8, "fsdp and tensor of size 1"),
    ],
)
@pytest.mark.parametrize("rules", [(), ((".*", ("fsdp", "tensor")),)])
def test_where_nothing_is_sharded_every_parameter_is_replicated_and_says_why(settings, devices, why, rules):
    params = {"named": leaf(8, 8, names=("embed", "mlp")), "plain": leaf(8, 8)}
    specs = built(params, devices=devices, rules=rules, min_shard_size=0, **settings).specs.values()
    assert [(str(spec), spec.why) for spec in specs] == [("replicated", why)] * 2


def test_pmap_replicates_whatever_the_rules_say():
    strategy = built({"w": leaf(7)}, "pmap", 8, rules=((".*", ("data",)),))
    assert (str(strategy.specs["w"]), strategy.specs["w"].why) == ("replicated", "strategy pmap")


def test_an_axis_of_size_1_shards_nothing():
    params = {"named": leaf(8, 8, names=("embed", "mlp")), "plain": leaf(8, 8)}
    specs = built(params, "tensor", 8).specs
    assert {path: (str(spec), spec.why) for path, spec in specs.items()} == {
        "named": ("(-, tensor)", "logical axes embed, mlp"),
        "plain": ("replicated", "no logical axes"),
    }


def test_zero1_says_that_it_shards_the_optimizer_state_only():
    spec = built({"w": leaf(8, 8)}, "zero1", 8, min_shard_size=0).specs["w"]
    assert (str(spec), spec.why) == ("(-, fsdp)", "largest dimension (fsdp: optimizer state only)")


@pytest.mark.parametrize(("strategy", "devices"), [("data", 1), ("data", 8), ("pmap", 8), ("fsdp", 1)])
@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((("b", ()), (".*", ())), "sharding rule 'b' matches no parameter"),
        ((("b", ()),), "no sharding rule matches a"),
        (((".*", ("model",)),), "rule for a names axis 'model'"),
        (((".*", (None, "fsdp")),), "rule for a names 2 dimensions"),
    ],
)
def test_rules_are_checked_where_nothing_is_sharded(strategy, devices, rules, message):
    with pytest.raises(UserError, match=message):
        built({"a": leaf(8)}, strategy, devices, rules=rules)


def test_a_parameter_that_no_rule_matches_is_an_error_with_the_path():
    with pytest.raises(UserError, match="no sharding rule matches b/w; rules match whole paths"):
        specs_of({"a": {"w": leaf(8)}, "b": {"w": leaf(8)}}, rules=(("a/.*", ()),))


def test_a_rule_that_decides_nothing_is_an_error():
    with pytest.raises(UserError, match=r"sharding rule 'c/\.\*' matches no parameter; some paths: a/w"):
        specs_of({"a": {"w": leaf(8)}}, rules=((".*", ()), ("c/.*", ("fsdp",))))


@pytest.mark.parametrize("strategy", ["tensor", "zero1_tensor", "fsdp_tensor"])
def test_tensor_without_anything_that_says_what_to_split_is_an_error(strategy):
    with pytest.raises(UserError, match=f"strategy '{strategy}' shards by parallel.rules or by the logical axes"):
        specs_of({"w": leaf(8, 8)}, strategy=strategy)
