"""The attention kernel on TPUs: it compiles in every sharding, and its memory does not grow with the length squared."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from experiments.attention import attend
from tests.plan.models import make_run
from trainer.plan import planning
from trainer.plan.compiling import FAST, CompiledStep, compile_step
from trainer.plan.topology import make_topology

LENGTH, HEADS = 4096, 8


def temporary_bytes(name: str, topology: str, kv_heads: int, head_dim: int) -> int:
    """Bytes of the temporaries of attention and its gradients on one row of two documents, in bfloat16."""
    sharding = SingleDeviceSharding(make_topology(topology).devices[0])

    def like(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, LENGTH, *shape), dtype, sharding=sharding)

    def total(query: Any, key: Any, value: Any, segments: Any) -> Any:
        return jnp.sum(attend(name, query, key, value, segments).astype(jnp.float32) ** 2)

    arguments = like(HEADS, head_dim), like(kv_heads, head_dim), like(kv_heads, head_dim), like(dtype=jnp.int32)
    step = compile_step(jax.jit(jax.grad(total, argnums=(0, 1, 2))), arguments, 1, FAST)
    assert isinstance(step, CompiledStep)
    return step.temporary_bytes


@pytest.mark.tpu
@pytest.mark.parametrize("topology", ["v5e:1x1", "v6e:1x1"])
@pytest.mark.parametrize(("kv_heads", "head_dim"), [(2, 128), (8, 64)])
def test_the_kernel_takes_at_most_a_quarter_of_the_temporaries_of_plain_attention(topology, kv_heads, head_dim):
    splash, plain = (temporary_bytes(name, topology, kv_heads, head_dim) for name in ("splash", "plain"))
    assert 4 * splash <= plain
    assert plain >= LENGTH**2 * HEADS * 2  # the weights in bfloat16


@pytest.mark.tpu
@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "topology"), [("fsdp_tensor", "v5e:2x2"), ("pmap", "v6e:2x2")])
def test_both_steps_of_a_decoder_with_the_kernel_compile(strategy, topology):
    there = make_topology(topology)
    shapes = {"layers": 2, "length": 256, "width": 256, "heads": 4, "kv_heads": 1, "mlp_width": 256, "vocab": 256}
    run = make_run(strategy=strategy, attention="splash", scan=True, remat="full", **shapes)
    program = planning.program_for(run, there, planning.CompileChoice(torus=True))
    main = program.main_evaluation
    for step, spec in ((program.train_step, program.train_spec), (main.step, main.spec)):
        arguments = (program.state, program.strategy.abstract_batch(spec))
        compiled = compile_step(step, arguments, len(there.devices), FAST)
        assert isinstance(compiled, CompiledStep)
        text = step.lower(*arguments).as_text()
        assert "tpu_custom_call" in text
