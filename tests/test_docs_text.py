"""docs/text.md: its code runs, its command and its settings are there, and its figures are within the tests' bounds."""

import re
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.attention import ATTENTIONS
from trainer.commands import generate
from trainer.commands.arguments import make_parser, parse_flags
from trainer.data.stream import eval_batches

PAGE = (Path(__file__).parents[1] / "docs" / "text.md").read_text()


def test_the_vocabulary_of_the_page_learns_from_packed_rows_and_writes_letters():
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict = {"__name__": "letters"}
    exec(block, names)
    task = names["Letters"](vocab=256, width=8, layers=1, heads=2, mlp_width=8, length=18)
    (batch,) = eval_batches(task.source("train"), 1)
    batch = jax.tree.map(jnp.asarray, batch)
    variables = jax.jit(task.init)(jax.random.key(0), batch)
    metrics, _ = jax.jit(lambda v, b: task.loss(v, b, key=jax.random.key(0), train=False))(variables, batch)
    assert float(metrics["loss"].weight) == 4 + 11
    assert np.isfinite(metrics["bits_per_byte"].compute())
    assert task.decode(task.encode("to be")) == "to be"


def test_the_command_of_the_page_has_these_flags():
    (line,) = re.findall(r"^python -m trainer generate (.*)", PAGE, re.MULTILINE)
    parser = make_parser("generate", generate.DESCRIPTION)
    generate.add_options(parser)
    options, overrides = parse_flags(parser, shlex.split(line))
    assert (options.prompt, options.top_k, overrides) == ("To be", 40, [])


def test_the_page_names_every_attention():
    assert set(re.findall(r'`attention="(\w+)"`', PAGE)) == set(ATTENTIONS)
