"""A part of `benchmarks/damage.py`: a damaged workdir goes on bit for bit, or is refused in one line."""

from pathlib import Path

import pytest

from benchmarks import damage
from benchmarks.damage import DAMAGES, EARLIER, FAILED, NEWEST, REFUSED, SAID, UNNOTICED, Case, flip, try_it
from experiments.toy import Toy

STEP = f"checkpoints/{NEWEST}"


class Undrawn(Toy):
    """Makes no picture: drawing it would take most of a launch."""

    def report(self, step, variables, writer):
        pass


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return damage.make_case(tmp_path_factory.mktemp("damage"), Undrawn())


@pytest.mark.slow
@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.parametrize(
    ("place", "kinds"),
    [
        (f"{STEP}/metadata/metadata", {EARLIER}),
        (f"{STEP}/state/manifest.ocdbt", {EARLIER}),
        (f"{STEP}/state", {EARLIER, UNNOTICED}),  # a stray file is nothing
        ("metrics.jsonl", {SAID, REFUSED}),
        ("config.json", {SAID, REFUSED}),
        ("tensorboard/.written.json", {UNNOTICED}),
    ],
)
def test_a_damaged_file_costs_one_line_and_no_bit(case, tmp_path, name, place, kinds):
    outcome = try_it(case, DAMAGES[name], place, tmp_path)
    assert outcome.kind in kinds, outcome.text


@pytest.mark.slow
@pytest.mark.parametrize("flips", [4, pytest.param(12, marks=pytest.mark.exhaustive)])
def test_a_flipped_bit_costs_no_bit(case, tmp_path, flips):
    kinds = [try_it(case, flip(bit), place, tmp_path).kind for place, bit in damage.flips(case, flips, seed=1)]
    assert set(kinds) <= {UNNOTICED, EARLIER}
    assert EARLIER in kinds


@pytest.mark.slow
def test_a_launch_with_other_numbers_would_be_seen(case, tmp_path):
    """The comparison itself: a changed digit of a row that is cut off changes nothing, one of a kept row is seen."""

    def change(file: Path) -> None:
        lines = file.read_text().splitlines(keepends=True)
        lines[0] = lines[0].replace("2.75", "2.25", 1)
        file.write_text("".join(lines))

    assert try_it(case, change, "metrics.jsonl", tmp_path).kind == FAILED
