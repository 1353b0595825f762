"""A notebook in a real Jupyter kernel: a class of its own, every line once, and Jupyter's own interrupt."""

import asyncio
import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from sklearn.metrics import confusion_matrix

from tests.tasks import Net, Task, make_run
from trainer import load
from trainer.observe.log import read_rows

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
EXPERIMENT = """
import dataclasses
from tests.tasks import Task, make_run
from trainer import train

@dataclasses.dataclass
class Points(Task):
    examples: int = 40

assert Points.__module__ == "__main__"
"""


class Client(NotebookClient):
    """Keeps the messages of the kernel that show or replace a drawing."""

    def process_message(self, msg: Any, cell: Any, cell_index: int) -> Any:
        if msg["msg_type"] in ("display_data", "update_display_data"):
            shown: list[Any] = self.__dict__.setdefault("shown", [])
            shown.append((msg["msg_type"], msg["content"]["transient"]["display_id"], msg["content"]["data"]))
        return super().process_message(msg, cell, cell_index)


class Kernel:
    """A Jupyter kernel that runs cells one after another, as a notebook does."""

    def __init__(self, client: NotebookClient) -> None:
        self._client: Any = client  # whose methods are typed as if they were not asynchronous

    def run(self, source: str) -> str:
        """Runs a cell and returns its standard output; raises `CellExecutionError` if the cell does."""
        cell = nbformat.v4.new_code_cell(source)
        self._client.nb.cells.append(cell)
        self._client.execute_cell(cell, len(self._client.nb.cells) - 1)
        return "".join(output.text for output in cell.outputs if output.get("name") == "stdout")

    def messages(self) -> list[Any]:
        """(kind, id, data) of each drawing that was shown or replaced since the last call."""
        return self._client.__dict__.pop("shown", [])

    def drawings(self) -> list[Any]:
        """The display of the last cell, by media type."""
        return [output.data for output in self._client.nb.cells[-1].outputs if output.output_type == "display_data"]

    def interrupt(self) -> None:
        """Does what the button "interrupt the kernel" does."""
        asyncio.run(self._client.km.interrupt_kernel())


@pytest.fixture
def kernel(tmp_path, monkeypatch) -> Iterator[Kernel]:
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    client = Client(
        nbformat.v4.new_notebook(), timeout=120, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    )
    with client.setup_kernel():
        yield Kernel(client)


def test_a_class_of_a_cell_trains_twice_in_one_workdir_and_each_line_is_shown_once(kernel, tmp_path):
    kernel.run(EXPERIMENT)
    cell = f"state = train(make_run(4, experiment=Points()), {str(tmp_path / 'run')!r})"
    shown = kernel.run(cell)
    assert re.findall(r"^step (\d)/4  loss ", shown, re.MULTILINE) == ["1", "2", "3", "4"]
    lines = [line for line in shown.splitlines() if line]
    assert sorted(lines) == sorted(set(lines))
    assert "resumed from step 4 (finished: nothing is left to do)" in kernel.run(cell)
    assert kernel.run("print(int(state.step))") == "4\n"


def test_jupyters_interrupt_breaks_the_cell_at_once_and_the_kernel_trains_on(kernel, tmp_path):
    kernel.run(EXPERIMENT)
    kernel.run("import signal; handler = signal.getsignal(signal.SIGINT)")
    metrics = tmp_path / "run" / "metrics.jsonl"

    def interrupt_in_training() -> None:
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < 3:
            time.sleep(0.02)
        kernel.interrupt()

    thread = threading.Thread(target=interrupt_in_training)
    thread.start()
    with pytest.raises(CellExecutionError) as raised:
        kernel.run(f"train(make_run(1_000_000, experiment=Points()), {str(tmp_path / 'run')!r})")
    thread.join()
    assert raised.value.ename == "KeyboardInterrupt"
    assert kernel.run("print(handler is signal.getsignal(signal.SIGINT))") == "True\n"
    for folder in ("run", "next"):
        assert "step 5/5" in kernel.run(f"state = train(make_run(5, experiment=Points()), {str(tmp_path / folder)!r})")
        assert [row["step"] for row in read_rows(tmp_path / folder / "metrics.jsonl")] == [1, 2, 3, 4, 5]


TRAIN = """
import trainer
from trainer.hooks import EarlyStopping, Plot

run = make_run(8, experiment=Points())
run.optimizer.schedule.end = 20
run.evaluation.every_steps = run.checkpoint.every_steps = 2
plot = Plot("train/loss", "test/loss")
state = trainer.train(run, WORKDIR, hooks=[plot, EarlyStopping("test/loss", patience=50)])
"""
MATRIX = """
import numpy as np
trained = trainer.load(WORKDIR, run=run)
batch = trainer.take(run.experiment.source("test"), range(21))
matrix = np.zeros((3, 3), int)
np.add.at(matrix, (batch["label"], trained.predict(batch)["label"]), 1)
print(trained.step, matrix.tolist())
"""


def test_train_watch_load_a_confusion_matrix_and_train_on(kernel, tmp_path):
    kernel.run(EXPERIMENT.replace("    examples: int = 40", PREDICTS))
    kernel.run(f"WORKDIR = {str(tmp_path / 'run')!r}")
    kernel.run(TRAIN)
    (drawing,) = kernel.drawings()  # one, updated in place
    in_place(kernel.messages(), drawing, count=12)  # 8 rows and 4 evaluations
    assert kernel.run(MATRIX) == f"8 {matrix_of(tmp_path / 'run', 8)}\n"
    kernel.run("run.total_steps = 12")
    assert "resumed from step 8" in kernel.run("state = trainer.train(run, WORKDIR, hooks=[plot])")
    (drawing,) = kernel.drawings()
    in_place(kernel.messages(), drawing, count=6)
    assert kernel.run(MATRIX) == f"12 {matrix_of(tmp_path / 'run', 12)}\n"
    assert kernel.run("print([step for step, _ in plot._values['test/loss']])") == "[2, 4, 6, 8, 10, 12]\n"


def in_place(messages: list[Any], drawing: Any, count: int) -> None:
    """Asserts that a drawing was shown once and replaced each further time, by another image."""
    kinds, ids, data = zip(*messages, strict=True)
    assert kinds == ("display_data", *["update_display_data"] * (count - 1))
    assert len(set(ids)) == 1
    images = [image["image/png"] for image in data]
    assert len(set(images)) == count
    assert images[-1] == drawing["image/png"]


def matrix_of(workdir: Path, step: int) -> str:
    """The confusion matrix of a checkpoint, computed in this process without the notebook's class."""
    trained = load(workdir, step, run=make_run(step, experiment=Task(examples=40)))
    test = Task().source("test").arrays
    logits = Net(0.0, True).apply(trained.variables, jnp.asarray(test["x"]), train=False)
    return json.dumps(confusion_matrix(test["label"], np.asarray(logits).argmax(-1), labels=range(3)).tolist())


PREDICTS = """    examples: int = 40

    def predict(self, variables, batch):
        from tests.tasks import Net
        return {"label": Net(self.dropout, self.batch_norm).apply(variables, batch["x"], train=False).argmax(-1)}
"""
