"""Every setting of a run, declared once, with its range and unit."""

import dataclasses

from trainer.config.optimizer import MOST, Optimizer, setting
from trainer.config.optimizer import Group as Group
from trainer.config.optimizer import Schedule as Schedule
from trainer.experiment import Experiment

_STRATEGIES = ("data", "zero1", "fsdp", "tensor", "zero1_tensor", "fsdp_tensor", "pmap")


@dataclasses.dataclass
class Evaluation:
    """An evaluation of the run, at regular times and at the end."""

    split: str = setting("test", may_change=True)  # the split given to the experiment's `source`
    every_steps: int | None = setting(None, minimum=1, maximum=MOST, may_change=True)
    """Updates between evaluations; None for the end only. The end is always evaluated."""
    batch_size: int | None = setting(None, minimum=1, maximum=MOST, may_change=True)
    """Examples per evaluation batch over all devices; None for the run's `batch_size`."""
    every: float | None = setting(None, above=0, maximum=MOST, may_change=True)
    """Time between evaluations in `unit`, from which `every_steps` is computed; None to give `every_steps` itself."""
    unit: str = setting("epochs", choices=("epochs", "examples", "percent"), may_change=True)
    """Unit of `every`: passes over the training split, training examples, or percent of the run."""
    max_examples: int | None = setting(None, minimum=1, maximum=MOST, may_change=True)
    """Examples to evaluate, the first of the split; None for all."""
    ema: bool = setting(True, may_change=True)  # whether EMA params are evaluated, if the run keeps any


@dataclasses.dataclass
class Checkpoint:
    """The checkpoints of the run."""

    every_steps: int = setting(1000, minimum=1, maximum=MOST, may_change=True)
    """Updates between checkpoints; the end is always saved."""
    keep_last: int = setting(2, minimum=1, may_change=True)  # number of newest checkpoints to keep
    best_metric: str | None = setting(None, may_change=True)
    """Evaluation metric, such as "test/accuracy", whose best checkpoint is kept, too; None for the newest only."""
    best_mode: str = setting("max", choices=("max", "min"), may_change=True)
    """Whether the best value is the largest or the smallest."""
    keep_every_steps: int | None = setting(None, minimum=1, maximum=MOST, may_change=True)
    """Checkpoints whose step is a multiple of it are kept for ever; None for no such checkpoints."""
    every_seconds: float | None = setting(None, above=0, may_change=True)
    """Longest time between checkpoints, besides `every_steps`; None for no limit. Several processes look at the clock
    at logged steps only."""
    continuous: bool = setting(False, may_change=True)
    """Whether a checkpoint is also begun as soon as the one before is on disk."""
    on_error: str = setting("stop", choices=("stop", "continue"), may_change=True)
    """When a save or a row of metrics cannot be written, as on a full disk: `stop` ends the run with exit code 3;
    `continue` says so and tries again at the next checkpoint. If the last state cannot be saved, the run ends with exit
    code 3 all the same."""


@dataclasses.dataclass
class Logging:
    """The metrics written during the run."""

    every_steps: int = setting(50, minimum=1, maximum=MOST, may_change=True)  # updates between rows of metrics


@dataclasses.dataclass
class Watch:
    """Time limits. When a limit `stall_*` passes, the run prints what it waits for. After any other it also ends."""

    grace_seconds: float = setting(20.0, above=0, may_change=True)
    """Seconds after SIGTERM, SIGINT or SIGHUP in which a run of one process saves its state and ends."""
    stall_factor: float = setting(20.0, above=1, may_change=True)
    """A run without a new step for this many times the median time of a step prints the stack of every thread."""
    stall_seconds: float = setting(60.0, above=0, may_change=True)
    """No stall is reported before this many seconds, however short the steps are."""
    end_seconds: float | None = setting(1800.0, above=0, may_change=True)
    """Seconds without progress after which the run ends; None for no end. A new phase of a step and each batch of an
    evaluation are progress. The last complete state is saved first, except while the run starts, restores, saves or
    waits for the devices."""
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
    """Size of the mesh axis over which `zero1` and `fsdp` shard. None: the number of devices in a slice divided by the
    size of `tensor`."""
    tensor: int | None = setting(None, minimum=1, may_change=True)
    """Size of the mesh axis over which `tensor` shards. None: all devices of a slice; under `zero1_tensor` and
    `fsdp_tensor` 2, or 1 if a slice has an odd number of devices."""
    num_slices: int | None = setting(None, minimum=1, may_change=True)
    """Number of slices; None for all. Only the data axis spans them, since the network between them is slow."""
    torus: bool = setting(True, may_change=True)
    """Whether fsdp gets a mesh axis for each dimension of the chips' torus, so that a reduce-scatter runs along one
    dimension after the other; else one ring runs over all chips. Without a torus it changes nothing."""
    rules: tuple[tuple[str, tuple[str | None, ...]], ...] = setting((), may_change=True)
    """Ordered (regex, PartitionSpec) rules over whole parameter paths, with a mesh axis or None for each dimension.
    If there are rules, they must cover every parameter. Without rules, the model's logical axes decide; without them,
    the largest dimension that is a multiple of the size of fsdp is sharded over fsdp. The moments of a parameter are
    sharded in the same way; under `zero1` and `zero1_tensor`, fsdp shards only the moments."""
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
class InitFrom:
    """The source of a run's first variables, in place of fresh ones.

    The names of arrays are the paths in the table of parameters; those of other variables begin with their collection,
    such as "batch_stats/norm/mean".
    """

    source: str = setting()
    """A workdir, or WORKDIR@STEP, where STEP is a number, latest or best; a folder in which Orbax saved params,
    variables or a `flax.training.TrainState`; a .safetensors file."""
    rename: tuple[tuple[str, str], ...] = setting(())
    """Ordered (regex, replacement) over whole names in the source; the first match renames."""
    rules: tuple[tuple[str, str], ...] = setting(())
    """Ordered (regex, rule) over whole names of this run; the first match wins. `take`: from the same name and shape;
    `fresh`: as initialised; `linear`, `cubic`, `nearest`: interpolated to the shape here; `pad`: cut off, and filled up
    with fresh numbers. Without rules, everything is taken."""
    optimizer_state: str = setting("fresh", choices=("fresh", "carried"))
    """`carried`: also the moments that fit, and the step, from which the run then goes on."""


@dataclasses.dataclass
class Run:
    """The complete description of a run."""

    experiment: Experiment
    total_steps: int = setting(minimum=1, maximum=MOST, may_change=True)
    """Updates of the run. A finished run continues with a larger number, unless a schedule of its learning rate has no
    `end` and falls to 0: such a schedule stays at 0 after the steps that it was made for."""
    batch_size: int = setting(128, minimum=1, maximum=MOST)  # examples per update, over all devices and microbatches
    microbatches: int = setting(1, minimum=1)
    """Microbatches into which each batch is cut to save memory. Gradients and metrics are summed over them and divided
    once. BatchNorm normalizes each microbatch separately: in a model with it, their number changes the result."""
    seed: int = setting(0, minimum=0, maximum=2**32 - 1)
    """Seed of everything random: initial parameters, order of the data, dropout, augmentation."""
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    loading: Loading = dataclasses.field(default_factory=Loading)
    evaluation: Evaluation = dataclasses.field(default_factory=Evaluation)
    """The main evaluation, whose metrics are named by its split, such as "test/accuracy"."""
    evaluations: dict[str, Evaluation] = dataclasses.field(default_factory=dict, metadata={"may_change": True})
    """Further evaluations by name; the metrics of `"small"` are "small/accuracy" and so on."""
    checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)
    logging: Logging = dataclasses.field(default_factory=Logging)
    parallel: Parallel = dataclasses.field(default_factory=Parallel)
    watch: Watch = dataclasses.field(default_factory=Watch)
    numerics: Numerics = dataclasses.field(default_factory=Numerics)
    init_from: InitFrom | None = setting(None)  # what the run begins from; None for fresh variables
