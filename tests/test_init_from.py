"""A run that begins from another one, from Orbax's trees and from safetensors: what becomes of each array."""

import dataclasses
import re
import shutil
from io import StringIO
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.training.train_state import TrainState as FlaxState

from tests.tasks import Task, make_run
from tests.test_hooks import BreaksAt, FailedError, bits
from trainer import config, load, train
from trainer.commands import run as command
from trainer.errors import DivergedError, UserError
from trainer.export import write_safetensors
from trainer.init_from import plan_init
from trainer.init_from.sources import open_variables
from trainer.observe.log import read_rows
from trainer.observe.progress import Progress
from trainer.program import build_program
from trainer.rules import path_of

ONE = config.Parallel(devices=1)


def leaves(tree: Any) -> dict[str, np.ndarray]:
    return {path_of(keys): np.asarray(x) for keys, x in jax.tree_util.tree_leaves_with_path(tree)}


def as_bytes(tree: Any) -> dict[str, bytes]:
    return {path: x.tobytes() for path, x in leaves(tree).items()}


def run_of(total_steps: int = 6, **settings: Any) -> config.Run:
    return make_run(total_steps, **{"parallel": ONE, "checkpoint": config.Checkpoint(every_steps=3)} | settings)


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of a finished run of 6 steps, with checkpoints of steps 3 and 6."""
    folder = tmp_path_factory.mktemp("old") / "run"
    train(run_of(), folder, verbose=False)
    return folder


def begun(run: config.Run) -> Any:
    """The first state of a run."""
    plan = plan_init(build_program(config.resolve(run)))
    assert plan is not None
    return plan.state()


def test_without_rules_every_variable_is_taken_from_the_step_that_is_named(old):
    for step in (3, 6):
        expected = load(old, step).variables
        state = begun(run_of(init_from=config.InitFrom(f"{old}@{step}"), seed=9))
        found = {"params": state.params, **state.collections}
        assert {k: x.tobytes() for k, x in leaves(found).items()} == {
            k: x.tobytes() for k, x in leaves(expected).items()
        }
        assert not any(np.any(x) for x in jax.tree.leaves(state.opt_state))
        assert int(state.step) == 0


@dataclasses.dataclass
class Wide(Task):
    """The same task with other names and a larger head."""

    classes: int = 5

    def init(self, key, batch):
        return Renamed(self.classes).init(key, batch["x"], train=False)

    def loss(self, variables, batch, *, key, train):
        mutable = ["batch_stats"] if train else []
        logits, collections = Renamed(self.classes).apply(variables, batch["x"], train=train, mutable=mutable)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        from trainer.metrics import Mean

        return {"loss": Mean.of(losses, batch["mask"])}, collections


class Renamed(nn.Module):
    classes: int

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(16, use_bias=False, name="first")(x)
        x = nn.relu(nn.BatchNorm(not train, momentum=0.9, name="norm")(x))
        return nn.Dense(self.classes, name="out")(x)


def keys_kernel(x: np.ndarray) -> np.ndarray:
    """Keys (1981), "Cubic convolution interpolation for digital image processing", with a = −1/2."""
    x = abs(x)
    near, far = ((1.5 * x - 2.5) * x) * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def resampled(before: int, after: int, kernel: Any) -> np.ndarray:
    """The weight of each old number (rows) in each new one: its distance, where fewer numbers widen the kernel."""
    scale = after / before
    at = (np.arange(after) + 0.5) / scale - 0.5
    weights = kernel((np.arange(before)[:, None] - at[None, :]) * min(scale, 1))
    return weights / weights.sum(0)


RENAME = ((r"dense/(.*)", r"first/\1"), (r"head/(.*)", r"out/\1"))


@pytest.mark.parametrize("classes", [5, 2])
@pytest.mark.parametrize("rule", ["fresh", "pad", "linear", "cubic", "nearest"])
def test_names_are_changed_and_each_leaf_is_taken_fresh_or_resized(old, rule, classes):
    rules = ((r"out/.*", rule), (".*", "take"))
    run = run_of(experiment=Wide(classes=classes), init_from=config.InitFrom(str(old), RENAME, rules))
    plan = plan_init(build_program(config.resolve(run)))
    assert plan is not None
    state, there = plan.state(), leaves(load(old).variables)
    fresh = leaves(plan.program.init().params)
    found = leaves({"params": state.params, **state.collections})
    np.testing.assert_array_equal(found["params/first/kernel"], there["params/dense/kernel"])
    for name in ("mean", "var"):
        np.testing.assert_array_equal(found[f"batch_stats/norm/{name}"], there[f"batch_stats/norm/{name}"])
    small, large = there["params/head/kernel"], found["params/out/kernel"]
    assert (small.shape, large.shape) == ((16, 3), (16, classes))
    if rule == "fresh":
        np.testing.assert_array_equal(large, fresh["out/kernel"])
    elif rule == "pad":
        np.testing.assert_array_equal(large[:, :3], small[:, :classes])
        np.testing.assert_array_equal(large[:, 3:], fresh["out/kernel"][:, 3:])
    elif rule == "nearest":
        np.testing.assert_array_equal(large, small[:, np.floor((np.arange(classes) + 0.5) * 3 / classes).astype(int)])
    else:
        kernel = {"linear": lambda x: np.maximum(1 - abs(x), 0), "cubic": keys_kernel}[rule]
        np.testing.assert_allclose(large, np.float64(small) @ resampled(3, classes, kernel), rtol=1e-5, atol=1e-6)
    text = str(plan)
    kinds = {"fresh": r"fresh, float32\[16, N\]"}.get(rule, rf"{rule} from \[16, 3\], float32\[16, N\]").replace(
        "N", str(classes)
    )
    assert re.search(rf"^out/kernel +{kinds} ", text, re.MULTILINE)
    assert re.search(r"^first/kernel +taken, float32\[8, 16\] +dense/kernel$", text, re.MULTILINE)
    assert ("not used: head/bias, head/kernel" in text) == (rule == "fresh")


def test_a_name_is_replaced_as_a_whole_by_the_first_pattern_that_matches_it(old):
    rename = (
        (r"dense/k|dense/kernel", "first/kernel"),
        (r"head/(kern|kernel|bias)", r"out/\1"),
        (r"(head|norm)/(.*)", r"\1/\2"),
    )
    run = run_of(experiment=Wide(classes=3), init_from=config.InitFrom(str(old), rename))
    plan = plan_init(build_program(config.resolve(run)))
    assert plan is not None
    taken = {row.name: row.source for row in plan.rows}
    assert taken["first/kernel"] == "dense/kernel"
    assert taken["out/kernel"] == "head/kernel"


def test_a_collection_whose_name_begins_with_step_is_kept_and_the_step_itself_is_not(tmp_path):
    tree = {"params": {"w": np.zeros(2)}, "step_stats": {"seen": np.zeros(3)}, "step": np.zeros((), np.int32)}
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save((tmp_path / "tree").absolute(), tree)
    assert set(open_variables(str(tmp_path / "tree")).leaves) == {"w", "step_stats/seen"}


def test_the_table_is_shown_once_and_a_killed_run_begins_and_resumes_the_same(old, tmp_path):
    run = run_of(
        12, init_from=config.InitFrom(str(old)), optimizer=config.Optimizer(schedule=config.Schedule(peak=1e-3))
    )
    whole = train(run, tmp_path / "whole", verbose=False)
    for step in (2, 8):  # before the first checkpoint and after it
        with pytest.raises(FailedError):
            train(run, tmp_path / "run", verbose=False, hooks=[BreaksAt(step)])
    stream = StringIO()
    assert bits(train(run, tmp_path / "run", progress=Progress(12, stream))) == bits(whole)
    assert "begins from" not in stream.getvalue()
    first = StringIO()
    train(run, tmp_path / "again", progress=Progress(12, first))
    assert first.getvalue().count(f"begins from the parameters of {old}, step 6\n") == 1
    fresh = train(dataclasses.replace(run, init_from=None), tmp_path / "fresh", verbose=False)
    assert bits(fresh) != bits(whole)


def test_every_strategy_begins_from_the_same_numbers(old):
    expected = leaves(begun(run_of(init_from=config.InitFrom(str(old)))))
    for strategy in ("pmap", "fsdp"):
        parallel = config.Parallel(strategy, devices=4, min_shard_size=0)
        state = begun(run_of(init_from=config.InitFrom(str(old)), parallel=parallel))
        for path, x in leaves(state).items():
            np.testing.assert_array_equal(x, expected[path], err_msg=path)
        if strategy == "fsdp":
            assert not state.params["dense"]["kernel"].sharding.is_fully_replicated


def test_the_whole_state_goes_on_as_if_the_old_run_had_gone_on(old, tmp_path):
    constant = config.Optimizer(
        schedule=config.Schedule(peak=1e-2), labels=((".*", "all"),), groups={"all": config.Group()}
    )
    train(run_of(6, optimizer=constant), tmp_path / "first", verbose=False)
    longer = train(run_of(12, optimizer=constant), tmp_path / "longer", verbose=False)
    carried = config.InitFrom(str(tmp_path / "first"), optimizer_state="carried")
    state = train(run_of(12, optimizer=constant, init_from=carried), tmp_path / "new", verbose=False)
    assert bits(state) == bits(longer)
    slower = dataclasses.replace(constant, schedule=config.Schedule(peak=1e-3))
    before = {path: path.read_bytes() for path in (tmp_path / "first").rglob("*") if path.is_file()}
    state = train(run_of(12, optimizer=slower, init_from=carried), tmp_path / "slower", verbose=False)
    assert before == {path: path.read_bytes() for path in (tmp_path / "first").rglob("*") if path.is_file()}
    assert int(state.step) == 12
    rows = list(read_rows(tmp_path / "slower" / "metrics.jsonl"))
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(7, 13))
    assert rows[-1]["train/learning_rate"] == pytest.approx(1e-3)
    assert int(state.opt_state.count) == 12
    assert bits(state) != bits(longer)


@pytest.mark.parametrize("name", ["adabelief", "optax.lion"])
def test_a_carried_state_is_on_all_devices_of_the_run(old, name):
    run = run_of(12, parallel=config.Parallel(), init_from=config.InitFrom(str(old), optimizer_state="carried"))
    run.optimizer.name = name
    state, program = begun(run), build_program(config.resolve(run))
    for x, abstract in zip(jax.tree.leaves(state), jax.tree.leaves(program.state), strict=True):
        assert x.sharding == abstract.sharding


def test_ema_params_are_taken_where_a_run_keeps_them(tmp_path):
    optimizer = config.Optimizer(schedule=config.Schedule(peak=1e-2), ema_decay=0.9)
    trained = train(run_of(optimizer=optimizer), tmp_path / "ema", verbose=False)
    state = begun(run_of(init_from=config.InitFrom(str(tmp_path / "ema")), optimizer=optimizer))
    for tree in (state.params, state.ema):
        for path, x in leaves(tree).items():
            np.testing.assert_array_equal(x, leaves(trained.ema)[path], err_msg=path)


class WithStatistics(FlaxState):
    """As Flax's examples with BatchNorm have it."""

    batch_stats: Any


def saved_by_orbax(kind: str, place: Path, variables: Any) -> None:
    params = variables["params"]
    flax_state = FlaxState.create(apply_fn=lambda: None, params=params, tx=optax.adam(1e-3))
    statistics = {"batch_stats": variables["batch_stats"]}
    normalized = WithStatistics.create(apply_fn=lambda: None, params=params, tx=optax.adam(1e-3), **statistics)
    trees = {"params": params, "variables": dict(variables), "state": flax_state, "manager": flax_state}
    tree = {**trees, "normalized": normalized}[kind]
    if kind == "manager":
        with ocp.CheckpointManager(place.absolute()) as manager:
            manager.save(7, args=ocp.args.StandardSave(tree))
        return
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(place.absolute(), tree)


@pytest.mark.parametrize("kind", ["params", "variables", "state", "normalized", "manager"])
def test_trees_that_orbax_saved_are_sources(old, tmp_path, kind):
    variables = load(old).variables
    saved_by_orbax(kind, tmp_path / "tree", variables)
    is_whole = kind in ("variables", "normalized")
    rules = () if is_whole else ((r"batch_stats/.*", "fresh"), (".*", "take"))
    source = f"{tmp_path / 'tree'}@7" if kind == "manager" else str(tmp_path / "tree")
    state = begun(run_of(init_from=config.InitFrom(source, rules=rules)))
    for path, x in leaves(variables["params"]).items():
        np.testing.assert_array_equal(leaves(state.params)[path], x, err_msg=path)
    if is_whole:
        np.testing.assert_array_equal(
            state.collections["batch_stats"]["norm"]["mean"], variables["batch_stats"]["norm"]["mean"]
        )


def test_a_safetensors_file_is_a_source_also_in_bfloat16(old, tmp_path):
    trained = load(old)
    write_safetensors(trained, tmp_path / "model.safetensors")
    state = begun(run_of(init_from=config.InitFrom(str(tmp_path / "model.safetensors"))))
    assert as_bytes(state.params) == as_bytes(trained.variables["params"])
    narrow = dataclasses.replace(trained, variables=jax.tree.map(lambda x: x.astype(jnp.bfloat16), trained.variables))
    write_safetensors(narrow, tmp_path / "narrow.safetensors")
    plan = plan_init(
        build_program(config.resolve(run_of(init_from=config.InitFrom(str(tmp_path / "narrow.safetensors")))))
    )
    assert plan is not None
    assert "taken, float32[16, 3], cast from bfloat16" in str(plan)
    kernel = leaves(plan.state().params)["head/kernel"]
    np.testing.assert_array_equal(kernel, np.asarray(narrow.variables["params"]["head"]["kernel"], np.float32))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"rules": ((r"out/.*", "fresh"), (".*", "take"))}, "it has no first/kernel"),
        (
            {"rename": ((r"norm/bias", "x"), (r"dense/kernel", "norm/bias")), "rules": ((".*", "pad"),)},
            r"norm/bias is \[8, 16\] there, \[16\] here",
        ),
        ({"rename": RENAME}, r"out/kernel is \[16, 3\] there, \[16, 5\] here; give init_from.rename, or in the config"),
        ({"rename": ((r"dens/(.*)", r"first/\1"),)}, "init_from.rename 'dens/.*' matches no array"),
        ({"rename": ((r"norm/.*", "one"),)}, "init_from.rename gives norm/bias and norm/scale one name, one"),
        ({"rename": ((r"(", "one"),)}, r"init_from.rename '\(' → 'one': missing \)"),
        ({"rules": ((r"out/.*", "fresh"),)}, "no init_from rule matches"),
        ({"rules": ((r"nothing", "fresh"), (".*", "take"))}, "init_from rule 'nothing' matches no parameter"),
        ({"rules": ((".*", "tak"),)}, r"init_from.rules has 'tak'; did you mean 'take'\?"),
        ({"source": "missing"}, "init_from: there is no .*missing"),
        ({"source": "@99"}, "there is no checkpoint of step '99'; there are 3, 6"),
    ],
    ids=range(11),
)
def test_what_does_not_fit_is_one_line_and_touches_nothing(old, tmp_path, settings, text):
    source = {"@99": f"{old}@99"}.get(settings.pop("source", ""), str(old) if "source" not in settings else "")
    if text.endswith("missing"):
        source = str(old.parent / "missing")
    run = run_of(experiment=Wide(), init_from=config.InitFrom(source or str(old), **settings))
    with pytest.raises(UserError, match=text) as raised:
        train(run, tmp_path / "run", verbose=False)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_a_name_with_an_at_sign_is_a_name_if_it_is_there(old, tmp_path):
    shutil.copytree(old, copied := tmp_path / "wide@3")
    assert open_variables(str(copied)).step == 6
    assert open_variables(f"{copied}@3").step == 3
    assert open_variables(f"{old}@3").step == 3


@pytest.mark.parametrize("kind", ["text", "empty", "torn"])
def test_a_file_or_folder_that_is_no_source_is_named(old, tmp_path, kind):
    place = tmp_path / {"text": "notes.txt", "empty": "folder", "torn": "torn.safetensors"}[kind]
    place.mkdir() if kind == "empty" else place.write_bytes(b"not a header")
    with pytest.raises(UserError, match=rf"init_from: {place} (is neither|cannot be read)"):
        plan_init(build_program(config.resolve(run_of(init_from=config.InitFrom(str(place))))))


@pytest.mark.slow
def test_the_flag_begins_from_a_workdir_and_the_same_command_goes_on(old, tmp_path, capsys):
    file = tmp_path / "own.py"
    file.write_text("from tests.test_init_from import run_of\n\ndef get_config():\n    return run_of()\n")
    flags = ["train", f"--config={file}", f"--workdir={tmp_path / 'run'}", f"--init-from={old}@3"]
    assert command(flags) == 0
    shown = capsys.readouterr().out
    assert f"begins from the parameters of {old}, step 3" in shown
    assert command(flags) == 0
    assert "resumed from step 6 (finished" in capsys.readouterr().out
    for accepted in ([], ["--accept-changes"]):  # it could not be read, so nothing can be accepted
        assert command([*flags[:-1], f"--init-from={old}@6", *accepted]) == 2
        once = f"workdir {tmp_path / 'run'} has checkpoints, and a run begins from one source only"
        shown = capsys.readouterr().err
        assert f"{once}: init_from.source was '{old}@3', is '{old}@6'; " in shown
        assert f"; choose another --workdir to begin from {old}@6" in shown


def test_a_carried_state_has_the_trained_and_the_ema_params_as_they_were(tmp_path):
    optimizer = config.Optimizer(schedule=config.Schedule(peak=1e-2), ema_decay=0.9)
    train(run_of(6, optimizer=optimizer), tmp_path / "first", verbose=False)
    longer = train(run_of(12, optimizer=optimizer), tmp_path / "longer", verbose=False)
    carried = config.InitFrom(str(tmp_path / "first"), optimizer_state="carried")
    assert bits(train(run_of(12, optimizer=optimizer, init_from=carried), tmp_path / "new", verbose=False)) == bits(
        longer
    )


def test_moments_of_a_variable_that_is_fresh_are_fresh(old):
    rules = ((r"head/.*", "fresh"), (".*", "take"))
    state = begun(run_of(12, init_from=config.InitFrom(str(old), rules=rules, optimizer_state="carried")))
    mu = state.opt_state.mu
    assert not np.any(mu["head"]["kernel"])
    assert np.any(mu["dense"]["kernel"])
    assert int(state.opt_state.count) == 6


def test_moments_go_with_a_variable_that_is_renamed_and_not_with_one_that_is_resized(old):
    rules = ((r"out/.*", "pad"), (".*", "take"))
    source = config.InitFrom(str(old), RENAME, rules, optimizer_state="carried")
    state = begun(run_of(12, experiment=Wide(), init_from=source))
    trained = train(run_of(), old, verbose=False)
    np.testing.assert_array_equal(state.opt_state.mu["first"]["kernel"], trained.opt_state.mu["dense"]["kernel"])
    assert np.any(state.opt_state.mu["first"]["kernel"])
    assert not np.any(state.opt_state.mu["out"]["kernel"])


def test_the_best_checkpoint_of_a_run_is_a_source(tmp_path):
    folder = tmp_path / "run"
    kept = config.Checkpoint(every_steps=3, best_metric="test/loss", best_mode="max")  # the earlier one
    train(run_of(checkpoint=kept, evaluation=config.Evaluation(every_steps=3)), folder, verbose=False)
    for name, step in {"best": 3, "latest": 6}.items():
        state = begun(run_of(init_from=config.InitFrom(f"{folder}@{name}")))
        assert as_bytes(state.params) == as_bytes(load(folder, step).variables["params"])


@pytest.mark.parametrize(("before", "after"), [("adabelief", "optax.lion"), ("optax.lion", "adabelief")])
def test_counts_and_the_moments_of_other_labels_survive_a_change_of_the_optimizer(tmp_path, before, after):
    def optimizer(name: str) -> config.Optimizer:
        groups = {"decayed": config.Group(optimizer=name, every_steps=2), "plain": config.Group()}
        labels = ((r".*/kernel", "decayed"), (".*", "plain"))
        return config.Optimizer(schedule=config.Schedule("linear", peak=1e-2, warmup=4), labels=labels, groups=groups)

    folder = tmp_path / "run"
    trained: Any = train(run_of(6, optimizer=optimizer(before)), folder, verbose=False)
    carried = config.InitFrom(str(folder), optimizer_state="carried")
    changed = run_of(12, optimizer=optimizer(after), init_from=carried)
    changed.optimizer.schedule.run_steps = 6
    changed.optimizer.schedule.final = 1e-3
    states: list[Any] = [begun(changed)]
    beside = dataclasses.replace(changed, init_from=None)
    with pytest.raises(FailedError):
        train(beside, folder, verbose=False, accept_changes=True, hooks=[Keeps(states)])
    for state in states:
        fused: Any = state.opt_state.fused if after == "optax.lion" else state.opt_state
        mine = trained.opt_state.fused if before == "optax.lion" else trained.opt_state
        np.testing.assert_array_equal(fused.mu["head"]["bias"], mine.mu["head"]["bias"])
        assert int(fused.count) == 6
        if after == "optax.lion":
            counts = [x for k, x in leaves(state.opt_state.others).items() if k.endswith("count")]
            assert counts
            assert {int(x) for x in counts} == {3}


def groups_of(**fields: Any) -> config.Optimizer:
    """SGD by Optax whose learning rate is 1, and 0.001 from update 30 on."""
    falling = config.Schedule("step", peak=1.0, boundaries=(30,), factor=0.001, run_steps=100)
    labels, groups = ((".*", "all"),), {"all": config.Group(optimizer="optax.sgd", **fields)}
    return config.Optimizer(schedule=falling, labels=labels, groups=groups)


@pytest.mark.parametrize("way", ["carried", "accepted", "accepted with EMA"])  # the last has another state, too
@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 1)])
def test_an_interval_of_updates_that_changes_keeps_the_place_in_the_schedule(tmp_path, way, before, after):
    folder, states = tmp_path / "run", list[Any]()
    train(run_of(12, optimizer=groups_of(every_steps=before)), folder, verbose=False)
    changed = run_of(13, optimizer=groups_of(every_steps=after))
    changed.optimizer.ema_decay = 0.9 if way.endswith("EMA") else None
    if way == "carried":
        changed.init_from = config.InitFrom(str(folder), optimizer_state="carried")
        states.append(begun(changed))
    else:
        with pytest.raises(FailedError):
            train(changed, folder, verbose=False, accept_changes=True, hooks=[Keeps(states)])
    (state,) = states
    counts = {int(x) for x in jax.tree.leaves(state.opt_state.others["all"].inner) if not np.ndim(x)}
    assert counts == {12 // after}  # so that the next update is that of step 12 of the run
    assert int(state.opt_state.fused.count) == 12


def test_moments_of_another_optimizer_are_not_carried(tmp_path):
    def optimizer(name: str) -> config.Optimizer:
        groups = {"decayed": config.Group(optimizer=name), "plain": config.Group()}
        labels = ((r".*/kernel", "decayed"), (".*", "plain"))
        return config.Optimizer(schedule=config.Schedule(peak=1e-2), labels=labels, groups=groups)

    trained: Any = train(run_of(6, optimizer=optimizer("adam")), tmp_path / "run", verbose=False)
    carried = config.InitFrom(str(tmp_path / "run"), optimizer_state="carried")
    state: Any = begun(run_of(12, optimizer=optimizer("adabelief"), init_from=carried))
    assert not np.any(state.opt_state.nu["head"]["kernel"])  # of Adam: the mean of g², and not of (g − m)²
    np.testing.assert_array_equal(state.opt_state.nu["head"]["bias"], trained.opt_state.nu["head"]["bias"])
    assert int(state.opt_state.count) == 6


class Keeps:
    """Keeps the state with which a launch begins, and ends it."""

    def __init__(self, states: list[Any]) -> None:
        self.states = states

    def on_start(self, event: Any) -> None:
        self.states.append(jax.tree.map(np.asarray, event.state))
        raise FailedError


def test_a_source_at_the_end_of_the_run_leaves_nothing_to_carry_on(old, tmp_path):
    run = run_of(6, init_from=config.InitFrom(str(old), optimizer_state="carried"))
    with pytest.raises(UserError, match=r"step 6\) is already at step 6, so nothing is left of total_steps 6"):
        train(run, tmp_path / "run", verbose=False)


def test_a_source_whose_experiment_is_gone_is_a_source(old, tmp_path):
    copied = tmp_path / "copied"
    shutil.copytree(old, copied)
    text = (copied / "config.json").read_text()
    (copied / "config.json").write_text(text.replace("tests.tasks:Task", "gone:Task"))
    expected, found = (begun(run_of(init_from=config.InitFrom(str(place)))) for place in (old, copied))
    assert as_bytes(found) == as_bytes(expected)


def test_a_schedule_free_run_is_taken_at_its_average(tmp_path):
    optimizer = config.Optimizer("optax.contrib.schedule_free_adamw", config.Schedule(peak=1e-2))
    train(run_of(6, optimizer=optimizer), tmp_path / "run", verbose=False)
    state = begun(run_of(init_from=config.InitFrom(str(tmp_path / "run"))))
    for path, x in leaves(load(tmp_path / "run").variables["params"]).items():
        np.testing.assert_allclose(leaves(state.params)[path], x, rtol=1e-6, atol=1e-7, err_msg=path)


def test_a_step_that_diverges_before_the_first_checkpoint_is_made_again_from_the_source(old, tmp_path):
    exploding = Task(explode_at=3)
    run = run_of(12, experiment=exploding, init_from=config.InitFrom(str(old)))
    with pytest.raises(DivergedError, match="the loss is inf again") as raised:
        train(dataclasses.replace(run, checkpoint=config.Checkpoint(every_steps=100)), tmp_path / "run", verbose=False)
    kept = tmp_path / "run" / "diverged" / str(raised.value.step) / "state" / str(raised.value.step - 1)
    if raised.value.step == 1:
        with ocp.PyTreeCheckpointer() as checkpointer:
            saved = checkpointer.restore((kept / "state").absolute())
        expected = leaves(load(old).variables["params"])
        assert {k: x.tobytes() for k, x in leaves(saved["params"]).items()} == {
            k: x.tobytes() for k, x in expected.items()
        }
