"""The device loader against a per-sample pipeline: images per second with crop, flip and normalisation.

    python benchmarks/loader.py [--n 50000] [--batch-size 128] [--threads 4] [--json FILE]

Random images in CIFAR's shape (speed does not depend on what they show). The per-sample pipelines read the same table
of draws and do the same work image by image, once in NumPy (the same bits), once with PIL as it is usually written.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from unsharp.data import ImageSamples, Stream, draws
from unsharp.data.augment import AUGMENTATIONS, reference
from unsharp.data.draws import FLIP, LEFT, TOP
from unsharp.runtime import describe, is_host, pick_device, set_threads


class PerSample(Dataset):
    """One image at a time, by the plain path that gives the same bits."""

    def __init__(self, samples: ImageSamples, table: np.ndarray, n: int) -> None:
        self.images = samples.images[:n].cpu().numpy()
        self.samples, self.table = samples, table
        self.scale = {k: torch.tensor([v * 255 for v in getattr(samples, k)]) for k in ("mean", "std")}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        image = reference(self.images[i], self.table[i], augmentation=self.samples.augmentation, **self.scale)
        return image, int(self.samples.labels[i])


class WithPil(PerSample):
    """One image at a time, as it is usually written: a PIL image is padded, cropped, mirrored, then normalised."""

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        from PIL import Image, ImageOps

        image = ImageOps.expand(Image.fromarray(self.images[i]), 4, 0)
        top, left = int(self.table[i, TOP] * 9), int(self.table[i, LEFT] * 9)
        image = image.crop((left, top, left + 32, top + 32))
        if self.table[i, FLIP] < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().to(torch.float32).div_(255)
        mean, std = (self.scale[k].div(255)[:, None, None] for k in ("mean", "std"))
        return pixels.sub_(mean).div_(std), int(self.samples.labels[i])


def images_per_second(batches: Iterable[Any], n: int, device: torch.device) -> float:
    """Images per second of one pass."""
    start = time.perf_counter()
    collections.deque(batches, maxlen=0)
    if not is_host(device):
        torch.accelerator.synchronize()
    return n / (time.perf_counter() - start)


def measure(n: int, batch_size: int, device: torch.device) -> dict[str, float]:
    """Images per second: medians of five passes of the batched path and of three of each per-sample path."""
    rng = np.random.default_rng(0)
    samples = ImageSamples(
        rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8),
        rng.integers(0, 100, n),
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        augmentation=AUGMENTATIONS["crop_flip"],
        device=device,
    )
    stream = Stream(samples, np.arange(n), batch_size, seed=0)
    ours = [images_per_second(stream.epoch(epoch), n, device) for epoch in range(6)][1:]
    rates = {"batched": float(np.median(ours))}
    part, table = min(n, 8192), draws(0, 0, n)
    for name, kind in (("per_sample", PerSample), ("with_pil", WithPil)):
        images = kind(samples, table, part)

        def batches(images: PerSample = images) -> Iterable[Any]:
            return (x.to(device) for x, _ in DataLoader(images, batch_size))

        rates[name] = float(np.median([images_per_second(batches(), part, device) for _ in range(3)]))
    return rates


def main() -> None:
    """Print a markdown table and, if asked, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=50000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device")
    parser.add_argument("--json")
    args = parser.parse_args()
    device = pick_device(args.device)
    threads = set_threads(args.threads)
    result = measure(args.n, args.batch_size, device)
    about = {
        "torch": torch.__version__,
        **describe(device),
        "threads": threads,
        "date": datetime.date.today().isoformat(),
    }
    names = {
        "batched": f"device loader, batches of {args.batch_size}",
        "per_sample": "per-sample reference (NumPy) in a DataLoader",
        "with_pil": "per-sample PIL pipeline in a DataLoader",
    }
    print("| path | images per second | device loader is faster by |\n|---|---|---|")
    for key, rate in result.items():
        print(f"| {names[key]} | {rate:,.0f} | {result['batched'] / rate:.1f} |")
    print("\n" + ", ".join(f"{key} {value}" for key, value in about.items()))
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({**result, **about, "n": args.n, "batch_size": args.batch_size}, file, indent=2)


if __name__ == "__main__":
    main()
