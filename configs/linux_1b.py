"""A decoder of 1 B parameters on the C files of the Linux kernel, for a pod.

    pip install 'belief-trainer[examples]'
    apt-get install --no-install-recommends linux-source-6.1
    python -m trainer prepare --config=configs/linux_1b.py
    python -m trainer plan --config=configs/linux_1b.py --topology=v5p:4x4x4
    python -m trainer train --config=configs/linux_1b.py --workdir=runs/linux_1b

18 layers, 2,048 wide, 992,028,672 parameters with a vocabulary of 32,768 tokens; 256 rows of 2,048 tokens a step: one
for each chip of a v5e:16x16, four for each of a v5p:4x4x4. One loop goes over the layers, and the backward pass
computes each again from its input.

Cost: 3.6e15 floating-point operations a step, and a third more for what is computed again; 256 TPU v5e do 5.0e16 a
second at their peak, 64 TPU v5p 2.9e16. 600 steps are about one epoch.
Expected: not trained here; `python -m benchmarks.plan` compiles it for v5e:16x16 and v5p:4x4x4.
"""

from experiments.packed_language_model import PackedLanguageModel
from trainer.config import Checkpoint, Evaluation, Group, Loading, Optimizer, Parallel, Run, Schedule


def get_config() -> Run:
    """600 steps of 256 rows, activations in bfloat16."""
    return Run(
        experiment=PackedLanguageModel(
            vocab=32_768,
            length=2048,
            width=2048,
            layers=18,
            heads=16,
            mlp_width=5632,
            activation="swiglu",
            dtype="bfloat16",
            scan=True,
            remat="full",
        ),
        total_steps=600,
        batch_size=256,
        optimizer=Optimizer(
            schedule=Schedule("cosine", peak=3e-4, warmup=60),
            clip_norm=1.0,
            labels=((r".*/kernel", "decayed"), (r"embed/embedding|.*/scale", "plain")),
            groups={"decayed": Group(weight_decay=0.1), "plain": Group()},
        ),
        evaluation=Evaluation(every_steps=100),
        checkpoint=Checkpoint(every_steps=100),
        loading=Loading(in_memory_bytes=0),
        parallel=Parallel("fsdp"),
    )
