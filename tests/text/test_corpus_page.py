"""The example of docs/corpus.md runs."""

import re
from pathlib import Path
from typing import Any

from experiments.datasets import packed_text
from experiments.datasets.shakespeare import HELD_OUT, works

PAGE = (Path(__file__).parents[2] / "docs" / "corpus.md").read_text()


def test_the_example_packs_a_data_set_with_all_its_bytes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(packed_text, "SAMPLE_BYTES", 100_000)
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, Any] = {}
    exec(block, names)
    texts = [works()[title] for title in HELD_OUT["test"]]
    assert names["total"] == sum(map(len, texts))
    assert any(names["text"] in text for text in texts) or len(set(names["row"]["segments"].tolist())) > 1
