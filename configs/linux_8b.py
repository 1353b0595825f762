"""A decoder of 8 B parameters on the C files of the Linux kernel, for a large pod or two.

    pip install 'belief-trainer[examples]'
    apt-get install --no-install-recommends linux-source-6.1
    python -m trainer prepare --config=configs/linux_8b.py
    python -m trainer plan --config=configs/linux_8b.py --topology=v5p:8x8x8
    python -m trainer train --config=configs/linux_8b.py --workdir=runs/linux_8b

36 layers, 4,096 wide, 7,986,253,824 parameters with a vocabulary of 32,768 tokens; 32 query heads share 8 heads of keys
and values. 512 rows of 4,096 tokens a step, one for each chip of a v5p:8x8x8, where a step takes 6.2 of 95.7 GiB
(libtpu 0.0.52, compiled with little effort). Attention is the splash kernel, one loop goes over the layers, and the
backward pass computes each again from its input.

Cost: 1.0e17 floating-point operations a step, and a third more for what is computed again; 512 TPU v5p do 2.4e17 a
second at their peak. 150 steps are about one epoch: the text is short for such a model.
Expected: not trained here; `python -m benchmarks.plan` compiles it for v5p:8x8x8 and for two slices of them.
"""

from experiments.packed_language_model import PackedLanguageModel
from trainer.config import Checkpoint, Evaluation, Group, Loading, Optimizer, Parallel, Run, Schedule


def get_config() -> Run:
    """150 steps of 512 rows, activations in bfloat16."""
    return Run(
        experiment=PackedLanguageModel(
            vocab=32_768,
            length=4096,
            width=4096,
            layers=36,
            heads=32,
            kv_heads=8,
            attention="splash",
            mlp_width=14_336,
            activation="swiglu",
            dtype="bfloat16",
            scan=True,
            remat="full",
        ),
        total_steps=150,
        batch_size=512,
        optimizer=Optimizer(
            schedule=Schedule("cosine", peak=3e-4, warmup=30),
            clip_norm=1.0,
            labels=((r".*/kernel", "decayed"), (r"embed/embedding|.*/scale", "plain")),
            groups={"decayed": Group(weight_decay=0.1), "plain": Group()},
        ),
        evaluation=Evaluation(every_steps=50),
        checkpoint=Checkpoint(every_steps=50),
        loading=Loading(in_memory_bytes=0),
        parallel=Parallel("fsdp"),
    )
