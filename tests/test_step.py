"""One update: sums with one division, microbatches, keys."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.launched import program_of
from tests.tasks import Task, make_run
from trainer import config
from trainer.data import take


def compiled(**settings):
    """The program of a run on one device, its first state and its first batch."""
    program = program_of(make_run(parallel=config.Parallel(devices=1), **settings))
    size = program.run.batch_size
    batch = take(program.train_source, np.arange(size)) | {"mask": np.ones(size, np.float32)}
    return program, program.init(), batch


def allclose(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@pytest.mark.parametrize("microbatches", [2, 4])
def test_microbatches_under_ragged_masks_equal_the_whole_batch(microbatches):
    # Without BatchNorm, whose statistics are those of a microbatch by definition.
    results = []
    for parts_of_batch in (1, microbatches):
        program, state, batch = compiled(experiment=Task(batch_norm=False, noise=1.0), microbatches=parts_of_batch)
        batch["mask"][[0, 1, 5, 9, 13]] = 0  # microbatch 1 of 4 has rows 1, 5, 9, 13: it is empty
        results.append(program.train_step(state, program.strategy.shard_batch(batch)))
    (whole, whole_metrics), (split, split_metrics) = results
    allclose(split.params, whole.params, rtol=1e-5, atol=1e-7)
    allclose(split_metrics, whole_metrics, rtol=1e-5)
    assert int(split.opt_state.count) == int(whole.opt_state.count) == int(split.step) == 1


def test_gradient_is_that_of_the_masked_mean():
    program, state, batch = compiled(experiment=Task(batch_norm=False))
    batch["mask"][4:] = 0
    variables = jax.device_get({"params": state.params})
    task = program.run.experiment
    head = {name: jnp.asarray(array[:4]) for name, array in batch.items()}

    def mean_loss(params):
        metrics, _ = task.loss({"params": params}, head, key=jax.random.key(0), train=True)
        return metrics["loss"].total / 4

    gradient = jax.tree.leaves(jax.jit(jax.grad(mean_loss))(variables["params"]))
    expected = np.sqrt(sum(np.sum(np.asarray(g, np.float64) ** 2) for g in gradient))
    _, metrics = program.train_step(state, program.strategy.shard_batch(batch))
    np.testing.assert_allclose(metrics["grad_norm"].total, expected, rtol=1e-5)
    assert float(metrics["loss"].weight) == 4


def test_a_batch_with_no_example_changes_nothing_but_the_count():
    program, state, batch = compiled(experiment=Task(batch_norm=False))
    before = jax.device_get(state.params)
    batch["mask"][:] = 0
    after, metrics = program.train_step(state, program.strategy.shard_batch(batch))
    assert float(metrics["grad_norm"].total) == 0
    # The first learning rate of the warm-up is 0, so not even decay moves anything.
    jax.tree.map(np.testing.assert_array_equal, after.params, before)
    assert int(after.step) == 1


def test_randomness_follows_from_seed_and_step_alone():
    task = Task(dropout=0.5, noise=0.5)
    losses = {}
    for seed in (0, 1):
        program, state, batch = compiled(experiment=task, seed=seed)
        main = program.main_evaluation
        some = {name: x[: main.settings.batch_size] for name, x in batch.items()}
        twice = [float(main.step(state, some)["loss"].total) for _ in range(2)]  # evaluation draws nothing
        assert twice[0] == twice[1]
        other = dataclasses.replace(state, step=jnp.asarray(5, jnp.int32))
        copies = [jax.tree.map(jnp.copy, s) for s in (state, state, other)]
        losses[seed] = [
            float(program.train_step(s, program.strategy.shard_batch(batch))[1]["loss"].total) for s in copies
        ]
        assert losses[seed][0] == losses[seed][1]
        assert losses[seed][0] != losses[seed][2]


def test_augmentation_belongs_to_the_row_and_not_to_the_microbatch():
    totals = []
    for microbatches in (1, 2, 4):
        program, state, batch = compiled(experiment=Task(batch_norm=False, noise=1.0), microbatches=microbatches)
        totals.append(float(program.train_step(state, program.strategy.shard_batch(batch))[1]["loss"].total))
    np.testing.assert_allclose(totals[1:], totals[0], rtol=1e-6)


def test_state_holds_arrays_only():
    _, state, _ = compiled()
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    assert not any(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in jax.tree.leaves(state))


def grouped(**groups: config.Group) -> config.Optimizer:
    """Kernels are `decayed`, all others `plain`."""
    optimizer = make_run().optimizer
    return dataclasses.replace(optimizer, groups=optimizer.groups | groups)


def test_frozen_parameters_keep_their_bits_and_do_not_count_in_the_norm_of_the_gradient():
    norms = {}
    for frozen in (False, True):
        optimizer = grouped(decayed=config.Group(frozen=frozen))
        program, state, batch = compiled(experiment=Task(batch_norm=False), optimizer=optimizer)
        before = jax.device_get(state.params)
        for _ in range(3):  # the first learning rate of the warm-up is 0
            state, metrics = program.train_step(state, program.strategy.shard_batch(batch))
            norms.setdefault(frozen, metrics)
        same = jax.tree.map(lambda a, b: np.asarray(a).tobytes() == b.tobytes(), state.params, before)
        assert [same[name]["kernel"] for name in ("dense", "head")] == [frozen, frozen]
        assert not same["head"]["bias"]
    assert float(norms[True]["grad_norm"].total) < 0.9 * float(norms[False]["grad_norm"].total)
    np.testing.assert_allclose(norms[True]["grad_norm"].total, norms[False]["grad_norm/plain"].total, rtol=1e-6)


def test_norms_of_the_labels_add_up_to_that_of_the_gradient():
    program, state, batch = compiled()
    _, metrics = program.train_step(state, program.strategy.shard_batch(batch))
    squares = [float(metrics[f"grad_norm/{label}"].total) ** 2 for label in ("decayed", "plain")]
    np.testing.assert_allclose(np.sqrt(sum(squares)), float(metrics["grad_norm"].total), rtol=1e-6)


def test_statistics_are_measured_in_the_steps_that_are_logged():
    program, state, batch = compiled(logging=config.Logging(every_steps=3), total_steps=5)
    weights = []
    for _ in range(5):
        state, metrics = program.train_step(state, program.strategy.shard_batch(batch))
        weights.append(float(metrics["belief/decayed"].weight))
    assert weights == [0, 0, 1, 0, 1]
