"""The command `generate`: texts of a trained decoder and of a trained LSTM."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import trainer
from experiments.language_model import LanguageModel
from experiments.lstm import LSTMLanguageModel
from experiments.sampling import draw
from tests.tasks import Task
from trainer import config
from trainer.commands import run as command
from trainer.observe.events import event_files, read_events

LINES = " the cat sat \n the dog ran to the cat \n" * 9


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> dict[str, Path]:
    """Two steps of a decoder on bytes, of an LSTM on words, and of a classifier."""
    from trainer.data import tfds

    tfds.prepare("shakespeare", str(data_dir))
    folder = tmp_path_factory.mktemp("generate")
    for split in ("train", "test"):
        (folder / f"{split}.txt").write_text(LINES)
    sizes: dict[str, Any] = {"width": 8, "layers": 1, "length": 8}
    experiments: dict[str, Any] = {
        "decoder": LanguageModel(data_dir=str(data_dir), heads=2, kv_heads=1, mlp_width=8, sample=12, **sizes),
        "lstm": LSTMLanguageModel(files=str(folder / "{split}.txt"), streams=4, eval_streams=1, **sizes),
        "classifier": Task(),
    }
    for name, experiment in experiments.items():
        evaluation = config.Evaluation(max_examples=4)
        run = config.Run(
            experiment, total_steps=2, batch_size=4, evaluation=evaluation, parallel=config.Parallel(devices=1)
        )
        trainer.train(config.resolve(run), folder / name, verbose=False)
    return {name: folder / name for name in experiments}


def printed(capsys: pytest.CaptureFixture[str], workdir: Path, *flags: str) -> str:
    assert command(["generate", f"--workdir={workdir}", *flags]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


@pytest.mark.slow
@pytest.mark.parametrize(("name", "prompt"), [("decoder", "To be"), ("lstm", "the cat")])
def test_the_text_begins_with_the_prompt_and_follows_the_flags(name, prompt, workdirs, capsys):
    flags = [f"--prompt={prompt}", "--length=12"]
    first, again, other = (printed(capsys, workdirs[name], *flags, f"--seed={seed}") for seed in (3, 3, 4))
    assert first.startswith(prompt)
    assert first == again != other
    trained = trainer.load(workdirs[name])
    experiment: Any = trained.experiment
    options = {"key": jax.random.key(3), "temperature": 0.8, "top_k": None}
    assert first == experiment.generate(trained.variables, prompt, 12, **options) + "\n"
    likeliest = printed(capsys, workdirs[name], *flags, "--temperature=0")
    assert likeliest == printed(capsys, workdirs[name], *flags, "--top-k=1", "--temperature=5", "--seed=9")
    assert likeliest == printed(capsys, workdirs[name], *flags, "--temperature=0", "--step=2")
    assert len(printed(capsys, workdirs[name], f"--prompt={prompt}", "--length=1")) < len(likeliest)


@pytest.mark.slow
def test_the_text_that_a_decoder_reports_is_the_one_that_it_generates_in_a_file_and_in_tensorboard(workdirs):
    trained = trainer.load(workdirs["decoder"])
    experiment: Any = trained.experiment
    expected = experiment.generate(trained.variables, "The ", 12, key=jax.random.key(2))
    assert (trained.step, expected[:4]) == (2, "The ")
    (file,) = (workdirs["decoder"] / "reports" / "2").iterdir()
    assert (file.name, file.read_bytes().decode()) == ("sample.txt", expected)
    folder = workdirs["decoder"] / "tensorboard"
    events = [event for name in event_files(folder) for event in read_events((folder / name).read_bytes())]
    texts = [
        (event.step, value.tag, [text.decode() for text in value.tensor.string_val], value.metadata.plugin_data)
        for event in events
        for value in event.summary.value
        if value.HasField("tensor")
    ]
    ((step, tag, shown, plugin),) = texts
    assert (step, tag, shown, plugin.plugin_name) == (2, "sample/text_summary", [expected], "text")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "flags", "answer"),
    [
        ("decoder", [], "give --prompt=TEXT, the text to go on from"),
        ("decoder", ["--prompt="], "--prompt has no value"),
        ("decoder", ["--prompt=a", "--length=0"], "--length is 0; it must be at least 1 and below 2^32"),
        ("decoder", ["--prompt=a", "--temperature=-1"], "--temperature is -1.0; it must be at least 0 and below 2^32"),
        ("decoder", ["--prompt=a", "--temperature=nan"], "--temperature is nan; it must be at least 0 and below 2^32"),
        ("decoder", ["--prompt=a", "--top-k=0"], "--top-k is 0; it must be at least 1 and below 2^32"),
        ("decoder", ["--prompt=a", "--step=7"], "there is no checkpoint of step '7'; there are 2, latest, best"),
        ("lstm", ["--prompt= "], "the prompt is empty; the model needs a token to begin with"),
        ("lstm", ["--prompt=a cow"], "the word 'a' is not in the training text, nor is <unk>"),
        ("classifier", ["--prompt=a"], "Task has no method generate(variables, prompt, length, ...)"),
    ],
)
def test_a_mistake_is_one_line(name, flags, answer, workdirs, capsys):
    assert command(["generate", f"--workdir={workdirs[name]}", *flags]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert answer in captured.err


def test_tokens_are_drawn_from_the_k_likeliest_in_proportion_to_their_probabilities():
    logits = jnp.log(jnp.array([[1.0, 2.0, 3.0, 4.0]]))
    rows = jnp.tile(logits, (20_000, 1))
    drawn = np.asarray(draw(rows, jax.random.key(0), 1.0, 3))
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / len(drawn), [0, 2 / 9, 3 / 9, 4 / 9], atol=0.02)
    drawn = np.asarray(draw(rows, jax.random.key(0), 0.5, None))  # each probability is squared
    np.testing.assert_allclose(np.bincount(drawn) / len(drawn), np.array([1, 4, 9, 16]) / 30, atol=0.02)
    assert draw(logits, jax.random.key(0), 0, None).tolist() == [3]
    assert draw(logits, jax.random.key(0), 1.0, 9).shape == (1,)
