"""Every setting of a run, declared once, with its range and unit."""

import dataclasses
from typing import Any

from trainer.experiment import Experiment

_SHAPES = ("constant", "linear", "cosine", "polynomial", "wsd", "step", "inverse_sqrt")
_MOST = 2**31 - 1  # steps are counted in int32
_STRATEGIES = ("data", "zero1", "fsdp", "tensor", "zero1_tensor", "fsdp_tensor", "pmap")


def setting(
    default: Any = dataclasses.MISSING, *, choices: tuple[str, ...] = (), may_change: bool = False, **bounds: float
) -> Any:
    """A dataclass field with its default, its accepted texts, and the bounds `minimum`, `maximum`, `above` and `below`.

    `may_change`: whether a run may be resumed with another value. If not, another value makes it another run.
    """
    metadata = {"choices": choices, "may_change": may_change, "bounds": bounds}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class Schedule:
    """A number, such as the learning rate, as a function of the updates already made."""

    name: str = setting("constant", choices=_SHAPES)
    """The shape after the warm-up: `constant`, a `linear`, `cosine` or `polynomial` descent, `wsd` (constant, then a
    linear descent), `step` (multiplied by `factor` at every boundary), or `inverse_sqrt`: peak · √(w / max(t, w)) after
    t updates, where w is the warm-up in updates, at least 1."""
    peak: float = setting(1e-3, minimum=0)  # value at the end of the warm-up
    final: float = setting(0.0, minimum=0)  # value at the end of a descent, and from then on
    unit: str = setting("steps", choices=("steps", "epochs", "examples", "percent"))
    """Unit of `warmup`, `end`, `descent` and `boundaries`: updates, passes over the training split, training examples,
    or percent of the run. Each is rounded to the nearest update."""
    warmup: float = setting(0.0, minimum=0, maximum=_MOST)  # time in which the value rises linearly from 0 to `peak`
    end: float | None = setting(None, minimum=0, maximum=_MOST)
    """Time from the first update until a descent reaches `final`, warm-up included; None for the end of the run."""
    descent: float | None = setting(None, minimum=0, maximum=_MOST)  # duration of the descent of `wsd`, up to `end`
    boundaries: tuple[float, ...] = setting(())
    """Times from the first update at which `step` multiplies by `factor`."""
    factor: float = setting(0.1, minimum=0, maximum=1)  # factor of `step`
    power: float = setting(1.0, above=0)
    """Exponent of `polynomial`: peak − final is multiplied by (share of the descent that is left) ** power."""
    run_steps: int | None = setting(None, minimum=1, maximum=_MOST)
    """Length in updates of the run that the schedule is made for; None for `total_steps`. If the
    schedule depends on the length of the run, `config.resolve` writes that length here. Then a larger `total_steps`
    cannot change the values of updates already made."""


@dataclasses.dataclass
class Group:
    """The settings that the parameters of one label share. All groups are updated together, in one pass."""

    weight_decay: float = setting(0.0, minimum=0)  # strength of the weight decay; see `Optimizer.decay`
    decay_schedule: Schedule | None = setting(None)  # weight decay as a schedule, instead of a number
    optimizer: str | None = setting(None, choices=("adabelief", "adam", "sgd"))
    """Another optimizer for this group, with the same b1, b2, eps and eps_root; None for that of the run."""
    schedule: Schedule | None = setting(None)
    """Another learning rate for this group; None for that of the run."""
    lr_multiplier: float = setting(1.0, minimum=0)  # factor of the group's learning rate
    frozen: bool = setting(False)
    """Whether the parameters never change; no gradients are computed for them, and no moments kept."""
    clip_norm: float | None = setting(None, above=0)
    """Largest norm of the group's gradient; a larger gradient is scaled down to this norm. None for no limit."""
    every_steps: int = setting(1, minimum=1, maximum=_MOST)
    """Steps between updates of the group, from the first step on; the gradients between are not used."""
    mu_dtype: str | None = setting(None, choices=("float32", "bfloat16"))
    """Dtype in which the first moment is stored; None for `Optimizer.mu_dtype`."""
    nu_dtype: str | None = setting(None, choices=("float32", "bfloat16"))
    """Dtype in which the second moment is stored; None for `Optimizer.nu_dtype`."""


@dataclasses.dataclass
class Optimizer:
    """The optimizer, its labels and its parameter groups."""

    name: str = setting("adabelief", choices=("adabelief", "adam", "sgd"))
    """`adabelief`, or for comparison `adam` or `sgd` with momentum b1."""
    schedule: Schedule = dataclasses.field(default_factory=Schedule)  # the learning rate
    b1: float = setting(0.9, minimum=0, below=1)  # decay rate per update of the moving average of the gradients
    b2: float = setting(0.999, minimum=0, below=1)
    """Decay rate per update of the moving average of the squared prediction errors; Adam: of the squared gradients."""
    eps: float = setting(1e-16, minimum=0)
    """Added to the root in the denominator. The paper's settings: 1e-8 for vision, 1e-16 or 1e-12 for LSTMs."""
    eps_root: float = setting(1e-16, minimum=0)
    """AdaBelief: added to the second moment at every update, where it accumulates. Adam: added inside the root."""
    nesterov: bool = setting(False)  # whether the first moment looks one update ahead
    rectify: bool = setting(False)
    """Whether the variance of AdaBelief's first steps is rectified, as in RAdam."""
    sgd_fallback: bool = setting(True)
    """Whether rectification, while the variance is intractable, makes SGD steps (True) or no steps (False)."""
    amsgrad: bool = setting(False)
    """Whether AdaBelief divides by the largest second moment so far."""
    decay: str = setting("decoupled", choices=("decoupled", "fixed", "coupled", "corrected"))
    """`decoupled` subtracts learning rate · weight_decay · parameter at each update; `fixed` leaves out the learning
    rate; `coupled` adds weight_decay · parameter to the gradient; `corrected` multiplies `decoupled` by learning rate /
    peak, as AdamC does."""
    cautious: bool = setting(False)  # whether elements of an update that oppose the descent are dropped
    clip_norm: float | None = setting(None, above=0)
    """Largest global norm; a larger gradient is scaled down to it before groups clip theirs. None for no limit."""
    mu_dtype: str | None = setting(None, choices=("float32", "bfloat16"))
    """Dtype in which first moments are stored; None for that of the parameters, but at least float32. Rounding to
    bfloat16 is stochastic, so that the mean over many updates is exact."""
    nu_dtype: str | None = setting(None, choices=("float32", "bfloat16"))
    """Dtype in which second moments are stored, likewise."""
    param_rounding: str = setting("nearest", choices=("nearest", "stochastic"))
    """Rounding of parameters in bfloat16 after an update; `stochastic` keeps small updates, on average."""
    ema_decay: float | None = setting(None, minimum=0, below=1)
    """Decay per update of the EMA params, an exponential moving average that is evaluated in place of the
    parameters; None for no average. The first 1 / (1 − decay) updates count equally."""
    labels: tuple[tuple[str, str], ...] = setting(((".*", "default"),))
    """Ordered (regex, label) rules over whole parameter paths; the first match wins."""
    groups: dict[str, Group] = dataclasses.field(default_factory=lambda: {"default": Group()})
    """The parameter group of each label."""


@dataclasses.dataclass
class Evaluation:
    """The evaluations of the run."""

    split: str = setting("test", may_change=True)  # the split given to the experiment's `source`
    every_steps: int | None = setting(None, minimum=1, maximum=_MOST, may_change=True)
    """Updates between evaluations; None for the end only. The end is always evaluated."""
    batch_size: int | None = setting(None, minimum=1, maximum=_MOST, may_change=True)
    """Examples per evaluation batch over all devices; None for the run's `batch_size`."""


@dataclasses.dataclass
class Checkpoint:
    """The checkpoints of the run."""

    every_steps: int = setting(1000, minimum=1, maximum=_MOST, may_change=True)
    """Updates between checkpoints; the end is always saved."""
    keep_last: int = setting(2, minimum=1, may_change=True)  # number of newest checkpoints to keep
    best_metric: str | None = setting(None, may_change=True)
    """Evaluation metric, such as "test/accuracy", whose best checkpoint is kept, too; None for the newest only."""
    best_mode: str = setting("max", choices=("max", "min"), may_change=True)
    """Whether the best value is the largest or the smallest."""
    keep_every_steps: int | None = setting(None, minimum=1, maximum=_MOST, may_change=True)
    """Checkpoints whose step is a multiple of it are kept for ever; None for no such checkpoints."""
    every_seconds: float | None = setting(None, above=0, may_change=True)
    """Longest time between checkpoints, besides `every_steps`; None for no limit. Several processes look at the clock
    at logged steps only."""
    continuous: bool = setting(False, may_change=True)
    """Whether a checkpoint is also begun as soon as the one before is on disk."""
    on_error: str = setting("stop", choices=("stop", "continue"), may_change=True)
    """When a save or a row of metrics cannot be written, as on a full disk: `stop` ends the run with exit code 3;
    `continue` says so and tries again at the next checkpoint."""


@dataclasses.dataclass
class Logging:
    """The metrics written during the run."""

    every_steps: int = setting(50, minimum=1, maximum=_MOST, may_change=True)  # updates between rows of metrics


@dataclasses.dataclass
class Watch:
    """The limits of time after which the run says what it waits for, and ends."""

    grace_seconds: float = setting(20.0, above=0, may_change=True)
    """Seconds after SIGTERM, SIGINT or SIGHUP in which the state is saved and the process ends."""
    stall_factor: float = setting(20.0, above=1, may_change=True)
    """A run without a new step for this many times the median time of a step prints the stack of every thread."""
    stall_seconds: float = setting(60.0, above=0, may_change=True)  # the least such time
    end_seconds: float | None = setting(1800.0, above=0, may_change=True)
    """Seconds without a new step after which the run saves its last complete state and ends; None for no end."""
    data_seconds: float = setting(300.0, above=0, may_change=True)
    """Seconds to wait for a batch, after which the run ends and names the batch."""


@dataclasses.dataclass
class Numerics:
    """The treatment of losses and gradients that are not finite, and of loss spikes."""

    on_nonfinite: str = setting("stop", choices=("stop", "skip"), may_change=True)
    """When a loss or a gradient is NaN or Inf: `stop` ends the run with exit code 1; `skip` drops the update."""
    max_skips: int = setting(10, minimum=1, may_change=True)  # updates dropped in a row after which the run is stopped
    spike_quantile: float | None = setting(None, above=0, maximum=1)
    """Drops an update whose loss is above `spike_factor` times this quantile of the last 128 losses that were not
    dropped; None for never. No update is dropped before there are 128."""
    spike_factor: float = setting(1.0, minimum=1)


@dataclasses.dataclass
class Loading:
    """Reading and decoding of examples on the host."""

    split: str = setting("train")  # the split trained on, given to the experiment's `source`
    in_memory_bytes: int = setting(2 << 30, minimum=0, may_change=True)
    """Largest decoded size of a split that is kept in memory. A larger split is read and decoded again every epoch."""
    threads: int = setting(4, minimum=1, may_change=True)
    """Threads that read and decode batches of a split that does not fit in memory."""
    workers: int = setting(0, minimum=0, may_change=True)
    """Worker processes that read and decode in place of this process, with `threads` threads each; 0 for none. Use them
    if Python is too slow in one process. The order of the examples is the same."""


@dataclasses.dataclass
class Parallel:
    """The sharding of a step over a mesh with the axes data, fsdp and tensor, any of which may have size 1."""

    strategy: str = setting("data", choices=_STRATEGIES, may_change=True)
    """`data`: parameters and optimizer state replicated; `zero1`: the optimizer state sharded; `fsdp`: parameters, too;
    `tensor`: parameters and their computation sharded by rules or logical axes; `zero1_tensor`, `fsdp_tensor`: both
    shardings at once; `pmap`: the classical replicated step. Batches are sharded over data and fsdp."""
    devices: int | None = setting(None, minimum=1, may_change=True)
    """Number of devices, from the first; None for all, of all processes."""
    fsdp: int | None = setting(None, minimum=1, may_change=True)
    """Size of the mesh axis over which `zero1` and `fsdp` shard; None for devices of a slice / size of `tensor`."""
    tensor: int | None = setting(None, minimum=1, may_change=True)
    """Size of the mesh axis over which `tensor` shards; None for all of a slice, but 2 in the strategies `*_tensor`."""
    num_slices: int | None = setting(None, minimum=1, may_change=True)
    """Number of slices; None for all. Only the data axis spans them, since the network between them is slow."""
    torus: bool = setting(True, may_change=True)
    """Whether fsdp gets a mesh axis for each dimension of the chips' torus, so that a reduce-scatter runs along one
    dimension after the other; else one ring runs over all chips. Without a torus it changes nothing."""
    rules: tuple[tuple[str, tuple[str | None, ...]], ...] = setting((), may_change=True)
    """Ordered (regex, PartitionSpec) rules over whole parameter paths, with a mesh axis or None for each dimension.
    Without rules, the model's logical axes decide; without them, the largest dimension that is a multiple of
    the size of fsdp is sharded over fsdp. The optimizer state is sharded like its parameters."""
    axis_rules: tuple[tuple[str, str | None], ...] = setting((), may_change=True)
    """The mesh axis over which each logical axis of a Linen model is sharded, or None. These rules come before the
    defaults: vocab, heads and mlp over tensor, vocab and embed over fsdp; head_dim, layers and length replicated. For
    each logical axis the first rule applies whose mesh axis has several devices and shards no other dimension yet."""
    strict_axes: bool = setting(False, may_change=True)
    """Whether a logical axis that no rule maps is an error; else it is replicated and reported once."""
    min_shard_size: int = setting(2**12, minimum=0, may_change=True)
    """Without rules and logical axes, parameters with fewer elements are replicated."""
    reduce_dtype: str = setting("float32", choices=("float32", "bfloat16"))
    """Dtype in which gradients are summed over examples and devices. With `bfloat16`, gradients that the model
    computes in bfloat16 are summed in bfloat16. Under `pmap`, all gradients are then summed over devices in bfloat16,
    which halves the communication."""


@dataclasses.dataclass
class Run:
    """The complete description of a run."""

    experiment: Experiment
    total_steps: int = setting(minimum=1, maximum=_MOST, may_change=True)
    """Updates of the run. A finished run continues with a larger number, unless a schedule of its learning rate has no
    `end` and falls to 0: such a schedule stays at 0 after the steps that it was made for."""
    batch_size: int = setting(128, minimum=1, maximum=_MOST)  # examples per update, over all devices and microbatches
    microbatches: int = setting(1, minimum=1)
    """Microbatches into which each batch is cut to save memory. Gradients and metrics are summed over them and divided
    once. BatchNorm normalizes each microbatch separately: in a model with it, their number changes the result."""
    seed: int = setting(0, minimum=0, maximum=2**32 - 1)
    """Seed of everything random: initial parameters, order of the data, dropout, augmentation."""
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    loading: Loading = dataclasses.field(default_factory=Loading)
    evaluation: Evaluation = dataclasses.field(default_factory=Evaluation)
    checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)
    logging: Logging = dataclasses.field(default_factory=Logging)
    parallel: Parallel = dataclasses.field(default_factory=Parallel)
    watch: Watch = dataclasses.field(default_factory=Watch)
    numerics: Numerics = dataclasses.field(default_factory=Numerics)
