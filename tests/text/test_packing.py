"""Packed rows: against a row by row reference, through records and back, and what prepare writes of a small tree."""

import dataclasses
import hashlib
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds

import trainer
from experiments.datasets import packed_text
from experiments.packed_language_model import PackedLanguageModel
from experiments.packing import Layout, PackedSource, pack, segment_dtype, to_record, token_dtype
from experiments.tokenizer import BEGIN, train
from tests.text.kernel_tree import files, settings, small_parts, write_archive
from trainer.config import Evaluation, Group, Optimizer, Run, Schedule
from trainer.data.identity import fingerprint
from trainer.data.memory import load_into_memory
from trainer.data.stream import Batches, eval_batches, train_batches
from trainer.data.tfds import TfdsRecords
from trainer.errors import NotPreparedError, UserError

VOCAB = 300
LENGTHS = np.random.default_rng(3).integers(1, 33, VOCAB).astype(np.int32) * (np.arange(VOCAB) > BEGIN)


def documents(count: int, longest: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(2, VOCAB, rng.integers(0, longest + 1)).astype(np.int32) for _ in range(count)]


def reference(docs: list[np.ndarray], length: int) -> list[tuple[list[int], list[int], int]]:
    """Tokens, segments and bytes of each row, made token by token."""
    stream = [(token, number) for number, doc in enumerate(docs) if len(doc) for token in [BEGIN, *doc.tolist()]]
    rows = []
    for start in range(0, len(stream) - 1, length):
        row = stream[start : start + length + 1]
        numbers = list(dict.fromkeys(number for _, number in row))
        segments = [numbers.index(number) + 1 for _, number in row]
        size = sum(int(LENGTHS[token]) for (_, one), (token, other) in itertools.pairwise(row) if one == other)
        filled = length + 1 - len(row)
        rows.append(([token for token, _ in row] + [0] * filled, segments + [0] * filled, size))
    return rows


@pytest.mark.parametrize("length", [1, 2, 7, 64, 600])
@pytest.mark.parametrize(("count", "longest"), [(0, 0), (1, 0), (1, 1), (1, 500), (40, 3), (40, 200)])
def test_rows_are_those_of_a_loop_over_tokens(length, count, longest):
    docs = documents(count, longest)
    rows, expected = pack(docs, LENGTHS, length, VOCAB), reference(docs, length)
    assert rows["tokens"].shape == rows["segments"].shape == (len(expected), length + 1)
    for number, name in enumerate(("tokens", "segments", "bytes")):
        np.testing.assert_array_equal(list(rows[name]), [row[number] for row in expected])
    assert rows["bytes"].sum() == sum(LENGTHS[doc].sum() for doc in docs)  # all bytes are counted
    assert (rows["segments"][:, 1:] == 0).sum() < length  # fewer tokens fill up than a row has


def test_dtypes_hold_every_token_and_every_segment():
    shortest = [np.array([5], np.int32)] * 600  # as many documents in a row as there can be
    for length in (506, 507, 508, 509, 1000):
        assert pack(shortest, LENGTHS, length, VOCAB)["segments"].max() <= np.iinfo(segment_dtype(length)).max
    assert segment_dtype(256) == np.uint8
    assert [token_dtype(vocab).name for vocab in (258, 1 << 16, (1 << 16) + 1)] == ["uint16", "uint16", "int32"]
    large = np.array([1 << 16], np.int32)
    assert pack([large], np.ones((1 << 16) + 1, np.int32), 4, (1 << 16) + 1)["tokens"][0, 1] == 1 << 16


def test_a_vocabulary_that_is_larger_than_the_texts_can_fill_is_packed_and_read(tmp_path, monkeypatch):
    small_parts(monkeypatch.setattr)
    archive = write_archive(tmp_path / "linux.tar.xz")
    large = PackedLanguageModel(**settings(tmp_path, archive) | {"vocab": 70_000})
    large.prepare()
    assert len(large.tokenizer().pieces) < 1 << 16 < large.vocab
    source = large.source("test")
    rows = source.take(np.arange(len(source)))
    texts = [content for path, content in files().items() if _split(path) == "test"]
    assert rows["tokens"].dtype == np.int32
    assert rows["bytes"].sum() == sum(map(len, texts))
    is_target = (rows["segments"][:, 1:] == rows["segments"][:, :-1]) & (rows["segments"][:, 1:] != 0)
    expected = np.concatenate(large.tokenizer().encode_all(texts))
    np.testing.assert_array_equal(np.sort(rows["tokens"][:, 1:][is_target]), np.sort(expected))


def stored(rows: dict[str, np.ndarray], block: int, vocab: int = VOCAB) -> PackedSource:
    length = rows["tokens"].shape[1] - 1
    layout = Layout(len(rows["bytes"]), block, length, vocab)
    records = [
        b"any head" + to_record({name: x[start : start + block] for name, x in rows.items()}).tobytes()
        for start in range(0, layout.rows, block)
    ]
    assert len(records) == layout.records
    return PackedSource(records, layout, "identity")


@pytest.mark.parametrize("vocab", [VOCAB, 100_000])
@pytest.mark.parametrize(("length", "longest"), [(8, 30), (600, 40)])
@pytest.mark.parametrize("block", [1, 5, 16, 1000])
def test_rows_come_back_from_records_as_numpy_indexes_them(block, length, longest, vocab):
    lengths = np.resize(LENGTHS, vocab)
    rows = pack(documents(300, longest), lengths, length, vocab)
    source, count, rng = stored(rows, block, vocab), len(rows["bytes"]), np.random.default_rng(0)
    assert len(source) == count
    assert rows["segments"].max() > 1
    picks = [
        np.arange(count),
        np.arange(count)[::-1],
        rng.integers(0, count, 50),
        rng.permutation(count),
        np.array([3]),
    ]
    for indices in [*picks, np.arange(2, count - 3), np.array([4, 4, 4])]:
        found = source.take(indices)
        assert found.keys() == rows.keys()
        for name, array in rows.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array[indices])
    np.testing.assert_array_equal(source[2]["tokens"], rows["tokens"][2])
    np.testing.assert_array_equal(source.__getitems__([6, 2])[1]["segments"], rows["segments"][2])


def test_a_record_is_read_once_for_rows_that_follow_each_other():
    class Counting(list):
        reads = 0

        def __getitem__(self, index: Any) -> Any:
            Counting.reads += 1
            return super().__getitem__(index)

    source = stored(pack(documents(200, 30), LENGTHS, 8, VOCAB), 16)
    source._records = Counting(source._records)
    batches = Batches(source, seed=0, batch_size=8, steps=100)
    list(batches.read(0, 16))  # 128 rows, 8 blocks of 16
    assert Counting.reads == 8


def test_in_memory_rows_are_read_in_the_same_order():
    source = stored(pack(documents(200, 30), LENGTHS, 8, VOCAB), 16)
    memory: Any = load_into_memory(source, 1 << 30)
    assert memory.is_in_memory
    assert fingerprint(memory) == fingerprint(source)
    assert load_into_memory(source, 1000) is source
    runs = [list(train_batches(one, seed=1, batch_size=8, start=3, stop=90)) for one in (source, memory)]
    for one, other in zip(*runs, strict=True):
        for name, array in one.items():
            np.testing.assert_array_equal(array, other[name])


def test_another_tokenizer_is_another_fingerprint_of_the_same_rows():
    rows = pack(documents(20, 30), LENGTHS, 8, VOCAB)
    one, other = stored(rows, 4), stored(rows, 4)
    assert fingerprint(one) == fingerprint(other)
    other.identity = "another"
    assert fingerprint(one) != fingerprint(other)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TFDS folder with the small tree, packed in several parts and shards."""
    folder = tmp_path_factory.mktemp("packed")
    with pytest.MonkeyPatch.context() as patch:
        small_parts(patch.setattr)
        model(folder).prepare()
    return folder


def model(folder: Path) -> PackedLanguageModel:
    archive = folder / "linux.tar.xz"
    return PackedLanguageModel(**settings(folder, archive if archive.exists() else write_archive(archive)))


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_every_token_of_a_split_is_a_target_once_and_all_bytes_are_counted(folder, split):
    source = model(folder).source(split)
    rows = source.take(np.arange(len(source)))
    texts: Any = tfds.builder("linux_source", data_dir=folder).as_data_source(split=split)
    documents = model(folder).tokenizer().encode_all([text["text"] for text in texts])
    is_target = (rows["segments"][:, 1:] == rows["segments"][:, :-1]) & (rows["segments"][:, 1:] != 0)
    found = np.bincount(rows["tokens"][:, 1:][is_target], minlength=400)
    np.testing.assert_array_equal(found, np.bincount(np.concatenate(documents), minlength=400))
    assert rows["bytes"].sum() == sum(len(text["text"]) for text in texts)
    epoch = list(eval_batches(source, 7))
    assert sum(batch["bytes"] @ batch["mask"] for batch in epoch) == rows["bytes"].sum()


def test_rows_of_one_text_lie_apart(folder):
    source = model(folder).source("train")
    rows = source.take(np.arange(len(source)))["tokens"]
    follows = rows[1:, 0] == rows[:-1, -1]  # as each row does in the stream
    assert follows.mean() < 0.1


def test_metadata_say_how_many_tokens_fill_up_and_whose_texts_they_are(folder):
    records, metadata, where = TfdsRecords.open("packed_text/linux_source-400-16", "train", str(folder))
    source = model(folder).source("train")
    segments = source.take(np.arange(len(source)))["segments"]
    assert metadata["fill"]["train"] == (segments[:, 1:] == 0).sum() > 0
    assert metadata["rows"]["train"] == len(source) > 16 * 50
    assert metadata["bytes"]["train"] == sum(len(text) for path, text in files().items() if _split(path) == "train")
    assert metadata["source"]["kernel"] == "6.1.7"
    assert len(list(where.glob("*train.array_record*"))) > 1
    assert len(records) == -(-len(source) // source.block)
    checksum, name = (where / "tokenizer.model.sha256").read_text().split()
    assert (checksum, name) == (metadata["tokenizer"], "tokenizer.model")
    assert source.identity == f"tokenizer {checksum}"


def _split(path: str) -> str:
    from experiments.datasets.linux_source import split_of

    return split_of(path)


def test_tfds_reads_the_records_that_the_source_reads(folder):
    records = TfdsRecords.open("packed_text/linux_source-400-16", "train", str(folder)).records
    builder = tfds.builder_from_directory(folder / "packed_text/linux_source-400-16/1.0.0")
    there: Any = builder.as_data_source(split="train")
    assert records[1].endswith(there[1]["rows"].tobytes())


def test_a_prompt_begins_a_document_and_tokens_become_text_again(folder):
    tokens = model(folder).encode("static int é;")
    assert tokens[0] == BEGIN
    assert model(folder).decode(tokens) == "static int é;"
    assert model(folder).decode([*tokens, 256 + 2]) != ""


def test_a_tokenizer_that_did_not_make_the_rows_is_noticed(folder, tmp_path):
    (tmp_path / "packed_text").symlink_to(folder / "packed_text")
    copy = PackedLanguageModel(data_dir=str(tmp_path), vocab=400, length=16)
    file = folder / "packed_text" / "linux_source-400-16" / "1.0.0" / "tokenizer.model"
    kept = file.read_bytes()
    try:
        file.write_bytes(kept[:-1])
        with pytest.raises(UserError, match=r"tokenizer\.model has SHA-256 .* made with .* prepare it again"):
            copy.source("train")
    finally:
        file.write_bytes(kept)
    assert len(copy.source("train")) == len(model(folder).source("train"))


def test_a_run_is_not_resumed_with_another_tokenizer(folder, tmp_path):
    shutil.copytree(folder / "packed_text", tmp_path / "packed_text")
    (file,) = tmp_path.glob("packed_text/*/*/tokenizer.model")
    other = train([bytes(range(97, 123)) * 40, b"int main(void) " * 40], 400)
    metadata = json.loads(file.with_name("metadata.json").read_text())
    file.with_name("metadata.json").write_text(json.dumps(metadata | {"tokenizer": hashlib.sha256(other).hexdigest()}))
    file.write_bytes(other)

    def run(data_dir: Path) -> Run:
        layers = {"layers": 1, "width": 8, "heads": 1, "mlp_width": 8}
        experiment = PackedLanguageModel(data_dir=str(data_dir), vocab=400, length=16, **layers)
        groups = {"matrices": Group(weight_decay=0.1), "rest": Group()}
        labels = ((r".*/kernel", "matrices"), (r".*", "rest"))
        return Run(
            experiment=experiment,
            total_steps=2,
            batch_size=8,
            optimizer=Optimizer(schedule=Schedule("constant", 1e-3), labels=labels, groups=groups),
            evaluation=Evaluation(max_examples=8),
        )

    trainer.train(run(folder), tmp_path / "run", verbose=False)
    with pytest.raises(UserError, match="trained on other examples: as many as then, but with other content"):
        trainer.train(dataclasses.replace(run(tmp_path), total_steps=4), tmp_path / "run", verbose=False)
    trainer.train(dataclasses.replace(run(folder), total_steps=4), tmp_path / "run", verbose=False)


def test_what_is_not_there_is_said(folder, tmp_path):
    with pytest.raises(NotPreparedError, match="packed_text/linux_source-8192-16"):
        PackedLanguageModel(data_dir=str(folder), length=16).source("train")
    with pytest.raises(UserError, match=r"'trian'.*train"):
        model(folder).source("trian")
    with pytest.raises(UserError, match="cannot be a part or a sum"):
        model(folder).source("train[:50%]")
    with pytest.raises(NotPreparedError, match="'nothing'"):
        packed_text.PackedText(dataset="nothing", vocab=400, length=16, data_dir=tmp_path).download_and_prepare()
    with pytest.raises(UserError, match=r"no file .*absent.tar.xz: apt-get install .*linux-source-6.1.*archive="):
        PackedLanguageModel(**settings(tmp_path, tmp_path / "absent.tar.xz")).prepare()
    with pytest.raises(UserError, match="archive"):
        PackedLanguageModel(dataset="digits", data_dir=str(tmp_path), archive="x.tar").prepare()


def test_other_data_sets_with_texts_are_packed_too(tmp_path, monkeypatch):
    monkeypatch.setattr(packed_text, "SAMPLE_BYTES", 100_000)
    shakespeare = PackedLanguageModel(dataset="shakespeare", data_dir=str(tmp_path), vocab=500, length=128)
    shakespeare.prepare()
    source = shakespeare.source("test")
    assert source.take(np.arange(len(source)))["bytes"].sum() > 200_000
