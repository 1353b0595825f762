"""PyTorch's side of `python -m benchmarks.data --jpeg`, run by an interpreter that has torch and torchvision.

    python benchmarks/torch_jpeg.py FOLDER BATCH WORKERS SIZE

It reads names of loaders and numbers of batches from standard input, a pair a line, and prints the CPU-seconds of each.
"""

import itertools
import sys
import time
from pathlib import Path

import torch  # pyrefly: ignore[missing-import] - of another interpreter
import torchvision  # pyrefly: ignore[missing-import] - of another interpreter
from PIL import Image
from torchvision.transforms import v2  # pyrefly: ignore[missing-import] - of another interpreter


class Photographs(torch.utils.data.Dataset):
    """The files of a folder, as tensors uint8 [3, size, size] of random crops."""

    def __init__(self, folder, size, by_pillow):
        self.files = sorted(Path(folder).glob("*.jpg"))
        self.by_pillow = by_pillow
        crop = v2.RandomResizedCrop(size, antialias=True)
        self.transform = v2.Compose([crop, v2.PILToTensor()]) if by_pillow else crop

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        if self.by_pillow:  # as `torchvision.datasets.ImageFolder` reads
            with self.files[index].open("rb") as file:
                return self.transform(Image.open(file).convert("RGB")), index
        data = torchvision.io.read_file(str(self.files[index]))
        return self.transform(torchvision.io.decode_jpeg(data, mode=torchvision.io.ImageReadMode.RGB)), index


def batches(folder, batch, workers, size, by_pillow):
    """Batches without end, and the process ids of the workers."""
    loader = torch.utils.data.DataLoader(
        Photographs(folder, size, by_pillow),
        batch_size=batch,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=True,
    )
    first = iter(loader)
    pids = [worker.pid for worker in first._workers]
    return itertools.chain(first, itertools.chain.from_iterable(loader for _ in itertools.count())), pids


def main():
    """Answers each line of standard input with a line."""
    folder, batch, workers, size = sys.argv[1], *map(int, sys.argv[2:])
    loaders = {
        name: batches(folder, batch, workers, size, by_pillow)
        for name, by_pillow in (("torchvision, Pillow", True), ("torchvision, decode_jpeg", False))
    }
    pids = [pid for _, own in loaders.values() for pid in own]

    def cpu_seconds():
        return time.process_time() + sum(time.clock_gettime((~pid << 3) | 2) for pid in pids)

    def settled():
        before, after = 0.0, cpu_seconds()
        while after - before > 0.005:
            time.sleep(0.3)
            before, after = after, cpu_seconds()
        return after

    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}", flush=True)
    for line in sys.stdin:
        name, _, count = line.rpartition("\t")
        began = settled()
        for images, _ in itertools.islice(loaders[name][0], int(count)):
            assert images.shape == (batch, 3, size, size)
        print(settled() - began, flush=True)


if __name__ == "__main__":
    main()
