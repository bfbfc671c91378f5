"""What limits a reader of receipts: how much of the print its connector reads, and whether its answers hang on the
place where they stand.

    python benchmarks/receipts.py starter-receipts --receipts 50 --occluded 20

The receipts are of the test side: shops, layouts and fonts that are never trained on. Of the connector
(`text_spotter`): the share of characters that are found (a peak within a third of a cell of the middle, one for each)
and of those that are also named rightly, and peaks where no character is, as a share of the characters. Of the whole
model: how often the cell whose covering costs the answer most (`opticnerve look --method occlusion`) touches the
answer's box, and how often a cell chosen blindly would.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from itertools import pairwise
from typing import Any

import torch

from opticnerve import ask
from opticnerve.connectors.text_spotter import CLASSES, SUBCELLS
from opticnerve.inference.load import load_model
from opticnerve.interpret.attribution import attribute, cell_edges
from opticnerve.starter.receipts.write import receipt

_NEAR = 1 / 3  # of a cell of the map


@torch.inference_mode()
def peaks_of(model: Any, processor: Any, picture: Any) -> list[tuple[float, float, int]]:
    """x and y in pixels of the picture, and the class, of each character that the connector finds."""
    seen = processor.image_processor([picture], return_tensors="pt")
    features = model.image.connector.standardise(model.image.encode(seen["pixel_values"], seen["image_sizes"]))
    connector = model.image.connector
    ((cells_NE, grid),) = connector.maps(features)
    spotted = connector.spot(cells_NE, grid)
    y_N, x_N, logit_N = connector.peaks(spotted, connector.tokens_for(*grid))
    real_N = connector.is_character(logit_N)
    y_N, x_N = y_N[real_N], x_N[real_N]
    classes_N = connector.name(spotted, y_N, x_N).argmax(1)
    across = ((x_N + 0.5) * picture.width / (grid[1] * SUBCELLS[1])).tolist()
    down = ((y_N + 0.5) * picture.height / (grid[0] * SUBCELLS[0])).tolist()
    return list(zip(across, down, classes_N.tolist(), strict=True))


def reading(model: Any, processor: Any, count: int) -> None:
    """Print how much of the print is read, by language and by condition."""
    cell = model.image.encoder.native.patch_size
    sums: dict[str, list[int]] = defaultdict(lambda: [0] * 6)
    for number in range(count):
        paper, photo, _, about = receipt(number, "test")
        found = peaks_of(model, processor, photo.image)
        free, printed, right = set(range(len(found))), 0, 0
        hits, total = 0, True
        for word in paper.words:
            for character, box in word.characters():
                left, top, right_, bottom = photo.box(box)
                x, y, printed = (left + right_) / 2, (top + bottom) / 2, printed + 1
                near = min(free, key=lambda n: math.hypot(found[n][0] - x, found[n][1] - y), default=None)
                hit = near is not None and math.hypot(found[near][0] - x, found[near][1] - y) < _NEAR * cell
                named = hit and near is not None and found[near][2] == ord(character) % CLASSES
                if hit and near is not None:
                    free.discard(near)
                hits, right = hits + hit, right + named
                total = total and (named or word.fact != "total" or not character.isdigit())
        for key in ("all", about["locale"], about["style"]):
            sums[key] = [a + b for a, b in zip(sums[key], (printed, hits, right, len(free), total, 1), strict=True)]
    print(f"{'':14}{'found':>8}{'right':>8}{'spurious':>10}{'all digits of the total':>25}")
    for key, (printed, hits, right, spurious, totals, receipts) in sums.items():
        shares = f"{hits / printed:8.1%}{right / printed:8.1%}{spurious / printed:10.1%}{totals / receipts:25.0%}"
        print(f"{key:14}{shares}")


def places(model: Any, processor: Any, count: int, grid: int) -> None:
    """Print how often what an answer hangs on is where it stands."""
    hits, chance = 0, 0.0
    for number in range(count):
        _, photo, asked, _ = receipt(number, "test")
        with_box = [one for one in asked if one.box is not None]
        one = with_box[number % min(3, len(with_box))]
        found = attribute(model, processor, ask(one.question, photo.image), methods=["occlusion"], grid=grid, patch=1)
        drop_HH = torch.from_numpy(found.maps[-1].grid_WHH).sum(0)
        left, top, right, bottom = photo.box(one.box)  # type: ignore[arg-type]
        rows, columns = cell_edges(photo.image.height, grid), cell_edges(photo.image.width, grid)
        down_H = torch.tensor([a < bottom and b > top for a, b in pairwise(rows)])
        along_H = torch.tensor([a < right and b > left for a, b in pairwise(columns)])
        touched = down_H[:, None] & along_H
        hits += bool(touched.flatten()[drop_HH.argmax()])
        chance += float(touched.float().mean())
    print(f"the costliest cell of {grid} × {grid} touches the answer's box: {hits} of {count}; by chance {chance:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--receipts", type=int, default=50)
    parser.add_argument("--occluded", type=int, default=20)
    parser.add_argument("--grid", type=int, default=10)
    options = parser.parse_args()
    model, processor = load_model(options.model)
    reading(model, processor, options.receipts)
    if options.occluded:
        places(model, processor, options.occluded, options.grid)


if __name__ == "__main__":
    main()
