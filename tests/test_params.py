"""Labels cover the parameters exactly, their table shows them, and its digest tells two tables apart."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from trainer import config
from trainer.errors import UserError
from trainer.params import Row, digest, label_table, label_tree

GROUPS = {"decayed": config.Group(weight_decay=0.1), "plain": config.Group()}
RULES = ((r".*/kernel", "decayed"), (r".*", "plain"))


def params():
    return {
        "dense": {"bias": np.zeros(3, np.float32), "kernel": np.zeros((2, 3), np.float32)},
        "scale": jnp.zeros((), jnp.bfloat16),
    }


def table_of(tree=None, rules=RULES, groups=GROUPS):
    tree = params() if tree is None else tree
    return label_table(tree, label_tree(tree, rules, groups), groups)


def test_labels_have_the_structure_of_the_parameters():
    assert label_tree(params(), RULES, GROUPS) == {"dense": {"bias": "plain", "kernel": "decayed"}, "scale": "plain"}


def test_parameter_without_a_rule_is_named():
    with pytest.raises(UserError, match=r"no label rule matches scale; rules match whole paths"):
        label_tree(params(), ((r".*/kernel", "decayed"), (r"dense/bias", "plain")), GROUPS)


def test_rule_that_decides_nothing_is_named():
    with pytest.raises(UserError, match=r"label rule 'norm/\.\*' matches no parameter; paths look like"):
        label_tree(params(), ((r"norm/.*", "plain"), *RULES), GROUPS)


def test_label_without_a_group_gets_the_nearest_name():
    with pytest.raises(UserError, match=r"label 'decaied' has no group .* did you mean 'decayed'\?"):
        label_tree(params(), ((r".*/kernel", "decaied"), (r".*", "plain")), GROUPS)


def test_group_without_a_parameter_is_named():
    with pytest.raises(UserError, match="group 'frozen' has no parameter"):
        label_tree(params(), RULES, GROUPS | {"frozen": config.Group()})


def test_table_has_a_row_for_each_parameter():
    assert table_of() == [
        Row("dense/bias", (3,), "float32", "plain", "0", 3, 12),
        Row("dense/kernel", (2, 3), "float32", "decayed", "0.1", 6, 24),
        Row("scale", (), "bfloat16", "plain", "0", 1, 2),
    ]


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
def test_digest_changes_with_every_property_of_a_parameter(change):
    assert digest(change(params())) != digest(table_of())


@pytest.mark.parametrize("column", [field.name for field in dataclasses.fields(Row)])
def test_digest_covers_every_column(column):
    rows = table_of()
    value = getattr(rows[0], column)
    other: dict[str, Any] = {column: value + value if value else 1.0}
    assert digest([dataclasses.replace(rows[0], **other), *rows[1:]]) != digest(rows)


def test_digest_depends_neither_on_values_nor_on_how_rules_are_written():
    tree = params()
    tree["dense"]["kernel"] += 1
    rules = ((r"dense/bias", "plain"), (r"scale", "plain"), (r"dense/kernel", "decayed"))
    assert digest(table_of(tree, rules=rules, groups=dict(reversed(GROUPS.items())))) == digest(table_of())
