"""Optax's optimizers and those of the user, by label: the numbers of Optax alone, under every setting of a group."""

import dataclasses
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.optim.building import build
from tests.tasks import Task, make_run
from tests.test_hooks import BreaksAt, FailedError, bits
from trainer import config, evaluate, load, take, train
from trainer.commands.arguments import make_parser, parse_flags, resolve_arguments
from trainer.errors import UserError
from trainer.metrics import Mean
from trainer.observe.log import read_rows
from trainer.optim import build_groups, build_schedules
from trainer.optim.decay_check import check_decay
from trainer.optim.named import _names, find_transform
from trainer.optim.transforms import MixedState, TransformGroup, mixed, set_count
from trainer.program import build_program
from trainer.rules import paths

LABELS = {"kernel": "decayed", "bias": "plain", "scale": "plain"}
RATE, DECAY = 0.05, 0.1
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "optax.sgd": {"momentum": 0.9, "nesterov": True},
    "optax.adamw": {"b1": 0.8},
    "optax.lion": {},
    "optax.radam": {"b2": 0.99},
    "optax.yogi": {},
    "optax.adafactor": {"min_dim_size_to_factor": 2},
    "optax.contrib.muon": {"ns_steps": 4},
    "optax.contrib.schedule_free_adamw": {"b2": 0.9},
}


def schedule() -> config.Schedule:
    return config.Schedule("linear", peak=RATE, final=0.01, warmup=2)


def rate(count: Any) -> Any:
    return optax.join_schedules([optax.linear_schedule(0, RATE, 2), optax.linear_schedule(RATE, 0.01, 8)], [2])(count)


def params() -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    shapes = {"kernel": (6, 4), "bias": (4,), "scale": (3,)}
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def gradients(steps: int = 10) -> list[dict[str, jax.Array]]:
    rng = np.random.default_rng(1)
    return [jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params()) for _ in range(steps)]


def settings(name: Any, options: dict[str, Any], **fields: Any) -> config.Optimizer:
    groups = {"decayed": config.Group(weight_decay=DECAY), "plain": config.Group()}
    defaults: dict[str, Any] = {"schedule": schedule(), "groups": groups}
    return config.Optimizer(name, options=options, **defaults | fields)


def walk(transform: Any, steps: int = 10) -> list[Any]:
    p, found = params(), []
    state, update = transform.init(p), jax.jit(transform.update)
    for grads in gradients(steps):
        updates, state = update(grads, state, p)
        p = optax.apply_updates(p, updates)
        found.append(p)
    return found


def assert_close(found: Any, expected: Any, rtol: float = 2e-6) -> None:
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=rtol, atol=2e-7, err_msg=name)


def alone(name: str, options: dict[str, Any], rate: Any, decay: Any = None) -> optax.GradientTransformation:
    """Optax's own with decoupled decay, a function of the updates made; that of a schedule-free optimizer is on z."""
    subtract = optax.inject_hyperparams(optax.add_decayed_weights)
    if "schedule_free" in name:
        base = [optax.scale_by_rms(options["b2"], 1e-8, eps_in_sqrt=False, bias_correction=True)]
        base += [subtract(decay)] if decay else []
        return optax.contrib.schedule_free(optax.chain(*base, optax.scale_by_learning_rate(rate)), rate, b1=0.9)
    module = optax.contrib if ".contrib." in name else optax
    off = {"weight_decay": 0.0} if name in ("optax.adamw", "optax.lion") else {}
    transform = getattr(module, name.rpartition(".")[2])(rate, **options, **off)
    return optax.chain(transform, subtract(lambda n: -decay(n) * rate(n))) if decay else transform


def assert_label(label: str, found: Any, expected: optax.GradientTransformation, steps: int = 10) -> None:
    own = {leaf for leaf, other in LABELS.items() if other == label}
    last = walk(optax.masked(expected, {leaf: leaf in own for leaf in LABELS}), steps)[-1]
    assert_close({leaf: found[leaf] for leaf in own}, {leaf: last[leaf] for leaf in own})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_label_goes_as_optax_alone_would_take_it_with_every_setting_of_its_group(name):
    options = OPTIMIZERS[name]
    group = config.Group(
        lr_multiplier=0.5,
        clip_norm=0.3,
        every_steps=2,
        schedule=config.Schedule("linear", peak=0.08, final=0.02),
        decay_schedule=config.Schedule("linear", peak=0.4, final=0.1),
    )
    optimizer = settings(name, options, groups={"decayed": group, "plain": config.Group(weight_decay=DECAY)})
    found = walk(build(optimizer, LABELS)[0])
    assert_label("plain", found[-1], alone(name, options, rate, lambda _: DECAY))

    def own_rate(updates: Any) -> Any:  # of the updates of the group, which are half of the run's
        return 0.5 * optax.linear_schedule(0.08, 0.02, 10)(2 * updates)

    def own_decay(updates: Any) -> Any:
        return optax.linear_schedule(0.4, 0.1, 10)(2 * updates)

    transform = optax.chain(optax.clip_by_global_norm(0.3), alone(name, options, own_rate, own_decay))
    p = {"kernel": params()["kernel"]}
    state, update = transform.init(p), jax.jit(transform.update)
    for step, grads in enumerate(gradients()):
        if step % 2 == 0:
            updates, state = update({"kernel": grads["kernel"]}, state, p)
            p = optax.apply_updates(p, updates)
        assert_close({"kernel": found[step]["kernel"]}, p)


@pytest.mark.parametrize("name", ["optax.adamw", "optax.lion", "optax.contrib.schedule_free_adamw"])
def test_the_decay_of_a_group_is_that_which_optax_has_built_in(name):
    transform = build(settings(name, {}), LABELS)[0]
    module = optax.contrib if ".contrib." in name else optax
    builtin = getattr(module, name.rpartition(".")[2])
    for label, decay in (("decayed", DECAY), ("plain", 0.0)):
        assert_label(label, walk(transform)[-1], builtin(rate, weight_decay=decay))


def test_muon_on_matrices_and_adabelief_on_the_rest_are_each_what_they_are_alone():
    groups = {
        "decayed": config.Group(optimizer="optax.contrib.muon", options={"beta": 0.9}, weight_decay=DECAY),
        "plain": config.Group(),
    }
    found = walk(build(settings("adabelief", {}, groups=groups), LABELS)[0])[-1]
    muon = walk(build(settings("optax.contrib.muon", {"beta": 0.9}), LABELS)[0])[-1]
    belief = walk(build(settings("adabelief", {}), LABELS)[0])[-1]
    assert_close(found, {"kernel": muon["kernel"], "bias": belief["bias"], "scale": belief["scale"]}, rtol=1e-6)


def test_the_norm_of_all_labels_is_clipped_and_then_that_of_a_group():
    groups = {"decayed": config.Group(optimizer="optax.sgd"), "plain": config.Group(clip_norm=0.1)}
    found = walk(build(settings("sgd", {}, b1=0.0, clip_norm=0.5, groups=groups), LABELS)[0], steps=3)
    p = jax.tree.map(np.asarray, params())
    for step, grads in enumerate(gradients(3)):
        norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in grads.values()))
        grads = {name: np.asarray(g, np.float64) * min(1, 0.5 / norm) for name, g in grads.items()}
        plain = np.sqrt(sum(np.sum(grads[name] ** 2) for name in ("bias", "scale")))
        factor = {"kernel": 1.0, "bias": min(1, 0.1 / plain), "scale": min(1, 0.1 / plain)}
        p = {name: p[name] - float(rate(step)) * factor[name] * grads[name] for name in p}
        assert_close(found[step], p)


@pytest.mark.parametrize("decay", ["decoupled", "fixed", "coupled", "corrected"])
def test_the_kinds_of_decay_are_those_of_the_fused_pass(decay):
    momentum = settings("sgd", {}, b1=0.9, decay=decay)
    found = walk(build(settings("optax.sgd", {"momentum": 0.9}, decay=decay), LABELS)[0])
    assert_close(found[-1], walk(build(momentum, LABELS)[0])[-1])


def test_a_group_that_is_updated_at_every_third_step_follows_the_schedule_of_the_run():
    groups = {"decayed": config.Group(weight_decay=DECAY, every_steps=3, lr_multiplier=0.5), "plain": config.Group()}
    other = settings("optax.sgd", {"momentum": 0.9}, groups=groups)
    found = walk(build(other, LABELS)[0])
    expected = walk(build(settings("sgd", {}, b1=0.9, groups=groups), LABELS)[0])
    for one, two in zip(found, expected, strict=True):
        assert_close(one, two)
    np.testing.assert_array_equal(found[1]["kernel"], found[2]["kernel"])


def test_a_frozen_label_keeps_every_bit_and_has_no_state():
    groups = {"decayed": config.Group(optimizer="optax.lion"), "plain": config.Group(frozen=True)}
    transform, _ = build(settings("adabelief", {}, groups=groups), LABELS)
    found = walk(transform)[-1]
    np.testing.assert_array_equal(found["bias"], params()["bias"])
    state: Any = transform.init(params())
    assert isinstance(state, MixedState)
    assert [x.shape for x in jax.tree.leaves(state.others["decayed"].inner) if x.ndim] == [(6, 4)]
    assert jax.tree.leaves((state.fused.mu, state.fused.nu)) == []


def test_sixteen_bit_parameters_are_updated_in_float32():
    transform, _ = build(settings("optax.adamw", {}), LABELS)
    narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params())
    state: Any = transform.init(narrow)
    moments = [x.dtype for x in jax.tree.leaves(state.others) if jnp.ndim(x)]
    assert set(moments) == {jnp.dtype(jnp.float32)}
    updates, _ = transform.update(jax.tree.map(lambda p: 0 * p + 1, narrow), state, narrow)
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}


def test_statistics_are_norms_of_gradients_and_of_moves():
    fields: dict[str, Any] = {"clip_norm": 0.5}
    transform, statistics = build(settings("optax.adamw", {}, **fields), LABELS)
    p, (grads, *_) = params(), gradients(1)
    updates, state = transform.update(grads, transform.init(p), p)
    found = statistics(grads, optax.apply_updates(p, updates), state)
    for label in ("decayed", "plain"):
        own = [name for name, other in LABELS.items() if other == label]

        def norm(tree: Any, own: list[str] = own) -> float:
            return float(np.sqrt(sum(np.sum(np.square(np.asarray(tree[name], np.float64))) for name in own)))

        assert found[f"grad_norm/{label}"] == pytest.approx(norm(grads), rel=1e-6)
        after = optax.apply_updates(p, updates)
        assert found[f"update_ratio/{label}"] == pytest.approx(norm(updates) / norm(after), rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_decay_check_holds_for_each(name):
    optimizer = settings(name, OPTIMIZERS[name])
    transform, _ = build(optimizer, LABELS)
    groups = build_groups(optimizer, build_schedules(make_run(10, optimizer=optimizer), examples=10))
    names = [LABELS[keys[0].key] for keys, _ in jax.tree_util.tree_leaves_with_path(params())]
    results = check_decay(params(), names, groups, transform, 10)
    move = ", beside a move that the optimizer makes without gradients" if name == "optax.yogi" else ""
    assert [str(result) for result in results] == [f"as stated{move}", f"untouched, as stated{move}"]
    assert results[0].factor == pytest.approx(1 - RATE * DECAY)


@dataclasses.dataclass
class DecaysTwice:
    """An optimizer of a user, which decays by itself."""

    def transform(self, learning_rate):
        return optax.adamw(learning_rate, weight_decay=DECAY)


def test_the_decay_check_tells_of_an_optimizer_that_decays_by_itself():
    optimizer = settings(DecaysTwice(), {})
    transform, _ = build(optimizer, LABELS)
    groups = build_groups(optimizer, build_schedules(make_run(10, optimizer=optimizer), examples=10))
    names = [LABELS[keys[0].key] for keys, _ in jax.tree_util.tree_leaves_with_path(params())]
    move = ", beside a move that the optimizer makes without gradients"
    found = [str(result) for result in check_decay(params(), names, groups, transform, 10)]
    assert found == [f"as stated{move}", f"untouched, as stated{move}"]
    lion = settings("optax.lion", {})  # whose labels say what this one does not do
    stated = build_groups(lion, build_schedules(make_run(10, optimizer=lion), examples=10))
    found = [str(result) for result in check_decay(params(), names, stated, transform, 10)]
    assert found == ["WRONG: kernel", "WRONG: bias, scale"]


# Functions of Optax with a learning rate that are no optimizers by themselves, or that cannot be one here, and why.
LEFT_OUT = {
    "optax.lbfgs": "needs the loss and a function of it",
    "optax.noisy_sgd": "needs a key",
    "optax.optimistic_adam": "is deprecated",
    "optax.scale_by_learning_rate": "is a part of an optimizer",
    "optax.scale_by_rprop": "is a part of an optimizer",
    "optax.contrib.scale_by_madgrad": "is a part of an optimizer",
    "optax.contrib.schedule_free": "needs another optimizer",
    "optax.contrib.momo": "needs the loss",
    "optax.contrib.momo_adam": "needs the loss",
    "optax.contrib.sophia": "needs a function of the loss",
    "optax.contrib.dpsgd": "needs the gradient of each example",
}


def test_every_optimizer_of_optax_that_takes_a_learning_rate_is_there():
    found = {
        f"{module.__name__}.{name}"
        for module in (optax, optax.contrib)
        for name, value in vars(module).items()
        if inspect.isfunction(value) and not name.startswith("_")
        if "learning_rate" in inspect.signature(value).parameters
    }
    assert found - set(_names()) == set(LEFT_OUT)
    assert set(_names()) <= found


def test_every_optimizer_of_the_list_keeps_the_structure_of_its_state_and_its_counters_can_be_set():
    few = {"kernel": params()["kernel"]}
    for name in _names():
        group = TransformGroup(find_transform(name, {}, lambda count: 0.01 + 0 * count, 0.01), lambda _: 0.01)
        optimizer = mixed({}, {"all": group}, {"kernel": "all"}, amsgrad=False, clip_norm=None, seed=0)
        state = first = optimizer.init(few)
        update = jax.jit(optimizer.update)
        for grads in gradients(3):
            updates, state = update({"kernel": grads["kernel"]}, state, few)
            assert np.isfinite(updates["kernel"]).all(), name
        assert jax.tree.structure(state) == jax.tree.structure(first), name
        shapes = [[(jnp.shape(x), jnp.result_type(x)) for x in jax.tree.leaves(tree)] for tree in (first, state)]
        assert shapes[0] == shapes[1], name
        counted = set_count(first, {"all": group}, jnp.asarray(3, jnp.int32))
        for a, b in zip(jax.tree.leaves(counted), jax.tree.leaves(state), strict=True):
            if jnp.issubdtype(b.dtype, jnp.integer) and not b.ndim:
                assert int(a) == int(b), name


def test_a_moment_of_a_parameter_that_is_called_count_is_no_counter():
    p = {"count": jnp.ones(()), "t": jnp.ones(3)}
    group = TransformGroup(optax.adam(0.1), lambda _: 0.1)
    optimizer = mixed({}, {"all": group}, dict.fromkeys(p, "all"), amsgrad=False, clip_norm=None, seed=0)
    _, state = optimizer.update(p, optimizer.init(p), p)
    moments = set_count(state, {"all": group}, jnp.asarray(7, jnp.int32)).others["all"].inner[0]
    assert int(moments.count) == 7
    assert moments.mu["count"] == pytest.approx(0.1)
    np.testing.assert_allclose(moments.mu["t"], np.full(3, 0.1), rtol=1e-6)


@dataclasses.dataclass
class Signs:
    """An optimizer of a user: moves by the sign of the gradient."""

    scale: float = 1.0

    def transform(self, learning_rate):
        return optax.chain(optax.scale_by_sign(), optax.scale(self.scale), optax.scale_by_learning_rate(learning_rate))


def test_a_dataclass_of_the_user_is_an_optimizer():
    found = walk(build(settings(Signs(2.0), {}), LABELS)[0], steps=4)
    expected = params()["bias"]
    for step, grads in enumerate(gradients(4)):
        expected = expected - 2 * rate(step) * jnp.sign(grads["bias"])
    np.testing.assert_allclose(found[-1]["bias"], expected, rtol=1e-6, atol=1e-7)


@dataclasses.dataclass
class FreeTwice:
    """An optimizer of a user with two averages."""

    def transform(self, learning_rate):
        return optax.chain(*[optax.contrib.schedule_free_sgd(learning_rate)] * 2)


def test_an_optimizer_with_two_averages_is_refused():
    with pytest.raises(UserError, match="with two schedule-free parts has no average to evaluate at"):
        build(settings(FreeTwice(), {}), LABELS)[0].init(params())


@dataclasses.dataclass
class Grows:
    """An optimizer of a user whose state changes in the first update."""

    change: str

    def transform(self, learning_rate):
        def update(updates, state, params=None):
            del params
            return updates, {"more": (*state, jnp.zeros(())), "less": state[1:], "kind": list(state)}[self.change]

        return optax.GradientTransformation(lambda params: (jnp.zeros(()), jnp.zeros(())), update)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("more", "a step adds opt_state/others/default/inner/2 to the state"),
        ("less", "a step returns a state without opt_state/others/default/inner/1"),
        ("kind", "a step returns a state of another structure, with the same arrays"),
    ],
)
def test_an_optimizer_whose_state_changes_is_refused_in_one_line(change, text):
    optimizer = config.Optimizer(Grows(change), config.Schedule(peak=1e-2))
    with pytest.raises(UserError, match=text):
        build_program(config.resolve(make_run(10, optimizer=optimizer)))


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("optax.lyon", {}, r"optimizer 'optax.lyon' is not known; did you mean 'optax.lion'\?"),
        ("optax.lbfgs", {}, "optimizer 'optax.lbfgs' is left out: it needs more than gradients in an update"),
        ("optax.contrib.schedule_free_sgd", {"warmup_steps": 5}, "has a setting of its own: optimizer.schedule"),
        ("optax.os.system", {}, "optimizer 'optax.os.system' is not known"),
        ("optax.lion", {"mu_dtyp": 0.5}, r"optax.lion has no option 'mu_dtyp'; did you mean 'mu_dtype'\?"),
        ("optax.adamw", {"weight_decay": 0.5}, "has a setting of its own: optimizer.groups.LABEL.weight_decay"),
        ("optax.muon", {}, r"optimizer 'optax.muon' is not known; did you mean 'optax.contrib.muon'\?"),
        ("optax.adamw", {"mask": None}, "has a setting of its own: optimizer.groups.LABEL.weight_decay"),
        ("optax.adamw", {"learning_rate": 0.5}, "has a setting of its own: optimizer.schedule"),
        ("optax.rprop", {}, "optax.rprop takes a constant learning rate only"),
        ("optax.contrib.muon", {"ns_coeffs": "fast"}, r"optax.contrib.muon does not take its options"),
    ],
    ids=str,
)
def test_a_name_or_an_option_that_optax_does_not_have_is_named(name, options, text):
    with pytest.raises(UserError, match=text):
        build(settings(name, options), LABELS)


@pytest.mark.parametrize(
    ("optimizer", "text"),
    [
        (settings("adamm", {}), r"optimizer.name is 'adamm'; did you mean 'adam'\?"),
        (settings("adam", {"b1": 0.5}), "optimizer.options is {'b1': 0.5}, but adam has settings of its own"),
        (
            settings("adam", {}, groups={"decayed": config.Group(options={"b1": 0.5}), "plain": config.Group()}),
            "optimizer.groups.decayed.options is {'b1': 0.5}, but adam has settings of its own",
        ),
        (
            settings("optax.lion", {}, groups={"decayed": config.Group(mu_dtype="bfloat16"), "plain": config.Group()}),
            "optimizer.groups.decayed has a mu_dtype, which optax.lion does not use: give it in options",
        ),
        (
            settings("optax.lion", {}, cautious=True),
            "optimizer.cautious works with adabelief, adam, sgd only, but the run uses optax.lion",
        ),
        (settings("optax.lion", {}, b1=0.5), "optimizer.b1 is 0.5, which optax.lion does not use: give it in"),
    ],
    ids=range(6),
)
def test_settings_that_an_optimizer_does_not_use_are_refused(optimizer, text):
    with pytest.raises(UserError, match=text):
        config.resolve(make_run(10, optimizer=optimizer))


def run_of(name: Any, options: dict[str, Any], parallel: config.Parallel, total_steps: int = 10) -> config.Run:
    labels = ((r".*/kernel", "decayed"), (".*", "plain"))
    optimizer = settings(name, options, labels=labels, clip_norm=1.0)
    checkpoint = config.Checkpoint(every_steps=4)
    return make_run(total_steps, optimizer=optimizer, parallel=parallel, checkpoint=checkpoint)


@dataclasses.dataclass
class Layers(Task):
    """`Task` with a matrix for each of the optimizers."""

    def init(self, key, batch):
        keys = jax.random.split(key, len(OPTIMIZERS))
        names = [name.rpartition(".")[2] for name in OPTIMIZERS]
        return {"params": {name: jax.random.normal(k, (8, 8)) / 3 for name, k in zip(names, keys, strict=True)}}

    def loss(self, variables, batch, *, key, train):
        x = batch["x"]
        for kernel in variables["params"].values():
            x = jnp.tanh(x @ kernel) + x
        losses = optax.softmax_cross_entropy_with_integer_labels(x[:, :3], batch["label"])
        return {"loss": Mean.of(losses, batch["mask"])}, {}


def each_on_a_matrix(parallel: config.Parallel) -> config.Run:
    """A run of ten steps in which every one of the optimizers updates a matrix."""
    names = {name.rpartition(".")[2]: name for name in OPTIMIZERS}
    groups = {
        label: config.Group(optimizer=name, options=OPTIMIZERS[name], weight_decay=DECAY)
        for label, name in names.items()
    }
    labels = tuple((label, label) for label in names)
    optimizer = config.Optimizer(schedule=schedule(), clip_norm=1.0, labels=labels, groups=groups)
    checkpoint = config.Checkpoint(every_steps=4)
    return make_run(10, experiment=Layers(), optimizer=optimizer, parallel=parallel, checkpoint=checkpoint)


def assert_resumes_and_shards(tmp_path: Path, run_on: Callable[[config.Parallel], config.Run]) -> Any:
    """Four devices make the steps of one, whose run resumes bit for bit; returns the state on four."""
    one, four = config.Parallel(devices=1), config.Parallel("fsdp", devices=4, min_shard_size=0)
    whole = train(run_on(one), tmp_path / "whole", verbose=False)
    with pytest.raises(FailedError):
        train(run_on(one), tmp_path / "run", verbose=False, hooks=[BreaksAt(6)])
    assert bits(train(run_on(one), tmp_path / "run", verbose=False)) == bits(whole)
    sharded = train(run_on(four), tmp_path / "sharded", verbose=False)
    for a, b in zip(jax.tree.leaves(sharded.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4)
    losses = [row["train/loss"] for row in read_rows(tmp_path / "whole" / "metrics.jsonl")]
    assert losses[-1] < losses[0]
    return sharded


@pytest.mark.slow
def test_a_run_with_all_optimizers_resumes_bit_for_bit_and_is_the_same_on_four_devices(tmp_path):
    sharded = assert_resumes_and_shards(tmp_path, each_on_a_matrix)
    for label, state in sharded.opt_state.others.items():
        arrays = [x for x in jax.tree.leaves(state.inner) if x.shape == (8, 8)]
        assert bool(arrays) == (label != "adafactor")  # which keeps sums of rows and of columns, small and replicated
        assert not any(x.sharding.is_fully_replicated for x in arrays), label


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_resumes_bit_for_bit_and_is_the_same_on_four_devices(tmp_path, name):
    sharded = assert_resumes_and_shards(tmp_path, lambda parallel: run_of(name, OPTIMIZERS[name], parallel))
    kernels = [x for x in jax.tree.leaves(sharded.opt_state) if x.shape == (8, 16)]
    assert kernels or name == "optax.adafactor"  # which keeps rows and columns
    assert not any(x.sharding.is_fully_replicated for x in kernels)


def is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def test_a_run_is_evaluated_at_the_average_of_a_schedule_free_optimizer(tmp_path):
    name = "optax.contrib.schedule_free_adamw"
    run = run_of(name, {}, config.Parallel(devices=1))
    run.optimizer.labels = ((r".*/kernel", "z"), (".*", "plain"))  # a label may have the name of a part of the state
    run.optimizer.groups = {"z": run.optimizer.groups["decayed"], "plain": run.optimizer.groups["plain"]}
    state = train(run, tmp_path / "run", verbose=False)
    expected = {}
    for free in state.opt_state.others.values():
        own = jax.tree.map(lambda z, p: z if is_masked(z) else p, free.inner.z, state.params, is_leaf=is_masked)
        averages = optax.contrib.schedule_free_eval_params(free.inner, own)
        expected |= {jax.tree_util.keystr(k): x for k, x in jax.tree_util.tree_leaves_with_path(averages)}
    trained = load(tmp_path / "run")
    found = {jax.tree_util.keystr(k): x for k, x in jax.tree_util.tree_leaves_with_path(trained.variables["params"])}
    assert found.keys() == expected.keys()
    for path, x in found.items():
        np.testing.assert_allclose(x, expected[path], rtol=1e-6, atol=1e-7)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[1])
    places = dict.fromkeys(paths(trained.variables), device)  # a function of paths of variables, and of no others
    moved = load(tmp_path / "run", sharding=lambda path, shape: places[path.removeprefix("collections/")])
    assert bits(moved.variables) == bits(trained.variables)
    batch = jax.tree.map(
        jnp.asarray, take(run.experiment.source("test"), np.arange(21)) | {"mask": np.ones(21, np.float32)}
    )
    metrics, _ = run.experiment.loss(trained.variables, batch, key=jax.random.key(0), train=False)
    assert evaluate(tmp_path / "run")["test/loss"] == pytest.approx(metrics["loss"].compute(), rel=1e-5)
    raw = {**trained.variables, "params": state.params}
    at_y, _ = run.experiment.loss(raw, batch, key=jax.random.key(0), train=False)
    assert abs(at_y["loss"].compute() / metrics["loss"].compute() - 1) > 1e-3


def test_the_workdir_alone_rebuilds_an_optimizer_of_the_user_and_its_options(tmp_path):
    run = config.resolve(make_run(3, optimizer=settings(Signs(2.0), {})))
    assert config.from_json(config.to_json(run)) == run
    run = config.resolve(make_run(3, optimizer=settings("optax.contrib.muon", {"ns_coeffs": (1.0, 2.0, 3.0)})))
    assert config.from_json(config.to_json(run)) == run


def test_flags_choose_an_optimizer_and_its_options(tmp_path):
    file = tmp_path / "own.py"
    file.write_text("from tests.tasks import make_run\n\ndef get_config():\n    return make_run(5)\n")
    flags = [
        f"--config={file}",
        "--config.optimizer.name=optax.lion",
        "--config.optimizer.options.b1=0.5",
        "--config.optimizer.options.mu_dtype=bfloat16",
        "--config.optimizer.groups.plain.optimizer=adam",
    ]
    run = resolve_arguments(*parse_flags(make_parser("train", ""), flags)).run
    assert run.optimizer.name == "optax.lion"
    assert run.optimizer.options == {"b1": 0.5, "mu_dtype": "bfloat16"}
    assert run.optimizer.groups["plain"].optimizer == "adam"
    table = str(build_program(run).param_table)
    assert "optax.lion" in table
    assert "adam " in table


def test_the_optimizers_of_the_page_train(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "optimizers.md").read_text()
    first, own = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {"__name__": "page"}
    exec(first, names)
    run = make_run(3, optimizer=names["optimizer"], parallel=config.Parallel(devices=1))
    run.optimizer.schedule.warmup = 0
    train(run, tmp_path / "muon", verbose=False)
    exec(own, names)
    found = walk(build(names["optimizer"], dict.fromkeys(LABELS, "default"))[0], steps=1)
    expected = params()["bias"] - 0.5 * 1e-3 * jnp.sign(gradients(1)[0]["bias"])
    np.testing.assert_allclose(found[0]["bias"], expected, rtol=1e-6)
