"""Topologies: names, memory, links, and errors for unknown names."""

import importlib.util
import math
import os
import subprocess
import sys

import pytest

from trainer.errors import UserError
from trainer.plan.topology import known_shapes, make_topology


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("name", "chips", "gib"),
    [("v4:2x2x4", 16, 32), ("v5e:4x4", 16, 16), ("v5p:2x2x2", 8, 95), ("v6e:4x4", 16, 32), ("v5p:4x4x8", 128, 95)],
)
def test_a_chip_is_a_device_whose_memory_is_nearly_the_published_one(name, chips, gib):
    topology = make_topology(name)
    assert topology.chips == len(topology.devices) == chips
    assert 0.95 * gib * 2**30 <= topology.hbm_bytes <= 1.01 * gib * 2**30


@pytest.mark.tpu
def test_older_chips_are_two_devices():
    assert len(make_topology("v3:2x2").devices) == 8


@pytest.mark.tpu
def test_slices_are_told_apart():
    topology = make_topology("v5e:2x2", slices=2)
    assert topology.chips == 8
    assert sorted(device.slice_index for device in topology.devices) == [0] * 4 + [1] * 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e:4x5", "no topology 'v5e:4x5'; did you mean '4x8'? (known for v5e: 1x1, 2x2, 2x4, 4x4, 4x8, "),
        (
            "v5p:4x4x5",
            "no topology 'v5p:4x4x5'; did you mean '4x4x8'? (known for v5p: 2x2x1, 2x2x2, 2x2x4, 2x4x4, and shapes up ",
        ),
        ("v5:2x2", "no TPU generation 'v5' in topology 'v5:2x2'; did you mean 'v5p'? (known: tpu7x, v2, v3, v4, v5e, "),
        ("v6e", "no topology 'v6e' (known for v6e: 1x1, "),
    ],
)
def test_an_unknown_name_is_an_error_with_the_nearest_and_the_known_ones(name, message):
    with pytest.raises(UserError) as error:
        make_topology(name)
    assert str(error.value).startswith(message)


@pytest.mark.tpu
@pytest.mark.parametrize("generation", ["v2", "v3", "v4", "v5e", "v5p", "v6e", "tpu7x"])
def test_the_smallest_and_the_largest_known_shapes_are_known_to_the_compiler(generation):
    shapes = known_shapes(generation)
    for shape in (shapes[0], shapes[-1]):
        assert make_topology(f"{generation}:{shape}").chips == math.prod(map(int, shape.split("x")))


@pytest.mark.tpu
def test_seconds_are_bytes_over_all_links_that_a_chip_has_in_its_slice():
    sent = 1e9
    assert make_topology("v5e:4x4").seconds(sent) == pytest.approx(sent / (4 * 50e9))
    assert make_topology("v5e:2x4").seconds(sent) == pytest.approx(sent / (3 * 50e9))
    assert make_topology("v5p:4x4x4").seconds(sent) == pytest.approx(sent / (6 * 100e9))
    assert make_topology("v5e:1x1").seconds(sent) is None
    assert make_topology("v3:2x2").seconds(sent) is None
    assert make_topology("v5e:2x2", slices=2).seconds(sent) is None


def test_without_libtpu_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        make_topology("v5e:2x2")
    assert str(error.value) == "planning needs the TPU compiler: pip install 'belief-trainer[tpu]'"


@pytest.mark.tpu
def test_two_processes_plan_at_once_and_print_nothing():
    code = "from trainer.plan.topology import make_topology; assert make_topology('v5e:2x2').chips == 4; input()"
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("TPU_", "ALLOW_"))}
    pipe = subprocess.PIPE
    both = [
        subprocess.Popen([sys.executable, "-c", code], env=clean, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        for _ in range(2)
    ]
    for process in both:
        assert process.communicate("\n", timeout=60) == ("", "")
        assert process.returncode == 0
