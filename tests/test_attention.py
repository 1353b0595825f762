"""Attention by name, and documents packed into rows: each is as if it were alone."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from experiments.attention import ATTENTIONS, attend
from experiments.language_model import LanguageModel
from experiments.transformer import token_positions

LENGTHS = ((7, 1, 12, 5), (20, 6))  # of the documents in each row; the rest of a row is padding
LENGTH = 28  # targets of a row


def assert_close(actual: Any, expected: Any) -> None:
    """Equal up to a few roundings in float32."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), actual, expected)


def inputs(length: int, heads: int, kv_heads: int, rows: int = 2) -> list[Any]:
    rng = np.random.default_rng(length)
    return [jnp.asarray(rng.normal(size=(rows, length, n, 8)), jnp.float32) for n in (heads, kv_heads, kv_heads)]


def mixed_and_gradients(name: str) -> Any:
    """Jitted: the result of attention, and the gradients of a sum over it with weights of both signs."""

    def total(query: Any, key: Any, value: Any, segments: Any) -> Any:
        mixed = attend(name, query, key, value, segments)
        return jnp.sum(mixed * jnp.cos(jnp.arange(mixed.size).reshape(mixed.shape))), mixed

    return jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))


def by_hand(query: Any, key: Any, value: Any, segments: np.ndarray) -> np.ndarray:
    """Attention in float64, one position and head at a time."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    mixed, group = np.zeros_like(query), query.shape[2] // key.shape[2]
    for row, t, head in np.ndindex(query.shape[:3]):
        seen = [s for s in range(t + 1) if segments[row, s] == segments[row, t]]
        scores = key[row, seen, head // group] @ query[row, t, head] / np.sqrt(query.shape[-1])
        weights = np.exp(scores - scores.max())
        mixed[row, t, head] = weights @ value[row, seen, head // group] / weights.sum()
    return mixed


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_is_that_of_a_float64_loop_over_positions_and_heads(name):
    segments = np.repeat([[1, 2, 3, 0], [1, 1, 2, 3]], 5, axis=1)
    query, key, value = inputs(20, heads=4, kv_heads=2)
    _, mixed = mixed_and_gradients(name)(query, key, value, jnp.asarray(segments))
    assert_close(mixed, by_hand(query, key, value, segments))


@pytest.mark.parametrize(("kv_heads", "packed"), [(4, False), (2, True)])
def test_splash_has_the_results_and_the_gradients_of_plain_attention(kv_heads, packed):
    length = 300  # neither a multiple of the kernel's block nor within one
    segments = jnp.asarray(np.sort(np.random.default_rng(0).integers(1, 5, (2, length)))) if packed else None
    arguments = (*inputs(length, 4, kv_heads), segments)
    assert_close(mixed_and_gradients("splash")(*arguments), mixed_and_gradients("plain")(*arguments))


def test_in_bfloat16_splash_is_as_near_to_float32_as_plain_attention():
    exact = inputs(130, heads=2, kv_heads=1)
    _, expected = mixed_and_gradients("plain")(*exact, None)
    errors = {}
    for name in ATTENTIONS:
        _, mixed = mixed_and_gradients(name)(*(x.astype(jnp.bfloat16) for x in exact), None)
        assert mixed.dtype == jnp.bfloat16
        errors[name] = np.linalg.norm(mixed.astype(jnp.float32) - expected) / np.linalg.norm(expected)
    assert 1e-4 < errors["splash"] < 2 * errors["plain"] < 0.02  # bfloat16 has 8 bits of precision


@pytest.mark.parametrize("name", ATTENTIONS)
def test_heads_sharded_over_more_devices_than_there_are_key_heads_give_the_same(name):
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    rules = [("batch", "data"), ("heads", "tensor")]
    segments = jnp.asarray(np.repeat([[1, 2], [1, 0]], 12, axis=1))
    arguments = (*inputs(24, heads=4, kv_heads=1), segments)
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        found = mixed_and_gradients(name)
        assert "shard_map" in str(found.trace(*arguments).jaxpr) or name == "plain"
        actual = jax.device_get(found(*arguments))
    assert_close(actual, mixed_and_gradients("plain")(*arguments))


def test_positions_begin_anew_at_each_document():
    segments = jnp.array([[1, 1, 1, 2, 3, 3, 0, 0], [4, 4, 4, 4, 4, 4, 4, 4]])
    expected = [[0, 1, 2, 0, 0, 1, 0, 1], list(range(8))]
    assert token_positions(8, segments).positions.tolist() == expected
    assert token_positions(8).positions.tolist() == expected[1]


def documents() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, size) for lengths in LENGTHS for size in lengths]


def packed() -> dict[str, Any]:
    """The documents as the data has them: uint16 tokens, uint8 segments."""
    tokens, segments = np.zeros((2, LENGTH + 1), np.uint16), np.zeros((2, LENGTH + 1), np.uint8)
    left = iter(documents())
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for number, size in enumerate(lengths, 1):
            tokens[row, start : start + size] = next(left)
            segments[row, start : start + size] = number
            start += size
    return {"tokens": jnp.asarray(tokens), "segments": jnp.asarray(segments), "mask": jnp.ones(2)}


def alone() -> dict[str, Any]:
    """A row for each document, of which `targets` count."""
    rows = documents()
    tokens = np.zeros((len(rows), LENGTH + 1), np.uint16)
    for row, document in zip(tokens, rows, strict=True):
        row[: len(document)] = document
    targets = jnp.array([len(document) - 1 for document in rows])
    return {"tokens": jnp.asarray(tokens), "targets": targets, "mask": jnp.ones(len(rows))}


def task(**settings: Any) -> LanguageModel:
    sizes: dict[str, Any] = {"length": LENGTH, "width": 16, "heads": 4, "kv_heads": 2, "mlp_width": 16}
    return LanguageModel(**sizes | settings)


@functools.cache
def parameters() -> Any:
    return nn.unbox(jax.jit(task().init)(jax.random.key(0), packed()))


def gradient_and_metrics(batch: Any, **settings: Any) -> Any:
    def loss(values: Any) -> Any:
        metrics, _ = task(**settings).loss(values, batch, key=jax.random.key(0), train=True)
        return metrics["loss"].total, metrics

    return jax.jit(jax.grad(loss, has_aux=True))(parameters())


@functools.cache
def apart() -> Any:
    return gradient_and_metrics(alone())


@pytest.mark.parametrize("name", ATTENTIONS)
def test_packed_documents_have_the_loss_and_the_gradient_of_each_document_alone(name):
    gradient, metrics = gradient_and_metrics(packed(), attention=name)
    expected_gradient, expected = apart()
    assert float(metrics["loss"].weight) == sum(size - 1 for lengths in LENGTHS for size in lengths)
    assert_close((gradient, metrics), (expected_gradient, expected))


def test_the_log_likelihood_of_a_row_is_that_of_its_documents():
    together, each = (jax.jit(task().predict)(parameters(), batch) for batch in (packed(), alone()))
    assert together["targets"].tolist() == [21, 24]
    rows = np.split(np.asarray(each["log_likelihood"]), [len(LENGTHS[0])])
    assert_close(together["log_likelihood"], np.array([row.sum() for row in rows]))


def test_neither_padding_nor_another_document_changes_a_gradient():
    batch = packed()
    other = batch["tokens"].at[:, -2:].set(9)  # padding of both rows
    changed, _ = gradient_and_metrics({**batch, "tokens": other})
    expected, _ = apart()
    assert_close(changed, expected)
    crossing, _ = gradient_and_metrics({**batch, "segments": (batch["segments"] > 0).astype(jnp.uint8)})
    assert np.abs(np.asarray(crossing["params"]["norm"]["scale"] - expected["params"]["norm"]["scale"])).max() > 0.01


def test_bits_per_byte_are_all_bits_by_the_bytes_of_the_rows_that_are_not_masked():
    batch = packed() | {"bytes": jnp.array([50, 70], jnp.int32), "mask": jnp.array([0.0, 1.0])}
    _, metrics = gradient_and_metrics(batch)
    assert float(metrics["loss"].weight) == 24
    assert float(metrics["bits_per_byte"].weight) == 70
    assert float(metrics["bits_per_byte"].total) == pytest.approx(float(metrics["loss"].total) / np.log(2))
    _, metrics = gradient_and_metrics(packed())
    assert float(metrics["bits_per_byte"].weight) == 21 + 24  # each target is a byte
