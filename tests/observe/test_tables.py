"""Tables as plain text."""

import re
from typing import Any

import jax
import jax.numpy as jnp
from trainer.observe.tables import label_table_text, table

from trainer.config import Group, Optimizer, Schedule
from trainer.params import label_table

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


def optimizer_of(groups: dict[str, Group], **settings: Any) -> Optimizer:
    return Optimizer(schedule=Schedule("cosine", peak=0.02, final=1e-3), groups=groups, **settings)


def test_the_label_table_has_every_parameter_then_the_sums_then_every_label_with_its_settings():
    labels = {"dense": {"kernel": "decayed", "bias": "plain"}, "scale": "plain"}
    optimizer = optimizer_of({"decayed": Group(weight_decay=0.05), "plain": Group()})
    assert label_table_text(label_table(PARAMS, labels, optimizer.groups), optimizer) == (
        "path          shape   dtype     label    weight decay  parameters   bytes\n"
        "dense/bias    3       bfloat16  plain               0           3       6\n"
        "dense/kernel  1200×3  float32   decayed          0.05       3,600  14,400\n"
        "scale         scalar  float32   plain               0           1       4\n"
        "total                                                       3,604  14,410\n"
        "\n"
        "label    parameters  optimizer  learning rate        weight decay  clip norm  updated     moments\n"
        "decayed       3,600  adabelief  cosine 0.02 → 0.001  0.05          -          every step  float32\n"
        "plain             4  adabelief  cosine 0.02 → 0.001  0             -          every step  float32\n"
    )


def test_the_label_table_shows_every_setting_of_a_group():
    labels = {"dense": {"kernel": "all", "bias": "still"}, "scale": "other"}
    every = Group(
        decay_schedule=Schedule("linear", peak=0.1),
        optimizer="adam",
        schedule=Schedule(peak=0.5),
        lr_multiplier=0.1,
        clip_norm=2.0,
        every_steps=5,
        nu_dtype="bfloat16",
    )
    groups = {"all": every, "still": Group(frozen=True), "other": Group(weight_decay=0.1, optimizer="sgd")}
    optimizer = optimizer_of(groups, decay="coupled", clip_norm=3.0, mu_dtype="bfloat16")
    text = label_table_text(label_table(PARAMS, labels, groups), optimizer).split("\n\n")[1]
    cells = [re.split(r" {2,}", line) for line in text.splitlines()[1:]]
    assert cells == [
        ["all", "3,600", "adam", "0.5 × 0.1", "linear 0.1 coupled", "2, 3 of all", "every 5 steps", "bfloat16"],
        ["still", "3", "frozen", "-", "-", "-", "-", "-"],
        ["other", "1", "sgd", "cosine 0.02 → 0.001", "0.1 coupled", "3 of all", "every step", "bfloat16"],
    ]
