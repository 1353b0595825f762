"""Rules over paths: the first match decides, whole paths are matched, and nothing is left over on either side."""

import dataclasses
from typing import Any, NamedTuple

import flax.struct
import jax
import pytest

from trainer.errors import UserError
from trainer.rules import assign, paths


class Moments(NamedTuple):
    mu: Any
    nu: Any


@flax.struct.dataclass
class State:
    step: Any
    params: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Pair:
    left: Any
    right: Any


TREE = {"encoder": {"kernel": 1, "bias": 2}, "head": {"kernel": 3, "bias": 4}}


def test_first_matching_rule_decides():
    found = assign([(r"head/.*", "head"), (r".*/kernel", "kernel"), (r".*", "rest")], TREE)
    assert found == {"encoder": {"kernel": "kernel", "bias": "rest"}, "head": {"kernel": "head", "bias": "head"}}


@pytest.mark.parametrize("part", ["kernel", "encoder", "encoder/kern", "ncoder/kernel", "/"])
def test_part_of_a_path_does_not_match(part):
    with pytest.raises(UserError, match=r"'.*' matches no parameter; some paths: encoder/bias"):
        assign([(part, "part"), (".*", "rest")], TREE)


def test_alternatives_are_matched_as_a_whole():
    found = assign([(r"encoder/bias|encoder/kernel", "encoder"), (r".*", "rest")], TREE)
    assert found["encoder"] == {"kernel": "encoder", "bias": "encoder"}


def test_unmatched_leaf_is_named():
    with pytest.raises(UserError, match="no label rule matches encoder/bias, head/bias;"):
        assign([(r".*/kernel", "decayed")], TREE, what="label rule")


def test_many_unmatched_leaves_are_counted():
    with pytest.raises(UserError, match="no rule matches x/0, x/1, x/2 and 4 more;"):
        assign([("y", 0)], {"x": [0] * 7, "y": 0})


def test_rule_that_matches_nothing_is_named_with_its_reason():
    with pytest.raises(UserError, match=r"rule 'decoder/\.\*' matches no parameter; some paths:"):
        assign([(r"decoder/.*", "decoder"), (r".*", "rest")], TREE)


def test_rule_shadowed_by_earlier_ones_is_named_with_its_reason():
    with pytest.raises(
        UserError, match=r"rule 'head/bias' matches no parameter that is left: earlier rules match head/bias$"
    ):
        assign([(r".*/kernel", "decayed"), (r".*/bias", "plain"), (r"head/bias", "head")], TREE)


def test_same_regex_twice_is_an_error_even_with_the_same_value():
    with pytest.raises(UserError, match=r"earlier rules match encoder/bias, encoder/kernel"):
        assign([(r".*", "rest"), (r".*", "rest")], TREE)


def test_invalid_regex_is_named():
    with pytest.raises(UserError, match=r"sharding rule '\*/kernel' is not a regular expression: nothing to repeat"):
        assign([("*/kernel", "x"), (".*", "y")], TREE, what="sharding rule")


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"b": [10, (20, 30)], "a": 0}, ["a", "b/0", "b/1/0", "b/1/1"]),
        (Moments({"w": 1}, {"w": 2}), ["mu/w", "nu/w"]),
        (State(0, {"dense": {"kernel": 1}}), ["step", "params/dense/kernel"]),
        (Pair(1, [2]), ["left", "right/0"]),
        ({"a": None, "b": {}, "c": 1}, ["c"]),
        (5, [""]),
    ],
    ids=["lists", "namedtuple", "flax-dataclass", "dataclass", "empty-nodes", "bare-leaf"],
)
def test_paths_name_every_leaf_of_every_kind_of_node(tree, expected):
    assert paths(tree) == expected


def test_values_take_the_places_of_their_leaves_in_every_kind_of_node():
    tree = State(0, [Moments(1, Pair(2, None)), {"mu": 3}])
    found = assign(
        [(r"params/0/mu", "first"), (r".*/mu", "mu"), (r"params/0/nu/left", "left"), (r"step", "step")], tree
    )
    assert found == State("step", [Moments("first", Pair("left", None)), {"mu": "mu"}])
