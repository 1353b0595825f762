"""Tables as plain text."""

import jax
import jax.numpy as jnp

from trainer.config import Group
from trainer.observe.tables import label_table_text, table
from trainer.optim.labels import label_table

PARAMS = {
    "dense": {"kernel": jax.ShapeDtypeStruct((1200, 3), jnp.float32), "bias": jax.ShapeDtypeStruct((3,), jnp.bfloat16)},
    "scale": jax.ShapeDtypeStruct((), jnp.float32),
}


def test_columns_are_as_wide_as_their_widest_cell_and_two_spaces_apart():
    rows = [("a", "1", "x"), ("longer", "23456", "yy")]
    assert table(("name", "n", "end"), rows) == "name    n      end\na       1      x\nlonger  23456  yy\n"


def test_the_columns_named_are_aligned_on_the_right_header_included():
    rows = [("a", "1"), ("longer", "23456")]
    assert table(("name", "number"), rows, right=("number",)) == "name    number\na            1\nlonger   23456\n"


def test_no_line_ends_in_spaces_even_when_its_last_cells_are_empty():
    text = table(("name", "note", "more"), [("a", "", ""), ("b", "long note", ""), ("", "", "")])
    assert text == "name  note       more\na\nb     long note\n\n"


def test_a_table_without_rows_is_its_header():
    assert table(("name", "n"), [], right=("n",)) == "name  n\n"


def test_the_label_table_has_a_line_for_each_parameter_and_the_sums_last():
    labels = {"dense": {"kernel": "decayed", "bias": "plain"}, "scale": "plain"}
    groups = {"decayed": Group(weight_decay=0.05), "plain": Group()}
    assert label_table_text(label_table(PARAMS, labels, groups)) == (
        "path          shape   dtype     label    weight decay  parameters   bytes\n"
        "dense/bias    3       bfloat16  plain               0           3       6\n"
        "dense/kernel  1200×3  float32   decayed          0.05       3,600  14,400\n"
        "scale         scalar  float32   plain               0           1       4\n"
        "total                                                       3,604  14,410\n"
    )
