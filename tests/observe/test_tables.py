"""Tables as plain text."""

from trainer.observe import table


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
