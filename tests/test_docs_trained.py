"""docs/trained.md, metrics.md, hooks.md and data.md: their code and their commands run, on a model of digits."""

import re
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from trainer import config, train
from trainer.commands import run as command
from trainer.commands.arguments import load_config
from trainer.data import ArraySource, batch_spec
from trainer.data.stream import train_batches

DOCS = Path(__file__).parents[1] / "docs"
TRAINED, METRICS = (DOCS / "trained.md").read_text(), (DOCS / "metrics.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TRAINED, re.DOTALL)
HOOKS, DATA = (
    re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL) for page in ("hooks.md", "data.md")
)
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
def test_every_command_and_every_block_of_the_page_runs_in_its_order(here, monkeypatch, capsys, data_dir):
    monkeypatch.chdir(here)
    assert (len(COMMANDS), len(BLOCKS)) == (5, 3)
    first, matrix, read = BLOCKS
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


def test_the_metric_of_ones_own_adds_up():
    (text,) = re.findall(r"```python\n(.*?)```", METRICS, re.DOTALL)
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


def test_the_table_has_every_metric_and_every_number():
    from trainer import metrics

    table = METRICS.split("| metric |")[1].split("\n\n")[0]
    named = set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE))
    kinds = {name for name in vars(metrics) if name[0].isupper()} - {"Metric", "Metrics"}
    assert named == kinds


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
