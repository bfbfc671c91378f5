"""Images a second through a data loader: opticnerve's input pipeline against transformers' image processors.

    python benchmarks/data.py                                   # photo-like JPEGs of three sizes, drawn here
    python benchmarks/data.py --photos DIR                      # JPEGs of your own
    python benchmarks/data.py --memory --samples 100000         # does memory stay flat?
    python benchmarks/data.py --quick

Every side has the same number of workers and makes batches of float32 `pixel_values` for a CLIP eye (bicubic, 224 px).

| side | what it is |
|---|---|
| opticnerve | `data.loader`: `open_for` and `pixels`; pixels cross as bytes and are normalised by the consumer |
| transformers | `CLIPImageProcessor` (torchvision) as collate function of a plain `DataLoader`, pictures by Pillow |
| transformers, files | the same given file names, which it decodes itself |
| transformers, PIL | `CLIPImageProcessorPil`, pictures by Pillow |
| decoding alone | opticnerve's decoding and nothing else: no pipeline on these cores that decodes so can be faster |
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import psutil
from side_by_side import Trial, alternate, finish, table

SIDES = ["opticnerve", "transformers", "transformers, files", "transformers, PIL", "decoding alone"]
# Size in pixels: how many different photos, and how many are read in a trial.
DRAWN = {(320, 240): (32, 8000), (640, 480): (32, 3200), (1920, 1080): (12, 800), (4000, 3000): (4, 160)}
QUICK = {(96, 64): (4, 32)}
QUALITY = 90


def draw(width: int, height: int, seed: int) -> PIL.Image.Image:
    """Something with a photo's statistics: 1/f noise, correlated over the channels; edges; a little sensor noise."""
    random = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1 / max(width, height)

    def clouds() -> Any:
        phases = np.exp(2j * np.pi * random.random(frequency.shape))
        field_HW = np.fft.irfft2(phases / frequency**1.1, (height, width))
        return (field_HW - field_HW.mean()) / field_HW.std()

    light_HW, warm_HW, green_HW = clouds(), clouds(), clouds()
    photo_HWC = np.stack([light_HW + 0.3 * warm_HW, light_HW + 0.3 * green_HW, light_HW - 0.3 * warm_HW], -1) * 45 + 120
    rows_H1, columns_1W = np.arange(height)[:, None], np.arange(width)[None]
    for _ in range(12):
        y, x = random.random(2) * (height, width)
        radius = (0.03 + 0.15 * random.random()) * min(width, height)
        photo_HWC[(rows_H1 - y) ** 2 + (columns_1W - x) ** 2 < radius**2] += random.normal(0, 40, 3)
    photo_HWC += random.normal(0, 2, photo_HWC.shape)
    return PIL.Image.fromarray(photo_HWC.clip(0, 255).astype(np.uint8))


# -- the sides ----------------------------------------------------------------------------------------------------


class StageSampler:
    """Batches of pixel values the way opticnerve makes them; `decode_only` leaves all but the decoding out."""

    def __init__(self, files: list[Path], samples: int, batch: int, *, decode_only: bool = False) -> None:
        self.files, self.samples, self.batch, self.decode_only = files, samples, batch, decode_only
        self.collate = self  # where `loader` looks for `compact`
        self.compact = False
        self.processor = clip()

    def __len__(self) -> int:
        return self.samples // self.batch

    def __getitem__(self, index: int) -> dict[str, Any]:
        from opticnerve.data.media.transform import open_for, pixels

        places = range(index * self.batch, (index + 1) * self.batch)
        pictures = [open_for(self.processor, self.files[p % len(self.files)]) for p in places]
        return {} if self.decode_only else pixels(self.processor, pictures, compact=self.compact)


class Files:
    """What a map-style data set of pictures usually is."""

    def __init__(self, files: list[Path], samples: int, *, opened: bool) -> None:
        self.files, self.samples, self.opened = files, samples, opened

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Any:
        file = self.files[index % len(self.files)]
        return PIL.Image.open(file).convert("RGB") if self.opened else str(file)


class Processed:
    """An image processor as a collate function."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, pictures: list[Any]) -> dict[str, Any]:
        return dict(self.processor(pictures, return_tensors="pt"))


def clip(kind: str = "CLIPImageProcessor") -> Any:
    import transformers
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    transformers.logging.set_verbosity_error()
    return CLIPImageProcessorPil() if kind == "CLIPImageProcessorPil" else transformers.CLIPImageProcessor()


def batches(side: str, files: list[Path], samples: int, batch: int, workers: int) -> Iterator[dict[str, Any]]:
    from torch.utils.data import DataLoader

    from opticnerve.data.encode.loader import TimedBatches, loader

    if side in ("opticnerve", "decoding alone"):
        sampler = StageSampler(files, samples, batch, decode_only=side == "decoding alone")
        sampler[0]  # imports what workers shall not each import again, as a training's check of its data does
        return TimedBatches(loader(sampler, 0, workers, "cpu"))
    processor = clip("CLIPImageProcessorPil" if side.endswith("PIL") else "CLIPImageProcessor")
    pictures: Any = Files(files, samples, opened=not side.endswith("files"))
    Processed(processor)([pictures[0]])
    plain: Any = DataLoader(
        pictures, batch_size=batch, num_workers=workers, collate_fn=Processed(processor), drop_last=True
    )
    return iter(plain)


# -- measuring ----------------------------------------------------------------------------------------------------


class Memory(threading.Thread):
    """Proportional resident memory of this process and its workers, looked at again and again."""

    def __init__(self, every: float) -> None:
        super().__init__(daemon=True)
        self.every, self.seen, self._over = every, [], threading.Event()

    def now(self) -> int:
        """Pages that several processes share count once."""
        total = 0
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
            try:
                total += process.memory_full_info().pss
            except psutil.NoSuchProcess:  # a worker that just ended
                continue
        return total

    def run(self) -> None:
        while not self._over.wait(self.every):
            self.seen.append(self.now())

    def stop(self) -> list[int]:
        self._over.set()
        self.join()
        return self.seen


def trial(side: str, files: list[Path], samples: int, batch: int, workers: int, every: float) -> Trial:
    memory = Memory(every)
    busy = _busy()
    source = batches(side, files, samples, batch, workers)
    first = next(source)  # workers start and import before the clock does
    memory.start()
    started, done = time.perf_counter(), 0
    for _ in source:
        done += batch
    seconds = time.perf_counter() - started
    seen = memory.stop()
    del source
    gc.collect()  # joins the workers, whose processor time then counts
    check = None
    if "pixel_values" in first:
        check = float((first["pixel_values"].mean() * 0.27 + 0.45) * 255)
    notes = {"cpu_ms": (_busy() - busy) / (done + batch) * 1e3, "memory": seen}
    return Trial(seconds, done, max(seen, default=memory.now()), check, notes)


def _busy() -> float:
    found = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(r.ru_utime + r.ru_stime for r in found)


def differences(files: list[Path]) -> str:
    """How far opticnerve's pixel values lie from each of transformers' processors."""
    import torch

    from opticnerve.data.media.transform import open_for, pixels

    ours_BCHW = pixels(clip(), [open_for(clip(), f) for f in files])["pixel_values"]
    found = []
    for name, kind in (("transformers", "CLIPImageProcessor"), ("transformers, PIL", "CLIPImageProcessorPil")):
        pictures = [PIL.Image.open(f).convert("RGB") for f in files]
        theirs_BCHW = clip(kind)(pictures, return_tensors="pt")["pixel_values"]
        off_BCHW = (ours_BCHW - theirs_BCHW).abs()
        steps_BCHW = off_BCHW * torch.tensor(clip().image_std)[:, None, None] * 255
        found.append(
            f"{name}: at most {off_BCHW.max():.3g} in normalised units, {steps_BCHW.max():.0f} of 255 steps; "
            f"{steps_BCHW.mean():.2g} steps on average"
        )
    return "Pixels against " + "; ".join(found) + "."


def report(photos: Path, samples: int, args: argparse.Namespace) -> None:
    files = _files(photos)
    with PIL.Image.open(files[0]) as one:
        size = one.size
    rest = ["--photos", str(photos), "--samples", str(samples), "--workers", str(args.workers)]
    rest += ["--batch", str(args.batch)]
    results = alternate(__file__, SIDES[:2] if args.quick else SIDES, rest, rounds=args.rounds)
    kilobytes = sum(f.stat().st_size for f in files) / len(files) / 1e3
    print(f"\n### {size[0]} × {size[1]}, {kilobytes:.0f} kB, {args.workers} workers, batches of {args.batch}\n")
    print(table(results, unit="images", against="transformers"))
    busy = {side: np.median([t.notes["cpu_ms"] for t in trials]) for side, trials in results.items()}
    print("\nProcessor time an image: " + ", ".join(f"{side} {ms:.2f} ms" for side, ms in busy.items()) + ".")
    print(differences(files[:8]), flush=True)


def flat(photos: Path, samples: int, args: argparse.Namespace) -> None:
    """Memory at each tenth of a long run."""
    made = trial("opticnerve", _files(photos), samples, args.batch, args.workers, every=2.0)
    seen = np.array(made.notes["memory"] or [made.peak_bytes])
    tenths = [f"{part.max() / 2**20:.0f}" for part in np.array_split(seen, 10) if len(part)]
    print(
        f"{made.units:,} images at {made.rate:.0f} a second; MiB in all processes, the most in each tenth of the run:"
    )
    print(", ".join(tenths))


def _files(photos: Path) -> list[Path]:
    files = sorted(f for f in photos.iterdir() if f.suffix.lower() in (".jpg", ".jpeg"))
    if not files:
        sys.exit(f"{photos} holds no .jpg files")
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="a folder of JPEGs; without it some are drawn")
    parser.add_argument("--samples", type=int, help="images in a trial, which cycle over the files")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 8))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="one long run of opticnerve's side")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        finish(trial(args.side, _files(args.photos), args.samples, args.batch, args.workers, every=2.0))
        return
    run = flat if args.memory else report
    if args.quick:
        args.rounds, args.workers, args.batch = 1, 1, 4
    if args.photos:
        run(args.photos, args.samples or 3200, args)
        return
    sizes = QUICK if args.quick else {(640, 480): DRAWN[640, 480]} if args.memory else DRAWN
    for (width, height), (count, samples) in sizes.items():
        with tempfile.TemporaryDirectory() as folder:
            for seed in range(count):
                draw(width, height, seed).save(Path(folder) / f"{seed}.jpg", quality=QUALITY)
            run(Path(folder), args.samples or samples, args)


if __name__ == "__main__":
    main()
