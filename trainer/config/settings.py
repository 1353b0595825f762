"""Every setting of a run, declared once, with its range and unit."""

import dataclasses
from typing import Any

from trainer.experiment import Experiment


def setting(
    default: Any = dataclasses.MISSING,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: tuple[str, ...] | None = None,
    may_change: bool = False,
) -> Any:
    """A dataclass field with its range.

    Args:
      default: the value when none is given.
      minimum: the smallest accepted number.
      maximum: the largest accepted number.
      choices: the accepted names.
      may_change: whether a run may be resumed with another value; every other setting is what makes it that run.
    """
    return dataclasses.field(
        default=default,
        metadata={"minimum": minimum, "maximum": maximum, "choices": choices, "may_change": may_change},
    )


@dataclasses.dataclass
class Schedule:
    """A number, such as the learning rate, as a function of the updates already made."""

    name: str = setting(
        "constant", choices=("constant", "linear", "cosine", "polynomial", "wsd", "step", "inverse_sqrt")
    )
    """What follows the warm-up: `constant`, a `linear`, `cosine` or `polynomial` descent, `wsd` (constant, then a
    linear descent), `step` (multiplied by `factor` at every boundary), or `inverse_sqrt`: peak · √(w / max(t, w)) after
    t updates, where w is the warm-up in updates, at least 1."""
    peak: float = setting(1e-3, minimum=0)
    """Value at the end of the warm-up."""
    final: float = setting(0.0, minimum=0)
    """Value at the end of a descent, and from then on."""
    unit: str = setting("steps", choices=("steps", "epochs", "examples", "percent"))
    """What `warmup`, `end`, `descent` and `boundaries` count: updates, passes over the training split, training
    examples, or percent of the run. Each is rounded to the nearest update."""
    warmup: float = setting(0.0, minimum=0)
    """How long the value rises linearly from 0 to `peak`."""
    end: float | None = setting(None, minimum=0)
    """When a descent reaches `final`, counted from the first update, warm-up included; None for the end of the run."""
    descent: float | None = setting(None, minimum=0)
    """How long the descent of `wsd` takes, up to `end`."""
    boundaries: tuple[float, ...] = setting(())
    """When `step` multiplies by `factor`, counted from the first update."""
    factor: float = setting(0.1, minimum=0, maximum=1)
    """What `step` multiplies by."""
    power: float = setting(1.0, minimum=0)
    """Exponent of `polynomial`, above 0: peak − final is multiplied by (share of the descent that is left) ** power."""
    run_steps: int | None = setting(None, minimum=1)
    """Length in updates of the run that the schedule is made for; None for `total_steps`. Resolving fills it in when the
    schedule depends on it, so that a run which goes on with more steps does not change what it has already done."""


@dataclasses.dataclass
class Group:
    """What the parameters of one label share. All groups are updated together, in one pass."""

    weight_decay: float = setting(0.0, minimum=0)
    """How strongly parameters decay; see `Optimizer.decay`."""
    decay_schedule: Schedule | None = setting(None)
    """The same as a schedule, instead of a number."""
    optimizer: str | None = setting(None, choices=("adabelief", "adam", "sgd"))
    """Another optimizer for this group, with the same b1, b2, eps and eps_root; None for that of the run."""
    schedule: Schedule | None = setting(None)
    """Another learning rate for this group; None for that of the run."""
    lr_multiplier: float = setting(1.0, minimum=0)
    """What the group's learning rate is multiplied by."""
    frozen: bool = setting(False)
    """Whether nothing happens to the parameters; no gradients are computed for them, and no moments kept."""
    clip_norm: float | None = setting(None, minimum=0)
    """Largest norm of the gradient of the whole group, which is scaled down to it; None for any."""
    every_steps: int = setting(1, minimum=1)
    """The group is updated at the first step and then once in so many; the gradients between are not used."""
    mu_dtype: str | None = setting(None, choices=("float32", "bfloat16"))
    """Dtype in which the first moment is stored; None for `Optimizer.mu_dtype`."""
    nu_dtype: str | None = setting(None, choices=("float32", "bfloat16"))
    """Dtype in which the second moment is stored; None for `Optimizer.nu_dtype`."""


@dataclasses.dataclass
class Optimizer:
    """The optimizer and the labels that steer it."""

    name: str = setting("adabelief", choices=("adabelief", "adam", "sgd"))
    """`adabelief`, or, to compare with, `adam` or `sgd` with momentum b1."""
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    """The learning rate."""
    b1: float = setting(0.9, minimum=0)
    """Decay of the mean of the gradients per update, below 1."""
    b2: float = setting(0.999, minimum=0)
    """Decay of the mean of the squared prediction errors per update, below 1."""
    eps: float = setting(1e-16, minimum=0)
    """Added to the root in the denominator. The paper's settings: 1e-8 for vision, 1e-16 or 1e-12 for LSTMs."""
    eps_root: float = setting(1e-16, minimum=0)
    """Added to the second moment at every update, where it accumulates (AdaBelief), or inside the root (Adam)."""
    nesterov: bool = setting(False)
    """Whether the mean looks one update ahead."""
    rectify: bool = setting(False)
    """Whether the variance of AdaBelief's first steps is rectified, as in RAdam."""
    sgd_fallback: bool = setting(True)
    """What rectification does while the variance is intractable: steps of SGD, or none."""
    amsgrad: bool = setting(False)
    """Whether AdaBelief divides by the largest second moment so far."""
    decay: str = setting("decoupled", choices=("decoupled", "fixed", "coupled"))
    """`decoupled` subtracts learning rate · weight_decay · parameter at each update; `fixed` leaves out the learning
    rate; `coupled` adds weight_decay · parameter to the gradient."""
    clip_norm: float | None = setting(None, minimum=0)
    """Largest norm of the whole gradient, which is scaled down to it, before groups clip theirs; None for any."""
    mu_dtype: str | None = setting(None, choices=("float32", "bfloat16"))
    """Dtype in which first moments are stored; None for that of the parameters, but at least float32. Bfloat16 is rounded
    stochastically, so that the mean over many updates is exact."""
    nu_dtype: str | None = setting(None, choices=("float32", "bfloat16"))
    """Dtype in which second moments are stored, likewise."""
    ema_decay: float | None = setting(None, minimum=0)
    """Decay per update, below 1, of an exponential moving average of the parameters (EMA params), which is evaluated in
    their place; None to keep none. The first 1 / (1 − decay) updates count equally."""
    labels: tuple[tuple[str, str], ...] = setting(((".*", "default"),))
    """Ordered (regex, label) rules over whole parameter paths; the first match decides."""
    groups: dict[str, Group] = dataclasses.field(default_factory=lambda: {"default": Group()})
    """What each label means."""


@dataclasses.dataclass
class Evaluation:
    """When and on what the run is evaluated."""

    split: str = setting("test", may_change=True)
    """The split given to the experiment's `source`."""
    every_steps: int | None = setting(None, minimum=1, may_change=True)
    """Updates between evaluations; None for the end only. The end is always evaluated."""
    batch_size: int | None = setting(None, minimum=1, may_change=True)
    """Examples per evaluation batch over all devices; None for the run's `batch_size`."""


@dataclasses.dataclass
class Checkpoint:
    """What is kept of the run."""

    every_steps: int = setting(1000, minimum=1, may_change=True)
    """Updates between checkpoints. The end is always saved."""
    keep_last: int = setting(2, minimum=1, may_change=True)
    """How many of the newest checkpoints to keep."""
    best_metric: str | None = setting(None, may_change=True)
    """Also keep the checkpoint with the best value of this evaluation metric, such as "test/accuracy"; None to keep the
    newest only."""
    best_mode: str = setting("max", choices=("max", "min"), may_change=True)
    """Whether the best value is the largest or the smallest."""


@dataclasses.dataclass
class Logging:
    """What is written while the run goes on."""

    every_steps: int = setting(50, minimum=1, may_change=True)
    """Updates between rows of metrics."""


@dataclasses.dataclass
class Loading:
    """How examples reach the host's memory."""

    split: str = setting("train")
    """The split trained on, given to the experiment's `source`."""
    in_memory_bytes: int = setting(2 << 30, minimum=0, may_change=True)
    """A split of at most this size once decoded is decoded once and served from memory; a larger one is read again
    every epoch."""
    threads: int = setting(4, minimum=1, may_change=True)
    """Threads that read and decode batches of a split that does not fit."""
    workers: int = setting(0, minimum=0, may_change=True)
    """Processes that do so instead, each with its threads, when decoding takes more Python than one can run; 0 for
    none. The order of the examples is the same."""


@dataclasses.dataclass
class Parallel:
    """How a step spreads over the devices: a mesh with the axes data, fsdp and tensor, any of which may be 1."""

    strategy: str = setting(
        "data",
        choices=("data", "zero1", "fsdp", "tensor", "zero1_tensor", "fsdp_tensor", "pmap"),
        may_change=True,
    )
    """`data`: parameters and optimizer state whole on every device; `zero1`: the optimizer's state split; `fsdp`:
    parameters, too; `tensor`: parameters split by rules or logical axes, and the computation with them; the products;
    `pmap`: the classical replicated step. Batches are split over data and fsdp."""
    devices: int | None = setting(None, minimum=1, may_change=True)
    """How many devices to use, from the first; None for all, of all processes."""
    fsdp: int | None = setting(None, minimum=1, may_change=True)
    """Size of the mesh axis over which `zero1` and `fsdp` shard; None for all devices of a slice that tensor leaves."""
    tensor: int | None = setting(None, minimum=1, may_change=True)
    """Size of the mesh axis over which `tensor` shards; None for all devices of a slice, and 2 in a product."""
    num_slices: int | None = setting(None, minimum=1, may_change=True)
    """Slices, which only the data axis spans, since the network between them is slow; None for as many as there are."""
    torus: bool = setting(True, may_change=True)
    """Whether fsdp gets a mesh axis for each dimension of the torus that the chips form, so that gradients are reduced
    and scattered along one after the other; a ring over all is the alternative. Means nothing elsewhere."""
    rules: tuple[tuple[str, tuple[str | None, ...]], ...] = setting((), may_change=True)
    """Ordered (regex, axes) rules over whole parameter paths: for each dimension the axis that splits it, or None.
    Without any, the logical axes of the model decide; without these, the largest dimension that divides is split over
    fsdp. The optimizer's state follows its parameters."""
    axis_rules: tuple[tuple[str, str | None], ...] = setting(
        (
            ("vocab", "tensor"),
            ("heads", "tensor"),
            ("mlp", "tensor"),
            ("vocab", "fsdp"),
            ("embed", "fsdp"),
            ("head_dim", None),
            ("layers", None),
            ("length", None),
        ),
        may_change=True,
    )
    """The axis that each logical axis of a Linen model is split over, or None. Of several rules for one, that holds
    first whose axis has more than one device and splits no other dimension of the array."""
    min_shard_size: int = setting(2**12, minimum=0, may_change=True)
    """Without rules and logical axes, parameters with fewer numbers stay whole."""
    reduce_dtype: str = setting("float32", choices=("float32", "bfloat16"))
    """The dtype in which gradients are summed over rows and devices. `float32`: always; `bfloat16`: those that a model
    computes in bfloat16 are summed in it, and under `pmap` all are, which halves the communication."""


@dataclasses.dataclass
class Run:
    """A whole run."""

    experiment: Experiment
    total_steps: int = setting(minimum=1, may_change=True)
    """Updates until the run is finished. A finished run goes on when it is launched again with more, unless its
    schedule was to end with it."""
    batch_size: int = setting(128, minimum=1)
    """Examples per update, over all devices and microbatches."""
    microbatches: int = setting(1, minimum=1)
    """Program into which each batch is split to save memory; their sums are divided once. BatchNorm sees one part
    at a time, so with it the number of parts changes the result."""
    seed: int = setting(0, minimum=0, maximum=2**32 - 1)
    """Everything random follows from it: initial parameters, order of the data, dropout, augmentation."""
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    loading: Loading = dataclasses.field(default_factory=Loading)
    evaluation: Evaluation = dataclasses.field(default_factory=Evaluation)
    checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)
    logging: Logging = dataclasses.field(default_factory=Logging)
    parallel: Parallel = dataclasses.field(default_factory=Parallel)
