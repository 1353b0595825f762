"""Labels cover the parameters exactly, and a table shows them."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainer import config
from trainer.errors import UserError
from trainer.params import Param, ParamTable, label_tree, param_table
from trainer.rules import paths
from trainer.sharding.specs import ParamSpec

GROUPS = {"decayed": config.Group(weight_decay=0.1), "plain": config.Group()}
RULES = ((r".*/kernel", "decayed"), (r".*", "plain"))


def params():
    return {
        "dense": {"bias": np.zeros(3, np.float32), "kernel": np.zeros((2, 3), np.float32)},
        "scale": jnp.zeros((), jnp.bfloat16),
    }


def spec_of(path: str, shape: tuple[int, ...]) -> ParamSpec:
    """Kernels are sharded over fsdp."""
    sharded = path.endswith("kernel")
    why = "largest dimension" if sharded else "small"
    return ParamSpec(path, shape, (*[None] * (len(shape) - 1), "fsdp") if sharded else (None,) * len(shape), why)


def table_with(tree: Any, labels: Any, optimizer: config.Optimizer) -> ParamTable:
    specs = {path: spec_of(path, leaf.shape) for path, leaf in zip(paths(tree), jax.tree.leaves(tree), strict=True)}
    return param_table(tree, labels, optimizer, specs)


def table_of(tree=None, rules=RULES, groups=GROUPS) -> ParamTable:
    tree = params() if tree is None else tree
    return table_with(tree, label_tree(tree, rules, groups), config.Optimizer(groups=groups))


def test_labels_have_the_structure_of_the_parameters():
    assert label_tree(params(), RULES, GROUPS) == {"dense": {"bias": "plain", "kernel": "decayed"}, "scale": "plain"}


def test_parameter_without_a_rule_is_named():
    with pytest.raises(UserError, match=r"no label rule matches scale; rules match whole paths"):
        label_tree(params(), ((r".*/kernel", "decayed"), (r"dense/bias", "plain")), GROUPS)


def test_rule_that_matches_no_parameter_is_named():
    with pytest.raises(UserError, match=r"label rule 'norm/\.\*' matches no parameter; some paths:"):
        label_tree(params(), ((r"norm/.*", "plain"), *RULES), GROUPS)


def test_label_without_a_group_gets_the_nearest_name():
    with pytest.raises(UserError, match=r"label 'decaied' has no group .* did you mean 'decayed'\?"):
        label_tree(params(), ((r".*/kernel", "decaied"), (r".*", "plain")), GROUPS)


def test_group_without_a_parameter_is_named():
    with pytest.raises(UserError, match="group 'frozen' has no parameter"):
        label_tree(params(), RULES, GROUPS | {"frozen": config.Group()})


def test_table_has_a_row_for_each_parameter():
    table = table_of()
    assert table.rows == (
        Param("dense/bias", (3,), "float32", "plain", "0", spec_of("dense/bias", (3,))),
        Param("dense/kernel", (2, 3), "float32", "decayed", "0.1", spec_of("dense/kernel", (2, 3))),
        Param("scale", (), "bfloat16", "plain", "0", spec_of("scale", ())),
    )
    assert [(row.size, row.bytes) for row in table.rows] == [(3, 12), (6, 24), (1, 2)]


@pytest.mark.parametrize(
    "change",
    [
        lambda p: table_of(p, rules=((r"scale|.*/kernel", "decayed"), (r".*", "plain"))),
        lambda p: table_of(p, groups=GROUPS | {"plain": config.Group(weight_decay=1e-9)}),
        lambda p: table_of(p | {"dense": p["dense"] | {"kernel": np.zeros((3, 2), np.float32)}}),
        lambda p: table_of({"dense": p["dense"], "gain": p["scale"]}),
        lambda p: table_of(p | {"scale": jnp.zeros((), jnp.float16)}),
        lambda p: table_of({"dense": p["dense"]}),
    ],
    ids=["label", "decay", "shape", "path", "dtype", "missing"],
)
def test_rows_change_with_every_property_of_a_parameter(change):
    assert change(params()).rows != table_of().rows


def test_rows_depend_neither_on_values_nor_on_how_rules_are_written():
    tree = params()
    tree["dense"]["kernel"] += 1
    rules = ((r"dense/bias", "plain"), (r"scale", "plain"), (r"dense/kernel", "decayed"))
    other = table_of(tree, rules=rules, groups=dict(reversed(GROUPS.items())))
    assert other.rows == table_of().rows


SHAPES = {
    "dense": {"kernel": jax.ShapeDtypeStruct((1200, 3), jnp.float32), "bias": jax.ShapeDtypeStruct((3,), jnp.bfloat16)},
    "scale": jax.ShapeDtypeStruct((), jnp.float32),
}


def optimizer_of(groups: dict[str, config.Group], **settings: Any) -> config.Optimizer:
    return config.Optimizer(schedule=config.Schedule("cosine", peak=0.02, final=1e-3), groups=groups, **settings)


def test_table_shows_every_parameter_with_its_sharding_then_the_sums_then_every_label_with_its_settings():
    labels = {"dense": {"kernel": "decayed", "bias": "plain"}, "scale": "plain"}
    optimizer = optimizer_of({"decayed": config.Group(weight_decay=0.05), "plain": config.Group()})
    assert str(table_with(SHAPES, labels, optimizer)) == (
        "path          shape   dtype     label    weight decay  sharding    why                parameters   bytes\n"
        "dense/bias    3       bfloat16  plain               0  replicated  small                       3       6\n"
        "dense/kernel  1200×3  float32   decayed          0.05  (-, fsdp)   largest dimension       3,600  14,400\n"
        "scale         scalar  float32   plain               0  replicated  small                       1       4\n"
        "total                                                                                      3,604  14,410\n"
        "\n"
        "label    parameters  optimizer  learning rate        weight decay  clip norm  updated     moments\n"
        "decayed       3,600  adabelief  cosine 0.02 → 0.001  0.05          -          every step  float32\n"
        "plain             4  adabelief  cosine 0.02 → 0.001  0             -          every step  float32\n"
    )


def test_table_shows_every_setting_of_a_group():
    labels = {"dense": {"kernel": "all", "bias": "still"}, "scale": "other"}
    every = config.Group(
        decay_schedule=config.Schedule("linear", peak=0.1),
        optimizer="adam",
        schedule=config.Schedule(peak=0.5),
        lr_multiplier=0.1,
        clip_norm=2.0,
        every_steps=5,
        nu_dtype="bfloat16",
    )
    sgd = config.Group(weight_decay=0.1, optimizer="sgd")
    groups = {"all": every, "still": config.Group(frozen=True), "other": sgd}
    optimizer = optimizer_of(groups, decay="coupled", clip_norm=3.0, mu_dtype="bfloat16")
    text = str(table_with(SHAPES, labels, optimizer)).split("\n\n")[1]
    cells = [re.split(r" {2,}", line) for line in text.splitlines()[1:]]
    assert cells == [
        ["all", "3,600", "adam", "0.5 × 0.1", "linear 0.1 coupled", "2, 3 of all", "every 5 steps", "bfloat16"],
        ["still", "3", "frozen", "-", "-", "-", "-", "-"],
        ["other", "1", "sgd", "cosine 0.02 → 0.001", "0.1 coupled", "3 of all", "every step", "bfloat16"],
    ]
