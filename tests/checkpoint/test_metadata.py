"""Metadata come back as they were, and any change of their file shows."""

import hashlib
import json

import jax.numpy as jnp
import numpy as np
import pytest

from tests.tasks import make_run
from trainer import config
from trainer.checkpoint import DataIdentity, leaf_differences, leaves_of, make_metadata
from trainer.checkpoint.metadata import Leaf, from_json
from trainer.files import DamagedError
from trainer.program import build_program

STATE = {"w": jnp.zeros((2, 3), jnp.bfloat16), "step": jnp.asarray(7)}


@pytest.fixture(scope="module")
def metadata():
    run = config.resolve(make_run())
    made = make_metadata(
        run, build_program(run).param_table, DataIdentity(50, "ab"), 7, row_count=3, accepted=("seed was 0, is 1",)
    )
    return made.with_state(STATE, np.asarray([5, 2**32 - 1], np.uint32))


def test_they_come_back_as_they_were(metadata):
    again = from_json(json.loads(json.dumps(metadata.to_json())))
    assert again.step == 7
    assert again.data == DataIdentity(50, "ab")
    assert again.row_count == 3
    assert again.leaves == {"step": Leaf((), "int32"), "w": Leaf((2, 3), "bfloat16")}
    assert again.checksums == {"step": 5, "w": 2**32 - 1}
    assert tuple(again.accepted) == ("seed was 0, is 1",)
    assert config.from_json(json.dumps(again.config)) == config.resolve(make_run())


def test_every_flipped_bit_of_the_file_is_noticed_or_harmless(metadata):
    text = json.dumps(metadata.to_json()).encode()
    rng = np.random.default_rng(0)
    for position in rng.choice(len(text), 300, replace=False):
        flipped = bytearray(text)
        flipped[position] ^= 1 << int(rng.integers(8))
        try:
            value = json.loads(flipped.decode())
        except ValueError:
            continue
        if value == metadata.to_json():
            continue  # JSON has two spellings of some numbers: 1e-16 and 1E-16
        with pytest.raises(DamagedError):
            from_json(value)


@pytest.mark.parametrize("value", [None, 3, [], {}, {"content": 3}, {"sha256": "0", "content": {}}])
def test_other_json_is_damaged(value):
    with pytest.raises(DamagedError):
        from_json(value)


def test_metadata_of_another_version_are_named(metadata):
    content = metadata.to_json()["content"] | {"format": 1}
    sha256 = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    with pytest.raises(DamagedError, match="another version"):
        from_json({"content": content, "sha256": sha256})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"step": None}, "entry 'step' is missing"),
        ({"rows": "3"}, "entry 'rows' is missing, unknown or of another type"),
        ({"params": []}, "entry 'params' is"),
        ({"leaves": None}, "entry 'leaves' is"),
        ({"new": 1}, "entry 'new' is missing, unknown"),
        ({"leaves": {"w": 3}, "checksums": {"w": 1}}, "not described"),
        ({"data": [1, "a", 2]}, "not described"),
        ({"checksums": {"w": 1}}, "its checksums are not those of its arrays"),
    ],
)
def test_content_with_unknown_or_missing_entries_is_damaged_though_its_hash_is_right(metadata, change, named):
    content = {key: x for key, x in {**metadata.to_json()["content"], **change}.items() if x is not None}
    sha256 = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    with pytest.raises(DamagedError, match=named):
        from_json({"content": content, "sha256": sha256})


def test_differences_of_leaves_name_path_shape_and_dtype():
    here = leaves_of({"a": jnp.zeros(3), "b": jnp.zeros((2, 2)), "c": None})
    there = leaves_of({"a": jnp.zeros(4), "b": jnp.zeros((2, 2)), "c": jnp.zeros(1, jnp.int32)})
    assert leaf_differences(there, here) == [
        "a is float32[4] there, float32[3] here",
        "c is int32[1] there, missing here",
    ]
