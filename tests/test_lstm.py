"""The LSTM: its arithmetic against NumPy in float64, its dropout, and the state that streams carry between batches."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.lstm import LSTMLanguageModel
from experiments.words import Vocabulary
from tests.launched import StopsAt, launch, program_of
from trainer import config, train
from trainer.data import eval_source
from trainer.data.stream import eval_batches, train_batches
from trainer.errors import UserError
from trainer.evaluation import evaluate_split
from trainer.observe.log import read_rows
from trainer.program import build_program

VOCAB, WIDTH, HIDDEN, LENGTH, STREAMS = 12, 4, 8, 4, 4
LAYERS = ("lstm_0", "lstm_1")


def task(**settings: Any) -> LSTMLanguageModel:
    sizes: dict[str, Any] = {"vocab": VOCAB, "width": WIDTH, "hidden": HIDDEN, "layers": 2, "length": LENGTH}
    return LSTMLanguageModel(**sizes | {"streams": STREAMS, "eval_streams": 3} | settings)


def make_batch(seed: int = 0) -> dict[str, Any]:
    """Pieces of three of four streams; the first begins, the second is short."""
    tokens = np.random.default_rng(seed).integers(0, VOCAB, (3, LENGTH + 1), np.uint8)
    whole: dict[str, Any] = {
        "tokens": tokens,
        "targets": np.array([LENGTH, 2, LENGTH], np.int32),
        "bytes": np.array([9, 5, 8], np.int32),
        "stream": np.array([2, 0, 3], np.int32),
        "piece": np.array([0, 1, 7], np.int32),
        "mask": np.ones(3, np.float32),
    }
    return jax.tree.map(jnp.asarray, whole)


@functools.cache
def variables() -> Any:
    """Random parameters of the size of fresh ones, and a random carried state."""
    batch = {**make_batch(), "tokens": jnp.zeros((2, LENGTH + 1), jnp.uint8)}
    shapes = nn.unbox(jax.eval_shape(task().init, jax.random.key(0), batch))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(rng.uniform(-0.7, 0.7, x.shape), x.dtype), shapes)


@functools.cache
def _step(settings: tuple[tuple[str, Any], ...]) -> Any:
    def loss(params: Any, carry: Any, batch: Any, key: Any) -> Any:
        values = {"params": params, "carry": carry}
        metrics, collections = task(**dict(settings)).loss(values, batch, key=key, train=True)
        return metrics["loss"].total, (metrics, collections["carry"])

    return jax.jit(jax.grad(loss, has_aux=True))


def step(values: Any, batch: Any, seed: int = 0, **settings: Any) -> tuple[Any, Any, Any]:
    """The gradient, the metrics and the carry of a training step."""
    found = _step(tuple(settings.items()))(values["params"], values["carry"], batch, jax.random.key(seed))
    return found[0], *found[1]


def in_float64(tree: Any) -> Any:
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def reference(params: Any, tokens: np.ndarray, states: Any) -> tuple[np.ndarray, Any]:
    """The logits after each token of one row in float64, unit by unit, and the state after the last."""
    logits = []
    for token in tokens:
        x, after = params["embed"]["embedding"][token], {}
        for name in LAYERS:
            layer, state = params[name], states[name]
            units = len(state["hidden"])
            hidden, cell = np.zeros(units), np.zeros(units)
            for unit in range(units):
                write, keep, new, read = (
                    x @ layer["input_kernel"][:, column]
                    + state["hidden"] @ layer["hidden_kernel"][:, column]
                    + layer["bias"][column]
                    for column in range(unit, 4 * units, units)
                )
                cell[unit] = sigmoid(keep) * state["cell"][unit] + sigmoid(write) * np.tanh(new)
                hidden[unit] = sigmoid(read) * np.tanh(cell[unit])
            after[name] = {"hidden": hidden, "cell": cell}
            x = hidden
        logits.append(params["embed"]["embedding"] @ x + params["head_bias"])
        states = after
    return np.stack(logits), states


def cross_entropies(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(targets)), targets]


def row_states(carry: Any, stream: int, piece: int) -> Any:
    return jax.tree.map(lambda x: x[stream] * (piece > 0), carry)


def rows_of(batch: Any) -> Iterator[Any]:
    """(tokens, stream, piece, targets) of each row."""
    return zip(*(np.asarray(batch[name]) for name in ("tokens", "stream", "piece", "targets")), strict=True)


def reference_total(params: Any, carry: Any, batch: Any) -> float:
    """The sum of the losses of the tokens that count."""
    total = 0.0
    for tokens, stream, piece, targets in rows_of(batch):
        logits, _ = reference(params, tokens[:-1], row_states(carry, stream, piece))
        total += cross_entropies(logits, tokens[1:])[:targets].sum()
    return total


def test_loss_and_carried_state_are_those_of_a_float64_loop_over_units():
    values, batch = variables(), make_batch()
    _, metrics, carry = step(values, batch)
    exact = in_float64(values)
    total = reference_total(exact["params"], exact["carry"], batch)
    assert set(metrics) == {"loss", "perplexity", "bits_per_byte", "accuracy"}
    np.testing.assert_allclose(metrics["loss"].total, total, rtol=1e-5)
    assert float(metrics["loss"].weight) == 2 * LENGTH + 2
    assert metrics["perplexity"].compute() == pytest.approx(np.exp(total / (2 * LENGTH + 2)), rel=1e-5)
    assert metrics["bits_per_byte"].compute() == pytest.approx(total / np.log(2) / 22, rel=1e-5)
    after = exact["carry"]
    for tokens, stream, piece, _ in rows_of(batch):
        _, states = reference(exact["params"], tokens[:-1], row_states(exact["carry"], stream, piece))
        for name, kind in itertools.product(LAYERS, ("hidden", "cell")):
            after[name][kind] = after[name][kind].copy()
            after[name][kind][stream] = states[name][kind]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), carry, after)
    np.testing.assert_array_equal(carry["lstm_0"]["cell"][1], values["carry"]["lstm_0"]["cell"][1])  # not in the batch


def test_the_gradient_is_that_of_the_float64_loop_with_the_carried_state_held_fixed():
    values, batch, small = variables(), make_batch(), 1e-5
    gradient, _, _ = step(values, batch)
    exact, rng = in_float64(values), np.random.default_rng(0)
    for path, array in jax.tree_util.tree_leaves_with_path(exact["params"]):
        found = gradient
        for key in path:
            found = found[key.key]
        for place in {tuple(rng.integers(0, array.shape)) for _ in range(4)}:
            was, totals = array[place], []
            for change in (-small, small):
                array[place] = was + change
                totals.append(reference_total(exact["params"], exact["carry"], batch))
            array[place] = was
            assert (totals[1] - totals[0]) / (2 * small) == pytest.approx(float(found[place]), rel=1e-4, abs=1e-4)


def test_an_evaluation_reads_whole_rows_from_a_state_of_zeros():
    tokens = np.random.default_rng(3).integers(0, VOCAB, (2, 3 * LENGTH - 1), np.uint8)  # no whole number of pieces
    targets = np.array([3 * LENGTH - 2, 5], np.int32)
    batch: Any = {"tokens": jnp.asarray(tokens), "targets": jnp.asarray(targets), "mask": jnp.ones(2)}
    metrics, collections = jax.jit(lambda v, b: task().loss(v, b, key=jax.random.key(0), train=False))(
        variables(), batch
    )
    assert collections == {}
    exact, total = in_float64(variables()), 0.0
    for row, count in zip(tokens, targets, strict=True):
        logits, _ = reference(exact["params"], row[:-1], row_states(exact["carry"], 0, 0))
        total += cross_entropies(logits, row[1:])[:count].sum()
    np.testing.assert_allclose(metrics["loss"].total, total, rtol=1e-5)
    assert float(metrics["loss"].weight) == targets.sum()


def outputs_of(seed: int = 0, **settings: Any) -> Any:
    """The results of the model while training, and those of its submodules."""
    model, batch = task(**settings)._model(train=True), make_batch()
    return jax.jit(
        lambda values: model.apply(
            {"params": values["params"]},
            batch["tokens"].astype(jnp.int32),
            model.zeros(3),
            rngs={"dropout": jax.random.key(seed)},
            capture_intermediates=True,
            mutable=["intermediates"],
        )
    )(variables())


def test_dropout_masks_hold_for_a_whole_piece_and_keep_the_mean():
    rates = {"input_dropout": 0.5, "hidden_dropout": 0.5, "output_dropout": 0.5}
    outputs, kept = outputs_of(**rates)
    found = kept["intermediates"]
    embedded = variables()["params"]["embed"]["embedding"][make_batch()["tokens"]]
    pairs = {
        "input": (embedded, found["input_dropout"]["__call__"][0]),
        "hidden": (found["lstm_0"]["__call__"][0][0], found["hidden_0_dropout"]["__call__"][0]),
        "output": (outputs.raw, outputs.dropped),
    }
    masks = {}
    for name, (before, after) in pairs.items():
        is_kept = np.asarray(after) != 0
        assert (is_kept == is_kept[:, :1]).all(), name  # the same for every token
        np.testing.assert_allclose(after, np.where(is_kept, 2 * np.asarray(before), 0), rtol=1e-6)
        masks[name] = is_kept[:, 0]
        assert 0 < masks[name].mean() < 1
    assert not (masks["input"] == masks["output"]).all()
    without, _ = outputs_of()
    np.testing.assert_array_equal(without.raw, without.dropped)


def test_word_dropout_takes_whole_words_and_weight_dropout_single_weights():
    _, kept = outputs_of(word_dropout=0.5, weight_dropout=0.5)
    table = np.asarray(kept["intermediates"]["word_dropout"]["__call__"][0])
    is_kept = table != 0
    assert (is_kept == is_kept[:, :1]).all()
    assert 0 < is_kept.mean() < 1
    for name in LAYERS:
        kernel = np.asarray(kept["intermediates"][name]["weight_dropout"]["__call__"][0])
        expected = 2 * np.asarray(variables()["params"][name]["hidden_kernel"])
        np.testing.assert_array_equal(kernel, np.where(kernel != 0, expected, 0))
        assert 0.2 < (kernel != 0).mean() < 0.8
        assert len(np.unique((kernel != 0).sum(axis=0))) > 1


def test_penalties_are_mean_squares_of_outputs_and_of_their_changes_and_no_part_of_the_perplexity():
    batch = make_batch() | {"targets": jnp.full(3, LENGTH)}
    settings = {"activation_penalty": 2.0, "slowness_penalty": 3.0}
    _, with_both, _ = step(variables(), batch, **settings)
    _, without, _ = step(variables(), batch)
    exact, hidden = in_float64(variables()), []
    for tokens, stream, piece, _ in rows_of(batch):
        states, rows = row_states(exact["carry"], stream, piece), []
        for token in tokens[:-1]:
            _, states = reference(exact["params"], np.array([token]), states)
            rows.append(states[LAYERS[-1]]["hidden"])
        hidden.append(rows)
    mean = 2 * np.mean(np.square(hidden)) + 3 * np.mean(np.square(np.diff(hidden, axis=1)))
    added = (with_both["loss"].total - without["loss"].total) / without["loss"].weight
    np.testing.assert_allclose(added, mean, rtol=1e-4)
    np.testing.assert_allclose(with_both["perplexity"].compute(), without["perplexity"].compute(), rtol=1e-6)


TEXT = " no it was n't <unk> \n the cat sat \n no cat <unk> the mat \n"  # in the format of ptb.train.txt


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Text files of words: 10 kinds in the training split, and a word in the validation split that is not there."""
    folder = tmp_path_factory.mktemp("words")
    rng = np.random.default_rng(0)
    kinds = Vocabulary(TEXT).words
    lines = [" ".join(rng.choice(kinds[:5] + kinds[6:], rng.integers(3, 9))) for _ in range(30)]
    (folder / "ptb.train.txt").write_text(TEXT + "".join(f" {line} \n" for line in lines))
    (folder / "ptb.valid.txt").write_text(" the dog sat \n it was the cat \n")
    return str(folder / "ptb.{split}.txt")


def test_words_are_numbered_as_they_appear_and_lines_end_in_eos():
    words = Vocabulary(TEXT)
    assert words.words == ["no", "it", "was", "n't", "<unk>", "<eos>", "the", "cat", "sat", "mat"]
    assert words.encode("the dog sat\n").tolist() == [6, 4, 8, 5]
    assert words.decode([6, 7, 5, 0, 1, 5]) == "the cat\nno it\n"
    assert words.decode([5, 6, 5, 5, 5, 7]) == "\nthe\n\n\ncat"
    assert words.decode([]) == ""
    assert words.byte_counts.sum() == sum(len(word) + 1 for word in words.words if word != "<eos>")
    with pytest.raises(UserError, match="the word 'dog' is not in the training text, nor is <unk>"):
        Vocabulary("a b\n").encode("a dog")


def test_the_training_source_has_each_token_but_the_first_as_a_target_once_and_rows_continue_rows(files):
    source = task(files=files).source("train")
    written = Path(files.format(split="train")).read_text()
    text = Vocabulary(written).encode(written)
    pieces = len(source) // STREAMS
    streams = [[source[STREAMS * i + b] for i in range(pieces)] for b in range(STREAMS)]
    found = [text[0]]
    for piece in itertools.chain(*streams):
        count = piece["targets"]
        assert count == 0 or piece["tokens"][0] == found[-1]
        found += piece["tokens"][1 : 1 + count].tolist()
    np.testing.assert_array_equal(found, text)
    assert sum(piece["bytes"] for piece in itertools.chain(*streams)) == Vocabulary(TEXT).byte_counts[text[1:]].sum()


def test_batches_hold_the_next_piece_of_each_stream_on_any_number_of_processes_and_from_any_step(files):
    source = task(files=files).source("train")
    pieces = len(source) // STREAMS
    every: dict[str, Any] = {"seed": 7, "batch_size": STREAMS, "stop": 2 * pieces}
    batches = list(train_batches(source, start=0, **every))
    for i, batch in enumerate(batches):
        assert batch["stream"].tolist() == list(range(STREAMS))
        assert batch["piece"].tolist() == [i % pieces] * STREAMS
    for start, positions in ((3, np.array([1, 3])), (pieces + 1, np.array([0]))):
        own = train_batches(source, start=start, local_positions=positions, **every)
        for batch, whole in zip(own, batches[start:], strict=True):
            for name, array in batch.items():
                np.testing.assert_array_equal(array, whole[name][positions])


def test_an_evaluation_has_each_token_but_the_first_as_a_target_once(files):
    source = eval_source(task(files=files).source("valid"))
    (batch,) = eval_batches(source, len(source))
    rows = zip(batch["tokens"], batch["targets"], strict=True)
    found = np.concatenate([tokens[1 : 1 + count] for tokens, count in rows])
    assert len(source) == 3
    words = Vocabulary(Path(files.format(split="train")).read_text())
    assert words.decode([batch["tokens"][0, 0], *found]) == "the <unk> sat\nit was the cat\n"
    assert batch["bytes"].sum() == len("<unk> sat\nit was the cat\n")


def run_of(files: str, steps: int = 6, **settings: Any) -> config.Run:
    """A run with dropout everywhere."""
    rates = dict.fromkeys(("input_dropout", "hidden_dropout", "output_dropout", "weight_dropout"), 0.2)
    fields: dict[str, Any] = {
        "experiment": task(files=files, **rates),
        "batch_size": STREAMS,
        "optimizer": config.Optimizer(schedule=config.Schedule("constant", peak=1e-2), clip_norm=0.25),
        "evaluation": config.Evaluation(split="valid", batch_size=4),
        "logging": config.Logging(every_steps=1),
        "parallel": config.Parallel(devices=1),
    }
    return config.resolve(config.Run(total_steps=steps, **fields | settings))


def test_the_training_split_is_evaluated_as_whole_streams_too(files):
    run = run_of(files, experiment=task(files=files), evaluations={"fit": config.Evaluation("train", batch_size=2)})
    program = program_of(run)
    state, written = program.init(), Path(files.format(split="train")).read_text()
    source = program.evaluations["fit"].source
    assert len(source) == 3
    found = evaluate_split(program, state, source, name="fit")
    params, text, total = in_float64(state.params), Vocabulary(written).encode(written), 0.0
    length = -(-(len(text) - 1) // 3)
    for start in range(0, len(text) - 1, length):
        tokens = text[start : start + length + 1]
        logits, _ = reference(params, tokens[:-1], row_states(in_float64(state.collections["carry"]), 0, 0))
        total += cross_entropies(logits, tokens[1:]).sum()
    assert found["fit/loss"] == pytest.approx(total / (len(text) - 1), rel=1e-4)


def test_any_split_is_trained_on_as_pieces_and_evaluated_as_streams(files, tmp_path):
    run = run_of(files, steps=1, loading=config.Loading(split="valid"))
    train(run, tmp_path / "run", verbose=False)
    (row,) = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "valid/loss" in row]
    assert row["valid/examples"] == 3


@pytest.mark.slow
def test_a_resumed_run_carries_the_same_state_bit_for_bit(files, tmp_path):
    whole = launch(run_of(files), tmp_path / "whole")
    assert int(launch(run_of(files), tmp_path / "parts", hooks=[StopsAt(3)]).step) == 3
    resumed = launch(run_of(files), tmp_path / "parts")
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(whole.collections["carry"]))
    kept, expected = (read_rows(tmp_path / name / "metrics.jsonl") for name in ("parts", "whole"))
    losses = [[row["train/loss"] for row in rows if "train/loss" in row] for rows in (kept, expected)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6


PLACES: dict[str, dict[str, Any]] = {
    "one": {},
    "fsdp": {"parallel": config.Parallel("fsdp", devices=2)},
    "tensor": {"parallel": config.Parallel("tensor", devices=2)},
    "pmap": {"parallel": config.Parallel("pmap", devices=2)},
    "microbatches": {"microbatches": 2},
}


@functools.cache
def losses_and_carry(files: str, place: str) -> tuple[list[float], Any]:
    """Without dropout, whose masks differ between replicas and microbatches."""
    program = program_of(run_of(files, experiment=task(files=files), **PLACES[place]))
    state, losses = program.init(), []
    for batch in train_batches(program.train_source, seed=0, batch_size=STREAMS, start=0, stop=4):
        state, metrics = program.train_step(state, program.strategy.shard_batch(batch))
        losses.append(float(metrics["loss"].total))
    return losses, jax.device_get(state.collections)


@pytest.mark.slow
@pytest.mark.parametrize(
    "place", ["fsdp", *(pytest.param(p, marks=pytest.mark.exhaustive) for p in ("pmap", "microbatches", "tensor"))]
)
def test_every_strategy_and_microbatches_carry_the_same_state(files, place):
    losses, carry = losses_and_carry(files, place)
    expected_losses, expected = losses_and_carry(files, "one")
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), carry, expected)


def test_batches_of_half_the_streams_carry_the_state_of_all(files):
    run = run_of(files, experiment=task(files=files), batch_size=STREAMS // 2)
    program = build_program(run)
    state = program.init()
    for i, batch in enumerate(train_batches(program.train_source, seed=0, batch_size=2, start=0, stop=2)):
        assert batch["stream"].tolist() == [2 * i, 2 * i + 1]
        state, _ = program.train_step(state, batch)
        hidden = np.asarray(state.collections["carry"]["lstm_0"]["hidden"])
        assert (hidden != 0).all(axis=1).tolist() == [True, True, i == 1, i == 1]


def test_generated_words_are_the_likeliest_of_the_float64_loop(files):
    model, values = task(files=files), variables()
    text = model.generate(values, "the cat", 9, key=jax.random.key(0), temperature=0.0)
    words, exact = Vocabulary(Path(files.format(split="train")).read_text()), in_float64(values)
    tokens = words.encode("the cat").tolist()
    for _ in range(9):
        logits, _ = reference(exact["params"], tokens, row_states(exact["carry"], 0, 0))
        tokens.append(int(logits[-1].argmax()))
    assert text == words.decode(tokens)


def test_mistakes_are_one_line(files, tmp_path):
    run = run_of(files, batch_size=3)
    with pytest.raises(UserError, match=r"batch_size 3 does not divide experiment.streams 4: set both alike"):
        build_program(run)
    with pytest.raises(UserError, match=r"no file .*ptb.test.txt, the text of the split 'test'"):
        task(files=files).source("test")
    with pytest.raises(UserError, match=r"the text has 10 kinds of tokens; experiment.vocab is 9"):
        task(files=files, vocab=9).source("train")
    with pytest.raises(UserError, match=r"a path with \{split\} in it is expected"):
        task(files=str(tmp_path)).prepare()
    (tmp_path / "a.train.txt").write_text("word")
    with pytest.raises(UserError, match="the split 'train' has 1 tokens; 2 or more are needed"):
        task(files=str(tmp_path / "a.{split}.txt")).source("train")
    with pytest.raises(UserError, match="the prompt is empty"):
        task(files=files).generate(variables(), " ", 1, key=jax.random.key(0))


def test_every_parameter_has_an_axis_name_for_each_dimension():
    boxed = jax.eval_shape(task().init, jax.random.key(0), {**make_batch(), "tokens": jnp.zeros((2, LENGTH + 1))})
    leaves = jax.tree.leaves(boxed["params"], is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    assert len(leaves) == 2 + 3 * len(LAYERS)
    for box in leaves:
        assert isinstance(box, nn.LogicallyPartitioned)
        assert len(box.names) == box.value.ndim
        assert set(box.names) <= {"vocab", "embed", "mlp"}


def test_the_fields_of_the_config_reach_the_model():
    names = {field.name for field in dataclasses.fields(type(task()._model(train=True)))} - {"parent", "name", "train"}
    assert names <= {field.name for field in dataclasses.fields(LSTMLanguageModel)}
