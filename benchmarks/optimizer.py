"""Time and memory traffic of an update: AdaBelief here, Optax's AdaBelief and Adam, and moving the memory alone.

    python -m benchmarks.optimizer                      # both trees, about 4 minutes
    python -m benchmarks.optimizer --tree=resnet50 --rounds=40
    python -m benchmarks.optimizer --tpu=v5e:2x2        # compiled for a TPU that is not there; needs the extra `tpu`

One compiled function makes the update and applies it to the parameters, with all arguments donated. All candidates are
measured in turn, in rounds, in one process; ratios are medians of the rounds' ratios. Bytes per parameter are the reads
and writes of XLA's fusions by its own cost analysis, temporary bytes its allocations beside arguments and results.

The memory pass reads four arrays and writes three, as an update must: p ← p + g, mu ← mu + g, nu ← nu + g, a fusion
each, since XLA:CPU writes one array a fusion. The lean pass reads the gradient for the parameters only.
"""

import argparse
import dataclasses
import math
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import header
from trainer import config
from trainer.optim import build_groups, build_optimizer, build_schedules, build_statistics
from trainer.optim.adabelief import adabelief
from trainer.plan.topology import make_topology

OURS = "adabelief"
LOGGED_EVERY = 50


def resnet50() -> dict[str, tuple[int, ...]]:
    """The shapes of ResNet-50: 161 leaves, 25.6 million parameters."""
    shapes: dict[str, tuple[int, ...]] = {}

    def layer(name: str, *kernel: int) -> None:
        shapes[f"{name}/kernel"] = kernel
        shapes[f"{name}/scale"] = shapes[f"{name}/bias"] = (kernel[-1],)

    layer("stem", 7, 7, 3, 64)
    width_in = 64
    for stage, (width, blocks) in enumerate([(64, 3), (128, 4), (256, 6), (512, 3)]):
        for block in range(blocks):
            name = f"stage_{stage}/block_{block}"
            layer(f"{name}/reduce", 1, 1, width_in, width)
            layer(f"{name}/conv", 3, 3, width, width)
            layer(f"{name}/expand", 1, 1, width, 4 * width)
            if block == 0:
                layer(f"{name}/shortcut", 1, 1, width_in, 4 * width)
            width_in = 4 * width
    shapes["head/kernel"], shapes["head/bias"] = (2048, 1000), (1000,)
    return shapes


def transformer() -> dict[str, tuple[int, ...]]:
    """The shapes of a decoder of 12 layers, 768 wide: 148 leaves, 98 million parameters."""
    shapes: dict[str, tuple[int, ...]] = {"embed": (16384, 768), "position": (1024, 768)}
    for i in range(12):
        for name in ("norm_1", "norm_2"):
            shapes[f"layer_{i}/{name}/scale"] = shapes[f"layer_{i}/{name}/bias"] = (768,)
        for name, rows, columns in (("qkv", 768, 2304), ("out", 768, 768), ("up", 768, 3072), ("down", 3072, 768)):
            shapes[f"layer_{i}/{name}/kernel"], shapes[f"layer_{i}/{name}/bias"] = (rows, columns), (columns,)
    shapes["norm/scale"] = shapes["norm/bias"] = (768,)
    return shapes


TREES = {"resnet50": resnet50, "transformer": transformer}


@dataclasses.dataclass
class Case:
    """A candidate to measure.

    Attributes:
      step: (parameters, state, gradients) → (parameters, state).
      init: the state of parameters.
    """

    step: Callable[[Any, Any, Any], tuple[Any, Any]]
    init: Callable[[Any], Any]


def of(transform: optax.GradientTransformation) -> Case:
    """Update and application."""

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = transform.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return Case(step, transform.init)


def labelled(shapes: dict[str, tuple[int, ...]], *, clip: bool, measured: bool) -> Case:
    """AdaBelief with every feature of parameter groups: decay, schedules of decay and of learning rates, multipliers,
    an update every other step, clipping by group, statistics in every fiftieth step."""
    clip_norm = 10.0 if clip else None
    settings = {
        "embedding": config.Group(lr_multiplier=0.1, clip_norm=clip_norm),
        "kernel": config.Group(weight_decay=0.1, clip_norm=clip_norm),
        "scale": config.Group(decay_schedule=config.Schedule("linear", peak=0.1), every_steps=2),
        "bias": config.Group(schedule=config.Schedule("cosine", peak=2e-3, warmup=10)),
    }
    labels = {path: path.split("/")[-1] if "/" in path else "embedding" for path in shapes}
    settings = {label: group for label, group in settings.items() if label in labels.values()}
    optimizer = config.Optimizer(schedule=config.Schedule("cosine", peak=1e-3, warmup=100), groups=settings)
    no_experiment: Any = None
    run = config.Run(no_experiment, total_steps=1000, batch_size=1, optimizer=optimizer)
    groups = build_groups(optimizer, build_schedules(run, examples=1000))
    transform = build_optimizer(optimizer, groups, labels, seed=0)
    if not measured:
        return of(transform)
    numbers = build_statistics(groups, labels, clip_norm=None)

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, after = transform.update(grads, state[0], params)
        inner: Any = after
        params = optax.apply_updates(params, updates)
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(numbers, grads, params, inner))
        due = inner.count % LOGGED_EVERY == 0
        return params, (inner, jax.lax.cond(due, numbers, lambda *_: nothing, grads, params, inner))

    def init(params: Any) -> Any:
        state = transform.init(params)
        return state, jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(numbers, params, params, state)
        )

    return Case(step, init)


def normed(transform: optax.GradientTransformation) -> Case:
    """Update and application, and the norm of the gradient, by which every training step notices divergence."""
    plain = of(transform)

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        params, inner = plain.step(params, state[0], grads)
        return params, (inner, optax.tree.norm(grads))

    return Case(step, lambda params: (plain.init(params), jnp.zeros(())))


def memory(*, lean: bool) -> Case:
    """Reads four arrays and writes three."""

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        mu, nu = (jax.tree.map(lambda x, g: x * 0.5 if lean else x + g, moment, grads) for moment in state)
        return jax.tree.map(jnp.add, params, grads), (mu, nu)

    return Case(step, lambda params: (jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params)))


def cases(shapes: dict[str, tuple[int, ...]]) -> dict[str, Case]:
    """All candidates by name."""
    bf16 = {"mu_dtype": jnp.bfloat16, "nu_dtype": jnp.bfloat16}
    return {
        "adabelief": of(adabelief(1e-3)),
        "optax.adabelief": of(optax.adabelief(1e-3)),
        "optax.adam": of(optax.adam(1e-3)),
        "memory pass": memory(lean=False),
        "lean memory pass": memory(lean=True),
        "with grad norm": normed(adabelief(1e-3)),
        "with decay": of(adabelief(1e-3, weight_decay=0.1)),
        "with labels": labelled(shapes, clip=False, measured=False),
        "… and clipping": labelled(shapes, clip=True, measured=False),
        "… and statistics": labelled(shapes, clip=False, measured=True),
        "bfloat16 moments": of(adabelief(1e-3, **bf16)),
    }


def arrays(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, jax.Array]:
    """Random parameters or gradients."""
    rng = np.random.default_rng(seed)
    return {path: jnp.asarray(rng.standard_normal(shape, np.float32)) for path, shape in shapes.items()}


def measure(shapes: dict[str, tuple[int, ...]], rounds: int) -> None:
    """Prints times on this machine."""
    size, grads = sum(map(math.prod, shapes.values())), arrays(shapes, 1)
    running: dict[str, list[Any]] = {}
    times: dict[str, list[float]] = {}
    for name, case in cases(shapes).items():
        params = arrays(shapes, 0)
        state = case.init(params)
        compiled = jax.jit(case.step, donate_argnums=(0, 1)).lower(params, state, grads).compile()
        running[name], times[name] = [compiled, params, state], []
    for _ in range(rounds + 1):
        for name, entry in running.items():
            start = time.perf_counter()
            entry[1:] = entry[0](*entry[1:], grads)
            jax.block_until_ready(entry[1:])
            times[name].append(time.perf_counter() - start)
    print(f"{len(shapes)} leaves, {size / 1e6:.1f} M parameters, {rounds} rounds on {jax.devices()[0].device_kind}")
    print(f"{'':18} {'ms':>7} {'of adabelief':>13} {'bytes/param':>12} {'temporary':>10} {'state/param':>12}")
    for name, (compiled, _, state) in running.items():
        ratio = statistics.median(t / ours for t, ours in zip(times[name][1:], times[OURS][1:], strict=True))
        traffic = compiled.cost_analysis()["bytes accessed"] / size
        temporary = compiled.memory_analysis().temp_size_in_bytes
        kept = sum(x.nbytes for x in jax.tree.leaves(state)) / size
        ms = 1e3 * statistics.median(times[name][1:])
        print(f"{name:18} {ms:7.2f} {ratio:13.3f} {traffic:12.1f} {temporary:10,} {kept:12.2f}")
    all_on = "… and clipping"
    for base in (OURS, "with grad norm"):
        ratio = statistics.median(t / b for t, b in zip(times[all_on][1:], times[base][1:], strict=True))
        print(f"all features of labels take {ratio:.3f} of {base} (bar: 1.05)")
    for name, bar in (("optax.adabelief", 0.33), ("optax.adam", 1.05), ("memory pass", 1.20), ("lean memory pass", 0)):
        ratio = statistics.median(o / t for t, o in zip(times[name][1:], times[OURS][1:], strict=True))
        print(f"adabelief takes {ratio:.3f} of {name}" + (f" (bar: {bar})" if bar else ""))


def compile_for_tpu(shapes: dict[str, tuple[int, ...]], topology: str) -> None:
    """Prints the TPU compiler's estimates; cycles are those of fusions, without copies between memories."""
    device = make_topology(topology).devices[0]
    place = jax.sharding.SingleDeviceSharding(device)

    def abstract(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)

    params = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
    size = sum(map(math.prod, shapes.values()))
    print(f"{len(shapes)} leaves, {size / 1e6:.1f} M parameters, compiled for {device.device_kind}")
    first = None
    for name in ("optax.adabelief", "optax.adam", "adabelief", "with labels", "bfloat16 moments"):
        case = cases(shapes)[name]
        state = jax.eval_shape(case.init, params)
        step = jax.jit(case.step, donate_argnums=(0, 1))
        compiled: Any = step.lower(abstract(params), abstract(state), abstract(params)).compile()
        cycles = sum(int(n) for n in re.findall(r'"estimated_cycles":"?(\d+)', compiled.as_text()))
        first = first or cycles
        kept = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) / size
        temporary = compiled.memory_analysis().temp_size_in_bytes
        print(
            f"{name:18} {cycles:12,} cycles {cycles / first:6.3f} of optax.adabelief, {temporary:,} temporary bytes, "
            f"state {kept:.2f} bytes a parameter"
        )


def main() -> None:
    """Measures the trees of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", choices=TREES, help="only one of the trees")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tpu", metavar="TOPOLOGY", help="compile for this topology instead, such as v5e:2x2")
    options = parser.parse_args()
    if options.tpu:
        jax.config.update("jax_platforms", "cpu")
    print(header())
    for name in [options.tree] if options.tree else TREES:
        print(f"\n{name}:")
        if options.tpu:
            compile_for_tpu(TREES[name](), options.tpu)
        else:
            measure(TREES[name](), options.rounds)


if __name__ == "__main__":
    main()
