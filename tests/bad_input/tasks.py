"""A small task, and tasks that each break one rule of the protocol of an experiment."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax

from trainer.data import ArraySource
from trainer.data.tfds import TfdsSource, prepare
from trainer.errors import UserError
from trainer.metrics import Mean


@dataclasses.dataclass
class Task:
    """Three classes of points in four dimensions, told apart by one matrix and a bias."""

    width: int = 3
    rate: float = 0.5
    name: str = "points"
    sizes: tuple[int, ...] = (3,)
    limit: int | None = None

    def init(self, key: Any, batch: Any) -> Any:
        return {"params": {"dense": {"kernel": jnp.zeros((4, 3)), "bias": jnp.zeros(3)}}}

    def loss(self, variables: Any, batch: Any, *, key: Any, train: bool) -> Any:
        return {"loss": self.mean(variables, batch)}, {}

    def source(self, split: str) -> Any:
        return ArraySource(self.arrays(split))

    def mean(self, variables: Any, batch: Any) -> Mean:
        dense = variables["params"]["dense"]
        logits = batch["x"] @ dense["kernel"] + dense["bias"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return Mean.of(losses, batch["mask"])

    def arrays(self, split: str) -> dict[str, Any]:
        rng = np.random.default_rng({"train": 0, "test": 1}[split])
        label = rng.integers(0, 3, 24).astype(np.int32)
        return {"x": (rng.normal(size=(24, 4)) + label[:, None]).astype(np.float32), "label": label}


class Examples:
    """A source of given examples."""

    def __init__(self, examples: list[Any]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Any:
        return self.examples[index]


# Variables.


class InitReturnsNone(Task):
    def init(self, key, batch):
        return None


class InitReturnsArray(Task):
    def init(self, key, batch):
        return jnp.zeros(3)


class InitWithoutParams(Task):
    def init(self, key, batch):
        return {"batch_stats": {"mean": jnp.zeros(3)}}


class InitWithEmptyParams(Task):
    def init(self, key, batch):
        return {"params": {}}


class InitTakesNoBatch(Task):
    def init(self, key):  # pyrefly: ignore[bad-override] - the mistake
        return {}


class InitOfAnotherShape(Task):
    def init(self, key, batch):
        return {"params": {"dense": {"kernel": jnp.zeros((5, 3)), "bias": jnp.zeros(3)}}}


class InitWithInteger(Task):
    def init(self, key, batch):
        params = super().init(key, batch)["params"]
        return {"params": params | {"count": jnp.zeros((), jnp.int32)}}


class InitMisnames(Task):
    def init(self, key, batch):
        return {"params": {"dense": {"weight": jnp.zeros((4, 3)), "bias": jnp.zeros(3)}}}


class InitReadsAnotherEntry(Task):
    def init(self, key, batch):
        return {"params": {"dense": jnp.zeros(batch["image"].shape)}}


class InitSows(Task):
    """Its collection is not returned by its loss."""

    def init(self, key, batch):
        return super().init(key, batch) | {"stats": {"mean": jnp.zeros(3)}}


class InitReadsValues(Task):
    def init(self, key, batch):
        return {"params": {"dense": jnp.zeros(int(batch["label"].max()) + 1)}}


# Losses.


class LossReturnsMean(Task):
    def loss(self, variables, batch, *, key, train):
        return self.mean(variables, batch)


class LossReturnsMetrics(Task):
    def loss(self, variables, batch, *, key, train):
        return {"loss": self.mean(variables, batch)}


class LossReturnsNone(Task):
    def loss(self, variables, batch, *, key, train):
        return None


class LossIsArray(Task):
    def loss(self, variables, batch, *, key, train):
        return {"loss": self.mean(variables, batch).total}, {}


class LossIsMissing(Task):
    def loss(self, variables, batch, *, key, train):
        return {"cross_entropy": self.mean(variables, batch)}, {}


class LossOfEachExample(Task):
    def loss(self, variables, batch, *, key, train):
        return {"loss": Mean(batch["x"].sum(1) * variables["params"]["dense"]["bias"][0], batch["mask"])}, {}


class MetricOfVectorShape(Task):
    def loss(self, variables, batch, *, key, train):
        return {"loss": self.mean(variables, batch), "scores": Mean(jnp.ones(3), jnp.ones(()))}, {}


class MetricIsFloat(Task):
    def loss(self, variables, batch, *, key, train):
        return {"loss": self.mean(variables, batch), "accuracy": 0.5}, {}


class MetricOfNamesThatAreNumbers(Task):
    def loss(self, variables, batch, *, key, train):
        return {"loss": self.mean(variables, batch), 1: self.mean(variables, batch)}, {}


class LossTakesNoKey(Task):
    def loss(self, variables, batch, *, train):  # pyrefly: ignore[bad-override] - the mistake
        return {"loss": self.mean(variables, batch)}, {}


class LossReadsAnotherEntry(Task):
    def loss(self, variables, batch, *, key, train):
        return {"loss": Mean.of(batch["lable"], batch["mask"])}, {}


class LossMisnamesMethod(Task):
    def loss(self, variables, batch, *, key, train):
        return {"loss": Mean.of(batch["x"].avg(1), batch["mask"])}, {}


class LossOfTwoShapes(Task):
    def loss(self, variables, batch, *, key, train):
        return {"loss": Mean.of(batch["x"][:, :1] - batch["mask"], batch["mask"])}, {}


class LossReadsValues(Task):
    def loss(self, variables, batch, *, key, train):
        return ({"loss": self.mean(variables, batch)} if batch["label"].sum() > 0 else {}), {}


class LossReturnsAnotherCollection(Task):
    def loss(self, variables, batch, *, key, train):
        return {"loss": self.mean(variables, batch)}, {"losses": {"kernel": jnp.zeros(())}}


class LossReturnsCollectionOfAnotherShape(Task):
    def init(self, key, batch):
        return super().init(key, batch) | {"stats": {"mean": jnp.zeros(3)}}

    def loss(self, variables, batch, *, key, train):
        return {"loss": self.mean(variables, batch)}, {"stats": {"mean": jnp.zeros(4)}}


class LossReturnsCollectionWithAnotherEntry(InitSows):
    def loss(self, variables, batch, *, key, train):
        return {"loss": self.mean(variables, batch)}, {"stats": {"mean": jnp.zeros(3), "var": jnp.zeros(3)}}


class LossIsInteger(Task):
    def loss(self, variables, batch, *, key, train):
        return {"loss": Mean(jnp.int32(3), jnp.int32(1))}, {}


class NormNamesAxis(Task):
    """Its BatchNorm names an axis that no strategy but pmap has."""

    def norm(self) -> nn.Module:
        return nn.BatchNorm(use_running_average=False, axis_name="batch")

    def init(self, key, batch):
        variables = super().init(key, batch)
        shape = {"scale": jnp.ones(4), "bias": jnp.zeros(4)}
        stats = {"mean": jnp.zeros(4), "var": jnp.ones(4)}
        return {"params": variables["params"] | {"norm": shape}, "batch_stats": stats}

    def loss(self, variables, batch, *, key, train):
        own = {"params": variables["params"]["norm"], "batch_stats": variables["batch_stats"]}
        x, new = self.norm().apply(own, batch["x"], mutable=["batch_stats"])
        return {"loss": self.mean(variables, batch | {"x": x})}, new


# Sources.


class SourceIsNone(Task):
    def source(self, split):
        return None


class SourceIsGenerator(Task):
    def source(self, split) -> Iterator[Any]:
        yield self.arrays(split)


class SourceIsEmpty(Task):
    def source(self, split):
        return Examples([])


class SourceOfEmptyArrays(Task):
    def source(self, split):
        return ArraySource({name: array[:0] for name, array in self.arrays(split).items()})


class SourceOfOtherLengths(Task):
    def source(self, split):
        return ArraySource(self.arrays(split) | {"label": np.zeros(7, np.int32)})


class SourceOfNoArrays(Task):
    def source(self, split):
        return ArraySource({})


class SourceOfTuples(Task):
    def source(self, split):
        return Examples([(np.zeros(4, np.float32), 1)] * 24)


class SourceOfEmptyExamples(Task):
    def source(self, split):
        return Examples([{}] * 24)


class SourceIsRagged(Task):
    def source(self, split):
        return Examples([{"x": np.zeros(4 + index % 2, np.float32), "label": np.int32(1)} for index in range(24)])


class SourceIsRaggedLate(Task):
    def source(self, split):
        return Examples([{"x": np.zeros(4 + (index == 17), np.float32), "label": np.int32(1)} for index in range(24)])


class SourceLacksEntryLate(Task):
    def source(self, split):
        x = np.zeros(4, np.float32)
        return Examples([{"x": x} if index == 17 else {"x": x, "label": np.int32(1)} for index in range(24)])


class SourceHasEntryLate(Task):
    def source(self, split):
        example = {"x": np.zeros(4, np.float32), "label": np.int32(1)}
        return Examples([example | ({"weight": np.float32(1)} if index == 17 else {}) for index in range(24)])


class SourceOfOtherDtypeLate(Task):
    def source(self, split):
        x = np.zeros(4, np.float32)
        return Examples([{"x": x, "label": 0.5 if index == 17 else np.int32(1)} for index in range(24)])


class SourceOfStrings(Task):
    def source(self, split):
        return ArraySource(self.arrays(split) | {"text": np.array(["a word"] * 24)})


class SourceOfBytes(Task):
    def source(self, split):
        return Examples([{"x": np.zeros(4, np.float32), "label": np.int32(1), "file": b"\x89PNG"}] * 24)


class SourceOfObjects(Task):
    def source(self, split):
        return ArraySource(self.arrays(split) | {"meta": np.array([{}] * 24, object)})


class SourceOfNones(Task):
    def source(self, split):
        return Examples([{"x": np.zeros(4, np.float32), "label": None}] * 24)


class SourceOfDates(Task):
    def source(self, split):
        return ArraySource(self.arrays(split) | {"day": np.zeros(24, "datetime64[D]")})


class SourceOfNestedLists(Task):
    def source(self, split):
        return Examples([{"x": [[1.0], [2.0, 3.0]], "label": np.int32(1)}] * 24)


class SourceNamesMask(Task):
    def source(self, split):
        return ArraySource(self.arrays(split) | {"mask": np.ones(24, np.float32)})


class SourceNamesKey(Task):
    def source(self, split):
        return ArraySource(self.arrays(split) | {"example_key": np.ones(24, np.float32)})


class SourceOfScalars(Task):
    def source(self, split):
        return ArraySource(self.arrays(split) | {"x": np.zeros(24, np.float32)})


class SourceNumbersItsEntries(Task):
    def source(self, split):
        return ArraySource(dict(enumerate(self.arrays(split).values())))  # pyrefly: ignore[bad-argument-type] - the mistake


class SourceRefuses(Task):
    def source(self, split):
        raise UserError("the archive points.zip is not in ~/data")


class SourceMissesFile(Task):
    def source(self, split):
        return ArraySource({"x": np.load("points.npy")})


class SourceIsNotPrepared(Task):
    def source(self, split):
        return TfdsSource("points", split, ("x",), data_dir="data")


@dataclasses.dataclass
class OfTfds(Task):
    """The images of a data set of TFDS."""

    dataset: str = "digits"
    feature: str = "image"
    data_dir: str | None = None

    def source(self, split):
        return TfdsSource(self.dataset, split, (self.feature, "label"), self.data_dir)

    def prepare(self):
        prepare(self.dataset, self.data_dir)


# Classes that are no experiment.


@dataclasses.dataclass
class NoInit:
    def loss(self, variables, batch, *, key, train): ...

    def source(self, split): ...


@dataclasses.dataclass
class NoLoss:
    def init(self, key, batch): ...

    def source(self, split): ...


@dataclasses.dataclass
class NoSource:
    def init(self, key, batch): ...

    def loss(self, variables, batch, *, key, train): ...


class NoDataclass:
    def init(self, key, batch): ...

    def loss(self, variables, batch, *, key, train): ...

    def source(self, split): ...


@dataclasses.dataclass
class HoldsArray(Task):
    weights: Any = dataclasses.field(default_factory=lambda: np.ones(3))


@dataclasses.dataclass
class HoldsFunction(Task):
    activation: Any = nn.relu


@dataclasses.dataclass
class HoldsList(Task):
    layers: Any = dataclasses.field(default_factory=lambda: [3, 4])


@dataclasses.dataclass
class HoldsPath(Task):
    folder: Any = dataclasses.field(default_factory=lambda: __import__("pathlib").Path("data"))
