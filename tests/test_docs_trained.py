"""README.md, docs/trained.md, metrics.md, hooks.md, data.md and optimizers.md: their code and their commands run."""

import dataclasses
import importlib
import inspect
import re
import shlex
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from scipy.special import softmax

from experiments.image_classification import ImageClassification
from tests.metrics.test_metrics import NOTHING
from tests.test_init_from import begun
from trainer import config, load, metrics, train
from trainer.commands import run as command
from trainer.commands.arguments import load_config, make_parser, parse_flags, resolve_arguments
from trainer.data import ArraySource, batch_spec, take
from trainer.data.stream import train_batches
from trainer.observe.log import read_rows
from trainer.program import build_program
from trainer.restore import Trained

DOCS = Path(__file__).parents[1] / "docs"
README, TRAINED, METRICS = (
    page.read_text() for page in (DOCS.parent / "README.md", DOCS / "trained.md", DOCS / "metrics.md")
)


def blocks_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page, re.DOTALL)


BLOCKS = blocks_of(TRAINED)
HOOKS, DATA = (blocks_of((DOCS / page).read_text()) for page in ("hooks.md", "data.md"))
COMMANDS = re.findall(r"^\$ python -m trainer (.*)", TRAINED, re.MULTILINE)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Path:
    """A folder with a run of configs/digits.py, as `make demo` makes it: with all of its steps."""
    folder = tmp_path_factory.mktemp("trained")
    run = load_config(str(DOCS.parent / "configs" / "digits.py"))
    run.parallel.devices, run.experiment.data_dir = 1, str(data_dir)
    train(config.resolve(run), folder / "runs" / "digits", verbose=False)
    return folder


@pytest.mark.slow
def test_the_lines_of_the_readme_and_every_command_and_block_of_the_page_run(here, monkeypatch, capsys, data_dir):
    monkeypatch.chdir(here)
    assert (len(COMMANDS), len(BLOCKS)) == (5, 5)
    first, predict, matrix, read, begin = BLOCKS
    assert "def predict" in predict  # a test of its own
    (lines,) = (block for block in blocks_of(README) if "trainer.load(" in block)
    assert len([line for line in lines.splitlines() if line]) <= 4
    exec(lines, {})
    trained = load("runs/digits")
    example = take(trained.experiment.source("test"), np.array([0]))
    assert capsys.readouterr().out == f"{trained.predict(example)['label']}\n" == f"{example['label']}\n"
    check_begin(begin)
    assert len(first.splitlines()) <= 5  # four and an empty one
    assert len([line for line in matrix.splitlines() if line]) <= 10
    exec(first, {})
    label, truth = capsys.readouterr().out.split()
    assert re.fullmatch(r"\[\d\]", label)
    assert re.fullmatch(r"\[\d\]", truth)
    more = f" --config.experiment.data_dir={data_dir} --config.parallel.devices=1"
    for line in COMMANDS:
        line += more if "CONFIG" in line else ""
        line += "" if "CONFIG" not in line or "total_steps" in line else " --config.total_steps=60"  # after the warm-up
        assert command(shlex.split(line.replace("CONFIG", str(DOCS.parent / "configs" / "digits.py")))) == 0
    shown = capsys.readouterr().out
    for output in (
        "begins from the parameters of runs/digits, step 1000\n",
        "wrote digits.npz: 359 examples, step 1000 ",
    ):
        assert output in TRAINED
        assert output in shown
    assert re.search(r"^conv_0/bias +taken, float32\[32\] +conv_0/bias$", shown, re.MULTILINE)
    assert re.search(r"^step +1,?050/1,?050 ", shown, re.MULTILINE)
    names: dict = {}
    exec(matrix, names)
    assert names["matrix"].sum() == 359
    np.testing.assert_array_equal(np.load("digits.npz")["label"], names["trained"].predict(names["batch"])["label"])
    assert np.trace(names["matrix"]) > 0.8 * 359
    capsys.readouterr()
    exec(read, {})
    assert re.fullmatch(r"\[\d \d\]\n", capsys.readouterr().out)


def test_the_method_of_the_page_predicts_with_the_model_of_the_readme():
    (text,) = (block for block in blocks_of(README) if "class Spirals" in block)
    (method,) = (block for block in BLOCKS if "def predict" in block)
    names: dict = {"__name__": "spirals"}
    exec(text, names)
    exec(textwrap.dedent(method), names)
    experiment = type("Predicting", (names["Spirals"],), {"predict": names["predict"]})()
    batch = take(experiment.source("test"), np.arange(5))
    variables = jax.jit(experiment.init)(jax.random.key(0), batch)
    found = Trained(config.Run(experiment, total_steps=1), variables, 1, {}).predict(batch)
    logits = names["Net"]().apply(variables, batch["x"])
    np.testing.assert_array_equal(found["label"], logits.argmax(-1))
    np.testing.assert_allclose(found["probabilities"], nn.softmax(logits), rtol=1e-5)


@dataclasses.dataclass
class Out(ImageClassification):
    """The classifier of configs/digits.py, but the name of its last layer is `out`."""

    def init(self, key, batch):
        params = dict(super().init(key, batch)["params"])
        return {"params": params | {"out": params.pop("head")}}

    def loss(self, variables, batch, *, key, train):
        params = dict(variables["params"])
        return super().loss({"params": params | {"head": params.pop("out")}}, batch, key=key, train=train)


def check_begin(block: str) -> None:
    """A run begins from runs/digits as the rules of the block say."""
    names: dict = {}
    exec(block, names)
    there = load("runs/digits", "best")
    run = dataclasses.replace(there.run, experiment=Out(**vars(there.experiment) | {"classes": 26}))
    fresh = build_program(config.resolve(run)).init().params
    old, new = there.variables["params"], begun(dataclasses.replace(run, init_from=names["init_from"])).params
    for layer in ("conv_0", "conv_1"):
        np.testing.assert_array_equal(new[layer]["kernel"], old[layer]["kernel"])
    np.testing.assert_array_equal(new["hidden"]["kernel"], fresh["hidden"]["kernel"])
    np.testing.assert_array_equal(new["out"]["kernel"][:, :10], old["head"]["kernel"])
    np.testing.assert_array_equal(new["out"]["kernel"][:, 10:], fresh["out"]["kernel"][:, 10:])


def test_the_flags_of_the_optimizers_page_are_understood(data_dir):
    page = (DOCS / "optimizers.md").read_text()
    (text,) = re.findall(r"On the command line: `(--config.*?)`", page, re.DOTALL)
    own = [f"--config={DOCS.parent / 'configs' / 'digits.py'}", f"--config.experiment.data_dir={data_dir}"]
    run = resolve_arguments(*parse_flags(make_parser("train", ""), [*own, *text.split()])).run
    assert (run.optimizer.name, run.optimizer.options) == ("optax.lion", {"b1": 0.95})
    assert "optax.lion" in str(build_program(run).param_table)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    """The module of the experiment in docs/metrics.md, and the workdir of its run."""
    folder = tmp_path_factory.mktemp("evaluated")
    (folder / "evaluated_digits.py").write_text("\n\n".join(blocks_of(METRICS)))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        module = importlib.import_module("evaluated_digits")
        run = module.get_config()
        run.parallel.devices = 1
        train(run, folder / "run", verbose=False)
        yield module, folder / "run"
    del sys.modules["evaluated_digits"]


def test_the_metric_of_ones_own_is_short_and_adds_up():
    text = blocks_of(METRICS)[0]
    own = text[text.index("@flax.struct") :]
    assert len([line for line in own.splitlines() if line]) <= 10
    names: dict = {}
    exec(text, names)
    rng = np.random.default_rng(0)
    probabilities, labels = rng.dirichlet(np.ones(3), 8), rng.integers(0, 3, 8)
    mask = np.array([1, 1, 1, 1, 1, 1, 1, 0], np.float32)
    parts = [
        names["Brier"].of(jnp.asarray(probabilities[half]), jnp.asarray(labels[half]), jnp.asarray(mask[half]))
        for half in (slice(0, 3), slice(3, 8))
    ]
    expected = np.sum((probabilities - np.eye(3)[labels]) ** 2, -1)[:7].mean()
    assert jax.tree.map(jnp.add, *parts).compute() == pytest.approx(expected, rel=1e-6)
    nothing = names["Brier"].of(jnp.asarray(probabilities), jnp.asarray(labels), jnp.zeros(8))
    assert np.isnan(nothing.compute())


@pytest.mark.slow
def test_the_evaluations_of_the_page_have_their_rows_and_their_reports(evaluated, capsys):
    module, workdir = evaluated
    rows = list(read_rows(workdir / "metrics.jsonl"))
    found = {
        name: [(row["step"], row[f"{name}/examples"]) for row in rows if f"{name}/examples" in row]
        for name in ("test", "quick", "fit", "raw", "noisy", "neighbours")
    }
    assert found == {
        "test": [(15, 297), (30, 297)],
        "quick": [(step, 64) for step in (5, 10, 15, 20, 25, 30)],
        "fit": [(15, 1500), (30, 1500)],
        "raw": [(15, 297), (30, 297)],
        "noisy": [(10, 797), (20, 797), (30, 797)],
        "neighbours": [(15, 297), (30, 297)],
    }
    last = {name: value for row in rows if row["step"] == 30 for name, value in row.items()}
    trained = load(workdir)
    for name, count in (("test", 297), ("noisy", 797)):
        batch = take(trained.experiment.source(name), np.arange(count))
        probabilities = softmax(np.float64(module.Net().apply(trained.variables, batch["x"])), -1)
        expected = np.sum((probabilities - np.eye(10)[batch["label"]]) ** 2, -1).mean()
        assert last[f"{name}/brier"] == pytest.approx(expected, rel=1e-5)
    assert "train/brier" in last
    assert last["raw/brier"] != last["test/brier"]
    assert {name for name in last if name.startswith("neighbours/")} == {"neighbours/accuracy", "neighbours/examples"}
    assert last["neighbours/accuracy"] > 0.5
    files = ["digits.png", "labels.txt", "losses.png", "weights.npz"]
    for step in ("15", "30"):
        assert sorted(path.name for path in (workdir / "reports" / step).iterdir()) == files
    command_line = re.search(r"`python -m trainer (evaluate .*?)`", METRICS)
    assert command_line is not None
    assert command(shlex.split(command_line[1].replace("DIR", str(workdir)))) == 0
    assert f"quick accuracy: {last['quick/accuracy']:.4f}" in capsys.readouterr().out


def test_the_table_has_every_metric_with_its_arguments_and_every_number():
    lines = METRICS.split("| metric |")[1].split("\n\n")[0].splitlines()[2:]
    rows = {name.strip("`"): (made, text) for name, made, text in (re.findall(r"(?<=\| ).*?(?= \|)", x) for x in lines)}
    kinds = {name for name in vars(metrics) if name[0].isupper()} - {"Metric", "Metrics"}
    assert set(rows) == kinds
    one = metrics.Sum.of(jnp.ones(1), jnp.ones(1))
    examples = {type(metric).__name__: metric for metric in (*NOTHING.values(), one)}
    for name, (made, text) in rows.items():
        parameters = inspect.signature(getattr(metrics, name).of).parameters
        for argument, default in re.findall(r"(\w+)=(…|\w+)", made):
            assert parameters[argument].default == (inspect.Parameter.empty if default == "…" else float(default))
        required = [p for p in parameters.values() if p.default is p.empty and p.kind is not p.KEYWORD_ONLY]
        assert made.count(",") + 1 - made.count("=") == len(required)
        numbers = set()
        for part in text.split(";"):
            named = [word for word in re.findall(r"`(\w+)`", part) if word not in parameters]
            ends = [word for word in named if word[0] == "_"] or [""]
            numbers |= {word + end for word in named if word[0] != "_" for end in ends}
        value = examples[name].compute()
        assert numbers == (set(value) if isinstance(value, dict) else set()), name


@pytest.mark.slow
def test_the_hooks_of_the_page_follow_a_run(tmp_path, monkeypatch, capsys, data_dir):
    monkeypatch.chdir(tmp_path)
    run = load_config(str(DOCS.parent / "configs" / "digits.py"))
    run.experiment.widths, run.experiment.hidden = (4, 4), 8
    run.total_steps, run.parallel.devices, run.experiment.data_dir = 20, 1, str(data_dir)
    run.evaluation.every_steps, run.checkpoint.every_steps, run.optimizer.schedule.run_steps = 10, 10, 1000
    names: dict = {"run": run}
    for block in HOOKS:
        exec(block, names)
    assert (
        len(re.findall(r"^step [12]0: largest weight \d\.\d\d, loss \d\.\d{3}$", capsys.readouterr().out, re.MULTILINE))
        == 2
    )
    stopped = names["LargestWeight"](0.0)
    assert int(train(run, "runs/stopped", hooks=[stopped], verbose=False).step) == 10


def test_the_augmentation_of_the_page_shifts_each_image_by_a_pixel(data_dir):
    (block,) = (block for block in DATA if "class Shifted" in block)
    names: dict = {"__name__": "shifted"}
    exec(block, names)
    experiment = names["Shifted"](data_dir=str(data_dir))
    source = ArraySource({"image": np.arange(64, dtype=np.uint8).reshape(1, 8, 8, 1), "label": np.zeros(1, np.int32)})
    batches = train_batches(source, seed=0, batch_size=64, start=0, stop=1, augment=experiment.augment)
    (batch,) = batches
    rolled = {np.roll(source.arrays["image"][0], (i, j), (0, 1)).tobytes() for i in (-1, 0, 1) for j in (-1, 0, 1)}
    assert {image.tobytes() for image in batch["image"]} == rolled


def test_the_language_model_of_the_page_reads_the_first_bytes_of_parquet_files(tmp_path):
    (block,) = (block for block in DATA if "ParquetSource(" in block)
    names: dict = {"__name__": "stories"}
    exec(block, names)
    texts = [f"Once there were {i} bears. " + "They walked. " * (i % 9) for i in range(40)]
    for first, split in ((0, "train"), (16, "train"), (32, "test")):
        table = pa.table({"text": texts[first : first + 16], "number": range(len(texts[first : first + 16]))})
        parquet.write_table(table, tmp_path / f"{split}-{first:05}.parquet", row_group_size=5)
    experiment = names["Stories"](folder=str(tmp_path), width=16, layers=1, heads=2, mlp_width=16)
    example = experiment.source("train")[20]
    assert bytes(example["tokens"]).rstrip(b"\0").decode() == texts[20][:65]
    assert example["targets"] == len(texts[20][:65]) - 1
    batch, key = batch_spec(experiment.source("train"), 16), jax.random.key(0)
    variables = jax.eval_shape(experiment.init, key, batch)
    metrics, _ = jax.eval_shape(lambda v, b: experiment.loss(v, b, key=key, train=True), variables, batch)
    assert "bits_per_byte" in metrics


def test_the_mixture_of_the_page_has_the_proportions_that_it_says():
    (block,) = (block for block in DATA if "Mixture(" in block)
    names: dict = {}
    exec(block, names)
    batches = train_batches(names["mixture"], seed=0, batch_size=10, start=0, stop=20)
    assert [int(batch["text"][:, 0].sum()) for batch in batches] == [3] * 20  # of code
