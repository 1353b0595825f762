"""Makes tests/data/saved with Hugging Face's `datasets`; the tests themselves need no `datasets`.

In an environment of its own:

    pip install datasets==5.2.0
    python tests/data/make_saved.py

The folder is a `DatasetDict` of two splits: "train" in three files, and "test", whose rows were shuffled before they
were saved.
"""

from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "saved"
ROWS = {"train": range(24), "test": [29, 24, 28, 25, 27, 26]}


def row(i: int) -> dict[str, Any]:
    """Row i of the data; the rows of "test" follow those of "train"."""
    return {
        "text": f"{i} bottles of beer, " + "ö" * (i % 5),
        "label": i % 2,
        "number": i * 10**10,
        "vector": [i, i / 2, -i],
        "ids": list(range(i % 4)),
        "raw": bytes([i, 255]),
    }


def main() -> None:
    """Writes the folder."""
    # pyrefly: ignore[missing-import] - only who remakes the folder has it
    from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

    features = Features(
        {
            "text": Value("string"),
            "label": ClassLabel(names=["even", "odd"]),
            "number": Value("int64"),
            "vector": List(Value("float32"), length=3),
            "ids": List(Value("int32")),
            "raw": Value("binary"),
        }
    )
    splits = {}
    for split, numbers in ROWS.items():
        ordered = Dataset.from_list([row(i) for i in sorted(numbers)], features=features)
        splits[split] = ordered.select([i - min(numbers) for i in numbers])
    DatasetDict(splits).save_to_disk(str(FOLDER), num_shards={"train": 3, "test": 1})


if __name__ == "__main__":
    main()
