"""The settings of the optimizer: schedules, parameter groups and labels, with their ranges and units."""

import dataclasses
from typing import Any, Protocol, runtime_checkable

_SHAPES = ("constant", "linear", "cosine", "polynomial", "wsd", "step", "inverse_sqrt")
FUSED_OPTIMIZERS = ("adabelief", "adam", "sgd")  # the optimizers of this project, updated in one fused pass
MOST = 2**31 - 1  # steps are counted in int32


def setting(
    default: Any = dataclasses.MISSING,
    *,
    choices: tuple[str, ...] = (),
    prefix: str | None = None,
    may_change: bool = False,
    **bounds: float,
) -> Any:
    """A dataclass field with its default, its accepted texts, and the bounds `minimum`, `maximum`, `above` and `below`.

    The accepted texts are `choices` and those that begin with `prefix`.
    `may_change`: whether a run may be resumed with another value. If not, another value makes it another run.
    """
    metadata = {"choices": choices, "prefix": prefix, "may_change": may_change, "bounds": bounds}
    return dataclasses.field(default=default, metadata=metadata)


@runtime_checkable
class Transform(Protocol):
    """An optimizer of the user's own: a dataclass whose fields are its settings."""

    def transform(self, learning_rate: Any) -> Any:
        """The `optax.GradientTransformation` of a group; `learning_rate` is a function of the updates made before."""
        ...


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
    warmup: float = setting(0.0, minimum=0, maximum=MOST)  # time in which the value rises linearly from 0 to `peak`
    end: float | None = setting(None, minimum=0, maximum=MOST)
    """Time from the first update until a descent reaches `final`, warm-up included; None for the end of the run."""
    descent: float | None = setting(None, minimum=0, maximum=MOST)  # duration of the descent of `wsd`, up to `end`
    boundaries: tuple[float, ...] = setting(())
    """Times from the first update at which `step` multiplies by `factor`."""
    factor: float = setting(0.1, minimum=0, maximum=1)  # factor of `step`
    power: float = setting(1.0, above=0)
    """Exponent of `polynomial`: peak − final is multiplied by (share of the descent that is left) ** power."""
    run_steps: int | None = setting(None, minimum=1, maximum=MOST)
    """Length in updates of the run that the schedule is made for; None for `total_steps`. If the
    schedule depends on the length of the run, `config.resolve` writes that length here. Then a larger `total_steps`
    cannot change the values of updates already made."""


@dataclasses.dataclass
class Group:
    """The settings that the parameters of one label share.

    One fused pass updates all groups whose optimizer is in `FUSED_OPTIMIZERS`. Each other group is updated by an Optax
    transformation of its own.
    """

    weight_decay: float = setting(0.0, minimum=0)  # strength of the weight decay; see `Optimizer.decay`
    decay_schedule: Schedule | None = setting(None)  # weight decay as a schedule, instead of a number
    optimizer: str | Transform | None = setting(None, choices=FUSED_OPTIMIZERS, prefix="optax.")
    """Another optimizer for this group, as in `Optimizer.name`; None for that of the run."""
    schedule: Schedule | None = setting(None)
    """Another learning rate for this group; None for that of the run."""
    lr_multiplier: float = setting(1.0, minimum=0)  # factor of the group's learning rate
    frozen: bool = setting(False)
    """Whether the parameters never change; no gradients are computed for them, and no moments kept."""
    clip_norm: float | None = setting(None, above=0)
    """Largest norm of the group's gradient; a larger gradient is scaled down to this norm. None for no limit."""
    every_steps: int = setting(1, minimum=1, maximum=MOST)
    """Steps between updates of the group, from the first step on; the gradients between are not used."""
    mu_dtype: str | None = setting(None, choices=("float32", "bfloat16"))
    """Dtype in which the first moment is stored; None for `Optimizer.mu_dtype`."""
    nu_dtype: str | None = setting(None, choices=("float32", "bfloat16"))
    """Dtype in which the second moment is stored; None for `Optimizer.nu_dtype`."""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Arguments of `optimizer`, if the group names an Optax optimizer."""


@dataclasses.dataclass
class Optimizer:
    """The optimizer, its labels and its parameter groups."""

    name: str | Transform = setting("adabelief", choices=FUSED_OPTIMIZERS, prefix="optax.")
    """`adabelief`; for comparison `adam`, or `sgd` with momentum b1; a transformation of Optax by its name, such as
    `optax.lion` or `optax.contrib.muon`; or a dataclass with a method `transform(learning_rate)`."""
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
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Arguments of the Optax optimizer that `name` names, without learning rate and weight decay, such as {"b1": 0.95}.
    Only `adabelief`, `adam` and `sgd` use the settings from `b1` to `amsgrad`, `mu_dtype`, `nu_dtype`, `cautious` and
    `param_rounding`; `sgd` ignores `b2`, `eps`, `eps_root` and `nu_dtype`."""
