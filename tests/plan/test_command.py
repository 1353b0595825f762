"""The command `plan`: its table, its flags, and one-line errors."""

import re
from pathlib import Path

import pytest

import trainer
from trainer.commands import run

TRAINER = Path(trainer.__file__).parent
SIZES = "length=64, width=128, vocab=256, heads=8, mlp_width=256"
TEXT = f"""
from tests.plan.models import Decoder
from trainer.config import Run


def get_config():
    return Run(Decoder({SIZES}), total_steps=1, batch_size=8)
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    file = tmp_path / "config.py"
    file.write_text(TEXT)
    return f"--config={file}"


@pytest.mark.slow
@pytest.mark.tpu
def test_the_table_has_every_strategy_asked_for_and_both_steps(config, capsys):
    assert run(["plan", config, "--topology=v5e:2x2", "--strategies=data,fsdp,tensor", "--fast"]) == 0
    out, err = capsys.readouterr()
    title, header, *lines = out.splitlines()
    assert title.startswith("v5e:2x2: 4 devices of 15.75 GiB, compiled with little effort")
    assert re.split("  +", header.strip()) == [
        *("strategy", "step", "parameters", "moments", "gradients", "other", "temporaries", "peak", "of HBM"),
        *("collective", "dtype", "MB", "async", "at least", "GFLOP", "compiled in"),
    ]
    steps = [re.match(r"(\w+)? +(train|evaluate) ", line) for line in lines]
    assert [step.groups() for step in steps if step] == [
        (strategy, "train") if step == "train" else (None, step)
        for strategy in ("data", "fsdp", "tensor")
        for step in ("train", "evaluate")
    ]
    assert "optimal_seconds" not in out
    assert "v5e:2x2, fsdp: train step" in err


@pytest.mark.slow
@pytest.mark.tpu
@pytest.mark.exhaustive
def test_search_prints_flags_that_the_command_line_takes(tmp_path, capsys):
    file = tmp_path / "config.py"
    file.write_text(TEXT.replace("Decoder", "Rematerialised").replace(SIZES, ""))
    assert run(["plan", f"--config={file}", "--topology=v5e:1x1", "--search"]) == 0
    out = capsys.readouterr().out
    flags = re.findall(r"--config\.parallel\.strategy=.*", out)
    assert len(flags) == 2 * 3  # remat policies × numbers of microbatches
    assert run(["inspect", f"--config={file}", *flags[-1].split()]) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "error: give --topology=NAME, such as --topology=v5e:4x4,v4:2x2x4"),
        (["--topology=v5e:2x3"], "error: no topology 'v5e:2x3'; did you mean '2x4'?"),
        (["--topology=v5e:2x2", "--strategies=fdsp"], "error: no strategy 'fdsp'; did you mean 'fsdp'?"),
        pytest.param(
            ["--topology=v5e:4x4"], "error: batch_size 8 does not divide over 16 batch shards", marks=pytest.mark.tpu
        ),
        (["--batch_per_chp=2"], "error: unknown flag --batch_per_chp; did you mean '--batch_per_chip'?"),
        (["--topology=v5e:2x2", "--batch_per_chip=0"], "error: --batch_per_chip is 0; it must be at least 1"),
        (["--topology=v5e:2x2", "--batch_per_chip=2", "--search"], "error: --search finds the batch by itself"),
    ],
)
def test_mistakes_are_one_line(config, capsys, flags, message):
    assert run(["plan", config, *flags]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(message)


def test_inspect_gives_the_figures_of_this_machine(config, capsys):
    assert run(["inspect", config, "--compile"]) == 0
    out = capsys.readouterr().out
    [(header, train)] = re.findall(r"(strategy  .*)\n(data .*)", out)  # the columns of `plan`
    names, values = re.split("  +", header.strip()), re.split("  +", train.strip())
    shown = dict(zip(names, values, strict=True))
    parameters = 2 * (4 * 128**2 + 2 * 128 * 256) + 256 * 128 + 5 * 128
    assert shown["parameters"] == shown["gradients"] == f"{4 * parameters / 2**20:.2f}M"
    assert shown["moments"] == f"{(8 * parameters + 4) / 2**20:.2f}M"
    assert (shown["collective"], shown["of HBM"], shown["at least"]) == ("all-reduce", "-", "-")
    assert float(shown["GFLOP"]) > 0


def test_only_the_command_imports_the_package():
    importing = [
        file.relative_to(TRAINER).as_posix()
        for file in TRAINER.rglob("*.py")
        if re.search(r"(from|import) trainer\.plan\b|from trainer import .*\bplan\b", file.read_text())
    ]
    assert [name for name in importing if not name.startswith("plan/")] == ["commands/plan.py"]
