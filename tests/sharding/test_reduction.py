"""Gradients of 16-bit computations are summed in float32, exactly; nothing else changes.

All numbers are small integers, and kernels keep them small: every product and every activation is exact in bfloat16.
Every sum over examples is exact in float32, and many are not in bfloat16, which has 8 bits.
"""

import dataclasses
import functools
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend import source_info_util
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from configs import fashion_mnist
from experiments.image_classification import ImageClassification
from tests.sharding.test_strategies import Sentences
from trainer import config
from trainer.data import ArraySource, take
from trainer.metrics import Mean
from trainer.program import build_program
from trainer.sharding.reduction import with_float32_sums

EXAMPLES, WIDTH = 1024, 4


def integers(seed: int, low: int, high: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high + 1, (EXAMPLES, WIDTH)).astype(np.float32)


INPUTS, COTANGENT = integers(0, -4, 4), integers(1, -3, 5)


def identity(key: Any, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    return jnp.eye(*shape, dtype=dtype)


def ones(key: Any, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    return jnp.ones(shape, dtype)


class Block(nn.Module):
    dtype: Any

    @nn.compact
    def __call__(self, x, _=None):
        return nn.Dense(WIDTH, dtype=self.dtype, kernel_init=identity, name="dense")(x), None


class Model(nn.Module):
    """A bias-carrying layer of each kind, by name."""

    kind: str
    dtype: Any

    @nn.compact
    def __call__(self, x):
        return getattr(self, self.kind)(jnp.asarray(x, self.dtype))

    def kernel(self, init=identity):
        return self.param("kernel", init, (WIDTH, WIDTH))

    def dense(self, x):
        return Block(self.dtype, name="block")(x)[0]

    def scan(self, x):
        block = nn.remat(Block, prevent_cse=False)
        layers = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return layers(self.dtype, name="layers")(x, None)[0]

    def shared_scan(self, x):
        layers = nn.scan(Block, variable_broadcast="params", split_rngs={"params": False}, length=3)
        return layers(self.dtype, name="layers")(x, None)[0]

    def remat(self, x):
        return nn.remat(Block)(self.dtype, name="block")(x)[0]

    def jit(self, x):
        return nn.jit(Block)(self.dtype, name="block")(x)[0]

    def cast_outside_of_jit(self, x):
        return jax.jit(jnp.matmul)(x, self.kernel().astype(self.dtype))

    def cond(self, x):
        kernel = self.kernel()
        branches = (lambda k: x @ k.astype(self.dtype), lambda k: x @ -k.astype(self.dtype))
        return jax.lax.cond(kernel.sum() > 0, *branches, kernel)

    def einsum(self, x):
        return jnp.einsum("rd,de->re", x, self.kernel().astype(self.dtype))

    def scaled(self, x):
        return x @ (self.kernel() * 2.0).astype(self.dtype)

    def used_twice(self, x):
        layer = nn.Dense(WIDTH, dtype=self.dtype, kernel_init=identity, name="dense")
        return layer(layer(x))

    def reshaped(self, x):
        x = nn.DenseGeneral((2, 2), dtype=self.dtype, kernel_init=ones, name="split")(x)
        return nn.DenseGeneral(WIDTH, (-2, -1), dtype=self.dtype, kernel_init=ones, name="join")(x)

    def embed(self, x):
        tokens = (x[:, 0] > 0).astype(jnp.int32)  # each of two thousands of times
        return nn.Embed(2, WIDTH, dtype=self.dtype, embedding_init=ones, name="embed")(tokens)

    def conv(self, x):
        return nn.Conv(WIDTH, (3,), dtype=self.dtype, kernel_init=ones, name="conv")(x[:, :, None])[:, 0]


KINDS = ["dense", "scan", "shared_scan", "remat", "jit", "cast_outside_of_jit", "cond", "einsum", "scaled"]
KINDS += ["used_twice", "reshaped", "embed", "conv"]


def loss(params: Any, x: Any, cotangent: Any, kind: str, dtype: Any) -> jax.Array:
    result: Any = Model(kind, dtype).apply(params, x)
    return jnp.sum(result.astype(jnp.float32) * cotangent)


def gradient(kind: str, dtype: Any, wrap=lambda gradient: gradient) -> list[np.ndarray]:
    """The gradient of `jax.jit`, with examples sharded over eight devices."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharded, replicated = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    params = Model(kind, jnp.float32).init(jax.random.key(0), INPUTS)
    function = wrap(jax.grad(functools.partial(loss, kind=kind, dtype=dtype)))
    compiled = jax.jit(function, in_shardings=(replicated, sharded, sharded), out_shardings=replicated)
    return jax.tree.leaves(jax.device_get(compiled(params, INPUTS, COTANGENT)))


@pytest.mark.parametrize("kind", KINDS)
def test_sums_over_rows_and_devices_are_exact(kind):
    exact = gradient(kind, jnp.float32)
    for found, expected in zip(gradient(kind, jnp.bfloat16, with_float32_sums), exact, strict=True):
        np.testing.assert_array_equal(found, expected)
    rounded = gradient(kind, jnp.bfloat16)  # what JAX does
    assert max(np.abs(a - b).max() for a, b in zip(rounded, exact, strict=True)) >= 1


def test_gradients_of_a_dense_layer_are_those_of_integers():
    kernel, bias = INPUTS.astype(np.int64).T @ COTANGENT.astype(np.int64), COTANGENT.astype(np.int64).sum(0)
    found = gradient("dense", jnp.bfloat16, with_float32_sums)
    assert sorted(array.tolist() for array in found if array.ndim == 1) == [bias.tolist()]
    assert [array.tolist() for array in found if array.ndim == 2] == [kernel.tolist()]
    assert np.abs(bias).max() > 256  # more than 8 bits hold


class Residual(nn.Module):
    """Dense layers in bfloat16 between norms in float32, on a stream of bfloat16."""

    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, dtype=self.dtype, name="first")(x)
        for i in range(2):
            y = nn.LayerNorm(dtype=self.dtype, name=f"norm_{i}")(x)
            x = x + nn.Dense(8, dtype=self.dtype, name=f"dense_{i}")(nn.gelu(y))
        return nn.Dense(3, name="head")(x.astype(jnp.float32))


def program(model: nn.Module, wrap=lambda gradient: gradient) -> tuple[Any, Any]:
    x = jax.random.normal(jax.random.key(1), (64, 4))
    params = model.init(jax.random.key(0), x)
    apply: Any = model.apply
    both = wrap(jax.value_and_grad(lambda params: jnp.sum(apply(params, x) ** 2)))
    return jax.make_jaxpr(both)(params), jax.device_get(jax.jit(both)(params))


def test_what_was_not_cast_keeps_its_bits_and_no_work_is_added():
    before, (value, gradients) = program(Residual())
    after, (found_value, found) = program(Residual(), with_float32_sums)
    assert found_value == value
    for name in ("norm_0", "norm_1", "head"):
        jax.tree.map(np.testing.assert_array_equal, found["params"][name], gradients["params"][name])
    for name in ("first", "dense_0", "dense_1"):
        assert (found["params"][name]["kernel"] != gradients["params"][name]["kernel"]).any()

    def products(program: Any) -> int:  # each that is rewritten is there for CPUs and for all else
        text = str(program)
        return len(re.findall(r"= dot_general\[", text)) - len(re.findall(r"= platform_index\[", text))

    assert products(after) == products(before)


def test_the_program_of_a_float32_model_does_not_change():
    def text(jaxpr: Any) -> str:
        return jaxpr.pretty_print(source_info=True, name_stack=True)

    assert text(program(Residual(jnp.float32), with_float32_sums)[0]) == text(program(Residual(jnp.float32))[0])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_function_is_traced_once(dtype):
    calls = []

    def gradient(x):
        calls.append(x)
        return (x.astype(dtype) @ x.T.astype(dtype)).astype(jnp.float32)

    jax.make_jaxpr(with_float32_sums(gradient))(jnp.ones((2, 3)))
    assert len(calls) == 1


def test_operations_keep_the_line_and_the_context_in_which_they_were_traced():
    def loss(kernel, x):
        with set_xla_metadata(mark="here"):
            y = x @ kernel.astype(jnp.bfloat16)
        return jnp.sum(y.astype(jnp.float32) ** 2)

    arguments = jnp.ones((4, 4)), jnp.ones((8, 4), jnp.bfloat16)
    before, after = jax.grad(loss), with_float32_sums(jax.grad(loss))

    def lines(gradient: Any) -> set[str]:
        return {
            source_info_util.summarize(equation.source_info) for equation in jax.make_jaxpr(gradient)(*arguments).eqns
        }

    assert lines(after) == lines(before)

    def marked(gradient: Any) -> int:
        return jax.jit(gradient).lower(*arguments).as_text().count('mark = "here"')

    assert marked(after) >= marked(before) > 0


class Images(ImageClassification):
    """Noise in the place of Fashion-MNIST."""

    def source(self, split: str) -> ArraySource:
        rng = np.random.default_rng(len(split))
        image = rng.integers(0, 256, (256, 28, 28, 1)).astype(np.uint8)
        return ArraySource({"image": image, "label": rng.integers(0, 10, 256).astype(np.int32)})


def decoder(**settings: Any) -> config.Run:
    experiment = Sentences(length=8, width=16, layers=1, heads=2, mlp_width=32, dtype="bfloat16", **settings)
    return config.Run(experiment, total_steps=10, batch_size=16)


def classifier() -> config.Run:
    run = fashion_mnist.get_config()
    return dataclasses.replace(run, experiment=Images(**vars(run.experiment)))


@pytest.mark.parametrize(
    ("run", "strategy"),
    [
        pytest.param(classifier(), "data", id="cnn-data"),
        pytest.param(decoder(), "data", id="decoder-data"),
        *[
            pytest.param(decoder(scan=scan), strategy, id=f"decoder-{strategy}-{scan=}", marks=pytest.mark.exhaustive)
            for strategy, scan in (("fsdp", False), ("pmap", False), ("data", True))
        ],
    ],
)
def test_no_operation_of_a_step_loses_the_name_of_its_module(run, strategy):
    """With "bfloat16" the step has the gradient of `jax.grad`."""

    def names(reduce_dtype: str) -> tuple[set[str], set[str]]:
        """The modules that operations of the compiled step name, and the names of its gradient that name none."""
        parallel = config.Parallel(strategy, devices=8 if strategy == "fsdp" else 1, reduce_dtype=reduce_dtype)
        program = build_program(config.resolve(dataclasses.replace(run, parallel=parallel)))
        step: Any = program.train_step
        compiled = step.lower(program.state, program.strategy.abstract_batch(program.train_spec)).compile()
        # Sets: XLA repeats an operation wherever it is read, as often as it likes. A name that ends in "jit(…)" is that
        # of a call, which XLA gives to constants of its own.
        found = set(re.findall(r'op_name="(jit\([^"]*[^)"])"', compiled.as_text()))
        modules = {name for param in program.param_table.rows for name in param.path.split("/")[:-1]}
        words = {name: modules.intersection(re.split(r"[/()]", name)) for name in found}
        return set().union(*words.values()), {name for name, own in words.items() if "jvp(" in name and not own}

    (modules, unnamed), (modules_of_jax, unnamed_by_jax) = names("float32"), names("bfloat16")
    assert modules == modules_of_jax != set()
    # The gradient of the embedding is outside of any module. It gets another cast.
    embedding = re.compile(r".*/transpose\(jvp\(Transformer\)\)/(rlv,rlw->vw/.*|convert_element_type)")
    assert not [name for name in unnamed - unnamed_by_jax if not embedding.fullmatch(name)]


@dataclasses.dataclass
class Task:
    """`Model` as an experiment; the metric's weight is 1, so that gradients are sums."""

    kind: str = "dense"
    param_dtype: str = "float32"

    def init(self, key, batch):
        params = Model(self.kind, jnp.float32).init(key, batch["x"])
        return jax.tree.map(lambda p: p.astype(self.param_dtype), params)

    def loss(self, variables, batch, *, key, train):
        total = loss(variables, batch["x"], batch["cotangent"], self.kind, jnp.bfloat16)
        weight = batch["mask"][0] * jnp.where(batch["first"][0], 1.0, 0.0)
        return {"loss": Mean(total, weight)}, {}

    def source(self, split):
        return ArraySource({"x": INPUTS, "cotangent": COTANGENT, "first": np.arange(EXAMPLES) == 0})


def norm_of_gradient(strategy: str, reduce_dtype: str = "float32", **settings: Any) -> float:
    run = config.Run(
        Task(**settings),
        total_steps=1,
        batch_size=EXAMPLES,
        optimizer=config.Optimizer(name="sgd"),
        parallel=config.Parallel(strategy, reduce_dtype=reduce_dtype, min_shard_size=0),
    )
    program = build_program(config.resolve(run))
    batch = take(program.train_source, np.arange(EXAMPLES)) | {"mask": np.ones(EXAMPLES, np.float32)}
    _, metrics = program.train_step(program.init(), program.strategy.shard_batch(batch))
    return float(metrics["grad_norm"].total)


EXACT = np.sqrt(sum(np.sum(np.square(x)) for x in (INPUTS.T @ COTANGENT, COTANGENT.sum(0, dtype=np.float64))))


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("strategy", ["data", "fsdp", "pmap"])
def test_a_step_sums_in_float32_whatever_the_strategy_and_the_dtype_of_parameters(strategy, param_dtype):
    assert norm_of_gradient(strategy, param_dtype=param_dtype) == pytest.approx(EXACT, rel=1e-7)


@pytest.mark.parametrize("strategy", ["data", "pmap"])
def test_a_step_sums_in_bfloat16_where_that_is_asked_for(strategy):
    error = abs(norm_of_gradient(strategy, "bfloat16") / EXACT - 1)
    assert 1e-5 < error < 2**-7


def test_kernels_of_pallas_and_bodies_of_shard_map_stay_as_they_are():
    def double(x):
        def kernel(read, write):
            write[...] = 2 * read[pl.program_id(0)]

        shape = jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
        return pl.pallas_call(kernel, out_shape=shape, grid=(1,), interpret=True)(x)

    def loss(kernel):
        specs = {"in_specs": PartitionSpec(None, "data"), "out_specs": PartitionSpec("data"), "check_vma": False}
        scale = jax.shard_map(double, **specs)(jnp.asarray(COTANGENT, jnp.bfloat16)[None])
        return jnp.sum((jnp.asarray(INPUTS, jnp.bfloat16) @ kernel.astype(jnp.bfloat16)) * scale)

    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        found = jax.jit(with_float32_sums(jax.grad(loss)))(jnp.eye(WIDTH))
    np.testing.assert_array_equal(found, INPUTS.T @ (2 * COTANGENT))
