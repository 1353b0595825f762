"""Parquet files and folders of Hugging Face's `datasets` as sources, against the rows that were written."""

import dataclasses
import importlib
import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from experiments.language_model import LanguageModel
from tests.data.make_saved import FOLDER, ROWS, row
from trainer import config, train
from trainer.data import ArraySource, batch_spec, take
from trainer.data.arrow import ArrowSource
from trainer.data.hf import HuggingFaceSource
from trainer.data.memory import load_into_memory
from trainer.data.parquet import ParquetSource
from trainer.data.stream import eval_batches, train_batches
from trainer.errors import UserError

SCHEMA = pa.schema(
    {
        "text": pa.string(),
        "label": pa.int64(),
        "number": pa.int64(),
        "vector": pa.list_(pa.float32(), 3),
        "ids": pa.list_(pa.int32()),
        "raw": pa.binary(),
    }
)
COLUMNS = tuple(SCHEMA.names)
NUMERIC = ("label", "vector")
LENGTH = 12
KINDS = ("parquet", "datasets")


def write_parquet(folder: Path) -> None:
    """The rows of the saved folder as parquet: each split in files of 10 rows, in groups of 4."""
    for split, numbers in ROWS.items():
        for first in range(0, len(numbers), 10):
            table = pa.Table.from_pylist([row(i) for i in numbers[first : first + 10]], SCHEMA)
            parquet.write_table(table, folder / f"{split}-{first:05}.parquet", row_group_size=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    write_parquet(folder)
    return folder


Opening = Callable[..., ArrowSource]


@pytest.fixture(params=KINDS)
def opened(request: pytest.FixtureRequest, folder: Path) -> Opening:
    """Opens a split of the same rows in each format: `opened(split, columns, transform)`."""
    return lambda split, *more: open_split(request.param, folder, split, *more)


def open_split(kind: str, folder: Path, split: str, *more: Any) -> ArrowSource:
    if kind == "parquet":
        return ParquetSource(folder / f"{split}-*.parquet", *more)
    return HuggingFaceSource(FOLDER / split, *more)


def tokens(example: dict[str, Any]) -> dict[str, Any]:
    """The first bytes of a text, padded with zeros."""
    text = np.frombuffer(example["text"][: LENGTH + 1], np.uint8)
    return {"tokens": np.pad(text, (0, LENGTH + 1 - len(text))), "targets": np.int32(len(text) - 1)}


def in_memory(split: str, columns: tuple[str, ...]) -> ArraySource:
    dtypes = {"label": np.int64, "vector": np.float32}
    return ArraySource({name: np.array([row(i)[name] for i in ROWS[split]], dtypes[name]) for name in columns})


def assert_same_batches(found: Any, expected: Any) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].dtype == other[name].dtype, name
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.mark.parametrize("split", ROWS)
def test_any_row_is_the_one_that_was_written_in_any_order_and_more_than_once(opened, split):
    source = opened(split, COLUMNS)
    numbers = ROWS[split]
    assert len(source) == len(numbers)
    places = np.random.default_rng(0).integers(0, len(numbers), 60).tolist()
    for found, place in zip([*source.__getitems__(places), source[3]], [*places, 3], strict=True):
        expected = row(numbers[place])
        assert tuple(found) == COLUMNS
        assert found["text"] == expected["text"].encode()
        assert found["raw"] == expected["raw"]
        assert (found["label"], found["number"]) == (expected["label"], expected["number"])
        assert (found["vector"].dtype, found["vector"].tolist()) == (np.float32, expected["vector"])
        assert (found["ids"].dtype, found["ids"].tolist()) == (np.int32, expected["ids"])


def test_iterating_gives_each_row_once(opened):
    assert [int(example["number"]) for example in opened("test", ("number",))] == [i * 10**10 for i in ROWS["test"]]


@pytest.mark.parametrize("index", [-1, 24])
def test_an_index_outside_is_an_index_error(opened, index):
    with pytest.raises(IndexError):
        opened("train", ("label",)).__getitems__([0, index])


@pytest.mark.parametrize("start", [0, 7])
def test_batches_are_those_of_the_same_rows_in_memory_from_any_start(opened, start):
    span: dict[str, Any] = {"seed": 3, "batch_size": 5, "start": start, "stop": 12}
    expected = in_memory("train", NUMERIC)
    assert_same_batches(train_batches(opened("train", NUMERIC), **span), train_batches(expected, **span))
    assert_same_batches(eval_batches(opened("train", NUMERIC), 5), eval_batches(expected, 5))


def test_a_split_loads_into_memory_as_it_is_on_disk(opened):
    loaded = load_into_memory(opened("train", NUMERIC), 1 << 20)
    assert isinstance(loaded, ArraySource)
    assert_same_batches([loaded.arrays], [in_memory("train", NUMERIC).arrays])


def test_transform_makes_the_examples(opened):
    source = opened("train", ("text",), tokens)
    assert {name: (x.shape, x.dtype) for name, x in batch_spec(source, 4).items() if name != "mask"} == {
        "tokens": ((4, LENGTH + 1), np.uint8),
        "targets": ((4,), np.int32),
    }
    batch = take(source, np.array([20, 2]))
    assert bytes(batch["tokens"][0]) == b"20 bottles of"
    assert bytes(batch["tokens"][1]) == b"2 bottles of "


def test_texts_without_transform_are_refused_by_the_name_of_their_column(opened):
    with pytest.raises(UserError, match=r"entry 'raw' of the data is .*, which no device can hold"):
        batch_spec(opened("train", ("label", "raw")), 2)


def test_a_source_that_was_pickled_reads_the_same_rows(opened):
    source = opened("train", ("text",), tokens)
    before = take(source, np.arange(24))
    assert_same_batches([take(pickle.loads(pickle.dumps(source)), np.arange(24))], [before])


@pytest.mark.slow
def test_worker_processes_read_the_batches_of_this_process_after_a_resume_too(opened):
    source = opened("train", ("text",), tokens)
    span: dict[str, Any] = {"seed": 0, "batch_size": 8, "stop": 9}
    whole = list(train_batches(source, start=0, **span))
    assert_same_batches(train_batches(source, start=4, workers=2, **span), whole[4:])


@dataclasses.dataclass
class Bottles(LanguageModel):
    """Language modelling of the bytes of the texts, read from one of the formats, or from memory."""

    kind: str = ""
    folder: str = ""

    def source(self, split: str) -> Any:
        if self.kind:
            return open_split(self.kind, Path(self.folder), split, ("text",), tokens)
        examples = [tokens({"text": row(i)["text"].encode()}) for i in ROWS[split]]
        return ArraySource({name: np.stack([example[name] for example in examples]) for name in examples[0]})


@pytest.mark.slow
def test_training_on_bytes_ends_as_with_the_rows_in_memory_and_the_first_stops_in_between(folder, tmp_path):
    def run(kind: str, total_steps: int) -> config.Run:
        task = Bottles(length=LENGTH, width=8, layers=1, heads=2, mlp_width=8, kind=kind, folder=str(folder))
        return config.Run(
            experiment=task,
            total_steps=total_steps,
            batch_size=8,
            optimizer=config.Optimizer(schedule=config.Schedule("constant", peak=1e-2)),
            evaluation=config.Evaluation(batch_size=8),
            parallel=config.Parallel(devices=1),
            loading=config.Loading(in_memory_bytes=0),
        )

    expected = train(run("", 5), tmp_path / "memory", verbose=False)
    train(run(KINDS[0], 2), tmp_path / KINDS[0], verbose=False)
    for kind in KINDS:
        found = train(run(kind, 5), tmp_path / kind, verbose=False)
        assert int(found.step) == 5
        jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)


@pytest.mark.parametrize(
    ("values", "kind", "dtype"),
    [
        ([0, 255], pa.uint8(), np.uint8),
        ([-(2**63), 2**63 - 1], pa.int64(), np.int64),
        ([0.5, -2.0], pa.float16(), np.float16),
        ([0.1, 1e300], pa.float64(), np.float64),
        ([True, False], pa.bool_(), np.bool_),
        ([[1, 2], [3, 4]], pa.list_(pa.int16(), 2), np.int16),
        ([[1.5], []], pa.large_list(pa.float64()), np.float64),
        ([[True], [False]], pa.list_(pa.bool_()), np.bool_),
        (["a", "ö"], pa.large_string(), None),
        (["a", "ö"], pa.dictionary(pa.int32(), pa.string()), None),
        ([b"ab", b"\0\xff"], pa.binary(2), None),
        ([b"", b"\0\xff"], pa.large_binary(), None),
    ],
    ids=str,
)
def test_each_type_of_column_keeps_its_values_and_its_dtype(tmp_path, values, kind, dtype):
    parquet.write_table(pa.table({"x": pa.array(values, kind)}), tmp_path / "a.parquet")
    source = ParquetSource(tmp_path, ("x",))
    for found, value in zip([source[0]["x"], source[1]["x"]], values, strict=True):
        if dtype is None:
            assert found == (value.encode() if isinstance(value, str) else value)
        else:
            assert found.dtype == dtype
            assert found.tolist() == value


@pytest.mark.parametrize(
    ("values", "kind", "name"),
    [
        ([[["a"]]], pa.list_(pa.list_(pa.string())), "list<.*"),
        ([["a"]], pa.list_(pa.string()), "list<.*string>"),
        ([{"a": 1}], pa.struct({"a": pa.int8()}), "struct<.*"),
        ([0], pa.timestamp("s"), r"timestamp\[.*"),
    ],
    ids=str,
)
def test_a_column_that_is_no_array_and_no_text_is_refused_with_what_is_accepted(tmp_path, values, kind, name):
    parquet.write_table(pa.table({"x": pa.array(values, kind), "y": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=f"column 'x' of {tmp_path}/a.parquet is {name}; accepted are numbers,"):
        ParquetSource(tmp_path, ("x",))
    assert ParquetSource(tmp_path, ("y",))[0] == {"y": 1}


@pytest.mark.parametrize("values", [[1, None], ["a", None], [[1], None], [[1], [None]]], ids=str)
def test_a_row_without_a_value_is_refused_by_the_name_of_its_column(tmp_path, values):
    parquet.write_table(pa.table({"x": values}), tmp_path / "a.parquet")
    source = ParquetSource(tmp_path, ("x",))
    assert source[0]["x"] == (b"a" if values[0] == "a" else values[0])
    with pytest.raises(UserError, match="column 'x' of the data has rows without a value"):
        source.__getitems__([0, 1])


def test_a_folder_stands_for_its_parquet_files_in_the_order_of_their_names(tmp_path):
    for name, number in (("b.parquet", 2), ("a.parquet", 1), ("c.parquet", 3), ("d.txt", 4)):
        parquet.write_table(pa.table({"x": [number]}), tmp_path / name)
    assert [int(example["x"]) for example in ParquetSource(tmp_path, ("x",))] == [1, 2, 3]
    assert [int(example["x"]) for example in ParquetSource(str(tmp_path / "[bc].parquet"), ("x",))] == [2, 3]
    assert [int(example["x"]) for example in ParquetSource(tmp_path / "d.txt", ("x",))] == [4]


def test_only_the_row_groups_that_are_asked_for_are_read(tmp_path):
    file = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"x": np.arange(100)}), file, row_group_size=10, use_dictionary=False)
    content, start = bytearray(file.read_bytes()), parquet.read_metadata(file).row_group(3).column(0).data_page_offset
    content[start : start + 8] = b"\xff" * 8
    file.write_bytes(content)
    source = ParquetSource(file, ("x",))
    intact = [i for i in range(100) if not 30 <= i < 40]
    assert [int(example["x"]) for example in source.__getitems__(intact)] == intact
    with pytest.raises(UserError, match=f"{file} cannot be read: ") as refusal:
        source[35]
    assert "\n" not in str(refusal.value)


def test_memory_stays_within_the_limit_and_a_row_group_in_memory_is_not_read_again(tmp_path):
    file, group_bytes, limit = tmp_path / "a.parquet", 1 << 18, 1 << 20
    parquet.write_table(pa.table({"x": np.arange(20 * group_bytes // 8)}), file, row_group_size=group_bytes // 8)
    source = ParquetSource(file, ("x",), cache_bytes=limit)
    before = pa.total_allocated_bytes()
    for index in np.random.default_rng(0).permutation(len(source))[:100].tolist():
        assert source[index]["x"] == index
        # A row group is decoded while the others are kept, and a read may take as much again.
        assert pa.total_allocated_bytes() - before < limit + 3 * group_bytes
    file.unlink()
    assert source[index]["x"] == index
    with pytest.raises(UserError, match=f"no file {file}"):
        source.__getitems__(range(0, len(source), group_bytes // 8))


def test_a_row_group_larger_than_the_limit_is_read(tmp_path):
    parquet.write_table(pa.table({"x": np.arange(1000)}), tmp_path / "a.parquet", row_group_size=500)
    source = ParquetSource(tmp_path, ("x",), cache_bytes=0)
    assert [int(example["x"]) for example in source.__getitems__([999, 0, 1])] == [999, 0, 1]


def test_arrow_files_of_many_record_batches_are_mapped_and_not_loaded(tmp_path):
    rows = 1 << 17
    names = [f"data-{i:05}-of-00002.arrow" for i in range(2)]
    for i, name in enumerate(names):
        table = pa.table({"x": np.arange(i * rows, (i + 1) * rows)})
        with pa.OSFile(str(tmp_path / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=1000)
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    before = pa.total_allocated_bytes()
    source = HuggingFaceSource(tmp_path, ("x",))
    indices = np.random.default_rng(0).integers(0, 2 * rows, 50).tolist()
    assert [int(example["x"]) for example in source.__getitems__(indices)] == indices
    assert len(source) == 2 * rows
    assert pa.total_allocated_bytes() - before < 8 * rows // 10


def test_an_unknown_column_is_refused_with_the_nearest_name(opened):
    with pytest.raises(UserError, match="has no column 'txet'; did you mean 'text'"):
        opened("train", ("label", "txet"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("trian-00000.parquet", "no file {}/trian-00000.parquet; did you mean 'train-00000.parquet'"),
        ("validation-*.parquet", r"no file {}/validation-\*.parquet"),
        ("absent/a.parquet", "no file {}/absent/a.parquet"),
    ],
)
def test_parquet_files_that_are_not_there_are_refused(folder, name, message):
    with pytest.raises(UserError, match=message.format(folder)):
        ParquetSource(folder / name, ("text",))


def test_a_folder_without_parquet_files_is_refused(tmp_path):
    with pytest.raises(UserError, match=rf"no file {tmp_path}/\*.parquet"):
        ParquetSource(tmp_path, ("text",))


def test_a_file_that_is_not_parquet_is_refused_in_one_line(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"not what its name says")
    with pytest.raises(UserError, match=f"{tmp_path}/a.parquet cannot be read: ") as refusal:
        ParquetSource(tmp_path, ("text",))
    assert "\n" not in str(refusal.value)


def test_files_whose_columns_have_different_types_are_refused(tmp_path):
    parquet.write_table(pa.table({"x": [1]}), tmp_path / "a.parquet")
    parquet.write_table(pa.table({"x": [1.5]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"column 'x' is double in .*b\.parquet, but int64 in the files before it"):
        ParquetSource(tmp_path, ("x",))


def test_a_folder_of_splits_is_refused_with_the_folders_that_there_are():
    with pytest.raises(UserError, match=f"DatasetDict: name one, {FOLDER}/train or {FOLDER}/test"):
        HuggingFaceSource(FOLDER, ("text",))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("state.json", None, "no data set of Dataset.save_to_disk in .*: there is no .*/state.json"),
        ("state.json", "{", "does not describe a data set: JSONDecodeError"),
        ("state.json", "[]", "does not describe a data set: AttributeError"),
        ("state.json", "{}", "does not describe a data set: KeyError: '_data_files'"),
        ("state.json", '{"_indices_data_files": [{"filename": "i.arrow"}]}', "saved by datasets 1.x with an index"),
        ("data-00001-of-00003.arrow", None, "no file .*/data-00001-of-00003.arrow"),
        ("data-00001-of-00003.arrow", "no Arrow", "data-00001-of-00003.arrow cannot be read: "),
    ],
)
def test_a_damaged_folder_of_datasets_is_refused_in_one_line(tmp_path, name, content, message):
    shutil.copytree(FOLDER / "train", tmp_path / "train")
    (tmp_path / "train" / name).unlink()
    if content is not None:
        (tmp_path / "train" / name).write_text(content)
    with pytest.raises(UserError, match=message) as refusal:
        HuggingFaceSource(tmp_path / "train", ("text",))
    assert "\n" not in str(refusal.value)


def test_without_pyarrow_one_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "trainer.data.arrow")
    with pytest.raises(UserError, match=r"pyarrow.*; it is part of: pip install 'belief-trainer\[arrow\]'"):
        importlib.import_module("trainer.data.arrow")
