"""Every config says what it costs and gives, has its reviewed table of parameters, and trains."""

import ast
import gzip
import re
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest

from experiments.datasets.fashion_mnist_local import FOLDER_VARIABLE
from experiments.packed_language_model import PackedLanguageModel
from tests import image_sets
from tests.text.kernel_tree import write_archive
from trainer import config
from trainer.commands.arguments import load_config
from trainer.data import eval_source, tfds
from trainer.loop import train_program
from trainer.observe.log import read_rows
from trainer.observe.progress import Progress
from trainer.optim.decay_check import check_decay
from trainer.program import build_program

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
GOLDEN = ROOT / "tests" / "golden"
SMALL_WORDS = {"width": 8, "hidden": 8, "length": 8, "vocab": 64}
SMALL_DECODER = {"layers": 2, "width": 16, "heads": 2, "mlp_width": 32, "length": 256, "vocab": 256}
SMALL_PACKED = SMALL_DECODER | {"vocab": 400}
SMALL_RESNET = {"widths": (4, 4, 4, 4), "blocks": (1, 1, 1, 1)}
SMALL_CROPS = {"size": 32, "shorter": 36}
SHRUNK: dict[str, dict[str, Any]] = {  # fields of the experiment
    "cifar10_densenet121": {"widths": (4,), "blocks": (1, 1, 1, 1)},
    "cifar10_resnet34": SMALL_RESNET,
    "cifar10_vgg11": {"widths": (4, 4, 4, 4, 4), "hidden": 8},
    "fashion_mnist_resnet18": SMALL_RESNET,
    "imagenet_resnet18": SMALL_RESNET | SMALL_CROPS,
    "imagenet_resnet50": SMALL_RESNET | SMALL_CROPS,
    "imagenet_vit_s16": {"blocks": (1,)} | SMALL_CROPS,
    "shakespeare": SMALL_DECODER,
    "shakespeare_lstm": {"width": 8, "length": 256},
    "linux_6m": SMALL_PACKED,
    "linux_110m": SMALL_PACKED,
    "linux_1b": SMALL_PACKED,
    "linux_8b": SMALL_PACKED | {"kv_heads": 1, "attention": "plain"},
    "ptb_lstm1": SMALL_WORDS,
    "ptb_lstm2": SMALL_WORDS,
    "ptb_lstm3": SMALL_WORDS,
}
# Others train nearly the same step.
EXHAUSTIVE = (
    "cifar10_resnet34",
    "cifar10_vgg11",
    "fashion_mnist",
    "fashion_mnist_resnet18",
    "imagenet_resnet18",
    "imagenet_resnet50",
    "linux_110m",
    "linux_1b",
    "ptb_lstm1",
    "ptb_lstm2",
    "shakespeare",
    "shakespeare_lstm",
)
# What becomes of each module's arrays in a config with `init_from`.
BEGUN = {
    "finetune_digits": [("conv_0", "taken"), ("conv_1", "taken"), ("head", "fresh"), ("hidden", "fresh")],
}
LARGEST_LOSS = {"toy": 150}  # of the first step; by default that of a classifier which is not far off

each_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


def write_idx(path: Path, values: np.ndarray) -> None:
    shape = np.array(values.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(bytes([0, 0, 8, values.ndim]) + shape + values.tobytes()))


@pytest.fixture(scope="module")
def fashion_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TFDS folder with `fashion_mnist_local` of 64 random images to train on and 32 to test."""
    rng = np.random.default_rng(0)
    raw, prepared = tmp_path_factory.mktemp("idx"), tmp_path_factory.mktemp("tfds_fashion")
    for prefix, size in (("train", 64), ("t10k", 32)):
        write_idx(raw / f"{prefix}-images-idx3-ubyte.gz", rng.integers(0, 256, (size, 28, 28), np.uint8))
        write_idx(raw / f"{prefix}-labels-idx1-ubyte.gz", rng.integers(0, 10, size, np.uint8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER_VARIABLE, str(raw))
        tfds.prepare("fashion_mnist_local", str(prepared))
    return prepared


@pytest.fixture(scope="module")
def image_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TFDS folder with small `cifar10` and `imagenet2012`, which have the features of TFDS's own."""
    folder = tmp_path_factory.mktemp("tfds_images")
    image_sets.cifar("cifar10", folder)
    image_sets.imagenet(folder)
    return folder


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Text files in the format of the Penn Treebank: lines of words, with a space before and after each line."""
    folder, rng = tmp_path_factory.mktemp("words"), np.random.default_rng(0)
    kinds = ["<unk>", "N", *(f"word{i}" for i in range(40))]
    for split, lines in (("train", 60), ("valid", 9), ("test", 9)):
        texts = (" ".join(rng.choice(kinds, rng.integers(1, 20))) for _ in range(lines))
        (folder / f"ptb.{split}.txt").write_text("".join(f" {text} \n" for text in texts))
    return str(folder / "ptb.{split}.txt")


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small archive in the place of the kernel's."""
    return str(write_archive(tmp_path_factory.mktemp("kernel") / "linux.tar.xz"))


@pytest.fixture
def run(path: Path, data_dir: Path, fashion_dir: Path, image_dir: Path, words: str, kernel: str) -> config.Run:
    """The config's run at its full length and size, reading the tests' data if it reads any."""
    run = config.resolve(load_config(str(path)))
    experiment: Any = run.experiment
    if getattr(experiment, "files", None):
        experiment.files = words
    if hasattr(experiment, "data_dir"):
        folders = {"fashion_mnist_local": fashion_dir, "cifar10": image_dir, "imagenet2012": image_dir}
        experiment.data_dir = str(folders.get(experiment.dataset, data_dir))
        if hasattr(experiment, "archive"):
            experiment.archive = kernel
        experiment.prepare()
    return run


@pytest.fixture
def shrunk(path: Path, run: config.Run) -> config.Run:
    """The same with a model that fits this machine."""
    for name, value in SHRUNK.get(path.stem, {}).items():
        setattr(run.experiment, name, value)
    if isinstance(run.experiment, PackedLanguageModel):  # rows of another length and vocabulary
        run.experiment.prepare()
    return run


@each_config
def test_config_states_command_cost_and_expected_result(path):
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert text is not None
    assert f"\n    python -m trainer train --config=configs/{path.name} --workdir=" in text
    assert "Cost: " in text
    assert "Expected: " in text


@each_config
def test_table_of_parameters_is_the_reviewed_one(path, run, request):
    golden, found = GOLDEN / f"{path.stem}.txt", str(build_program(run).param_table)
    if request.config.getoption("--update-goldens"):
        golden.write_text(found)
    assert found == golden.read_text(), "if this is meant: pytest tests/test_configs.py --update-goldens"


def test_every_golden_belongs_to_a_config():
    assert [file.stem for file in sorted(GOLDEN.glob("*.txt"))] == [path.stem for path in CONFIGS]


@pytest.mark.parametrize("header", ["experiment", "config"])
def test_the_page_of_experiments_lists_all_of_them(header, request):
    page = ROOT / "docs" / "experiments.md"
    files = CONFIGS
    if header == "experiment":
        files = [
            file for file in sorted((ROOT / "experiments").glob("*.py")) if "def source(self, split" in file.read_text()
        ]
    rows = []
    for file in files:
        text = str(ast.get_docstring(ast.parse(file.read_text())))
        cells = [f"`{file.stem}`", text.splitlines()[0].removesuffix(".")]
        if cost := re.search(r"Cost: (.*?)[.;]?\s*(?:[.;]\s|$)", text, re.DOTALL):
            cells.append(" ".join(cost[1].split()))
        rows.append(f"| {' | '.join(cells)} |\n")
    pattern = rf"(.*?\n\| {header} \|[^\n]*\n[|-]+\n)((?:\|[^\n]*\n)*)(.*)"
    parts = re.fullmatch(pattern, page.read_text(), re.DOTALL)
    assert parts is not None
    if request.config.getoption("--update-goldens"):
        page.write_text(parts[1] + "".join(rows) + parts[3])
        return
    assert parts[2] == "".join(rows), "pytest tests/test_configs.py --update-goldens"


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.exhaustive if path.stem in EXHAUSTIVE else ()) for path in CONFIGS],
    ids=lambda path: path.stem,
)
def test_config_trains_one_shrunk_step_and_its_parameters_decay_as_the_labels_say(
    path, shrunk, fashion_dir, tmp_path, capsys
):
    run, steps = shrunk, shrunk.total_steps
    run.optimizer.schedule.run_steps = run.optimizer.schedule.run_steps or run.total_steps  # its times stay
    run.total_steps = 1
    run.parallel.devices = 1
    run.loading.workers = 0
    run.batch_size = 4 * run.microbatches
    run.evaluation.batch_size = 32
    if run.init_from is not None:  # from fresh parameters of the config whose run it names
        first: Any = load_config(str(ROOT / "configs" / f"{Path(run.init_from.source).name.partition('@')[0]}.py"))
        first.experiment.data_dir = str(fashion_dir)
        run.init_from.source = str(tmp_path / "params")
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "params", build_program(config.resolve(first)).init().params)
    program = build_program(run)
    state = train_program(program, tmp_path / "run", Progress(1))
    if run.init_from is not None:
        begun = re.findall(r"^(\w+)/\w+ +(taken|fresh), ", capsys.readouterr().out, re.MULTILINE)
        assert sorted(set(begun)) == BEGUN[path.stem]
    assert int(state.step) == 1
    assert (tmp_path / "run" / "checkpoints" / "1").is_dir()
    (row,) = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert row["step"] == 1
    assert 0 < row["train/loss"] < LARGEST_LOSS.get(path.stem, 10)
    assert row[f"{run.evaluation.split}/examples"] == len(eval_source(run.experiment.source(run.evaluation.split)))
    labels = [param.label for param in program.param_table.rows]
    results = check_decay(state.params, labels, program.groups, program.optimizer, steps)
    assert [str(result) for result in results if not result.holds] == []
