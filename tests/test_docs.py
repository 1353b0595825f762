"""What docs/ says in Python is true, and what it points at is there."""

import math
import re
from pathlib import Path

import optax
import pytest

from trainer import config
from trainer.optim.adabelief import ScaleByBeliefState

ROOT = Path(__file__).parents[1]
ADABELIEF = (ROOT / "docs" / "adabelief.md").read_text()


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", ADABELIEF, re.DOTALL)


def test_settings_of_cifar_are_a_config_that_resolves():
    (text,) = [block for block in blocks() if block.startswith("Optimizer(")]
    optimizer = eval(text, vars(config))
    assert optimizer.schedule.boundaries == (150,)
    assert optimizer.groups["all"].weight_decay == 5e-4


def test_migration_example_carries_the_state_over():
    (text,) = [block for block in blocks() if "from_optax" in block]
    names: dict = {}
    exec(text, names)
    assert isinstance(names["state"], ScaleByBeliefState)
    assert int(optax.tree.get(names["state"], "count")) == 2


def test_floors_are_those_of_the_formula():
    found = re.findall(r"^  \| (1e-\d+)[^|]*\| ([\d.e-]+) \|$", ADABELIEF, re.MULTILINE)
    assert len(found) == 4
    for eps_root, floor in found:
        assert math.sqrt(float(eps_root) / (1 - 0.999)) == pytest.approx(float(floor), rel=0.02)


def test_fields_of_a_group_are_those_that_there_are():
    table = ADABELIEF.split("| field of `Group` |")[1].split("\n\n")[0]
    named = set(re.findall(r"`(\w+)`", "\n".join(line.split("|")[1] for line in table.splitlines()[2:])))
    assert named == set(vars(config.Group()))


@pytest.mark.parametrize("target", sorted(set(re.findall(r"(?:configs|tests|trainer)/[\w/]+\.py", ADABELIEF))))
def test_files_that_are_named_are_there(target):
    assert (ROOT / target).is_file()
