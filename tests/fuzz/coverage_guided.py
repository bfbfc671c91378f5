"""Cases that a fuzzer finds by watching which lines they reach: `python tests/fuzz/coverage_guided.py TARGET -runs=100000`.

Needs atheris (`uv sync --group fuzz`; Linux, Python before 3.13). What stands behind TARGET goes to libFuzzer: `-runs=`,
`-max_total_time=`, `-seed=`, a folder that keeps what it found. Its cases are the long form's: `long.py --replay`
takes the file it leaves (renamed to begin with `TARGET-`).
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

import atheris

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

with atheris.instrument_imports(include=["opticnerve"]):
    from fuzz_target import attempt
    from fuzz_targets import TARGETS

    import opticnerve.data.dataset.read
    import opticnerve.models.checkpoint.delta
    import opticnerve.recipe  # noqa: F401

PARSERS = (
    "recipes",
    "data-files",
    "records",
    "folders",
    "where",
    "tools",
    "paths",
    "images",
    "sounds",
    "checkpoint-json",
    "safetensors",
)


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in PARSERS:
        raise SystemExit(f"{__doc__}\nTARGET is one of {', '.join(PARSERS)}")
    target = TARGETS[sys.argv[1]]
    folder = Path(tempfile.mkdtemp(prefix="opticnerve-fuzz-"))
    seeds = folder / "seeds"
    seeds.mkdir()
    for number in range(50):
        (seeds / str(number)).write_bytes(target.make(random.Random(number)))
    place = folder / "place"
    place.mkdir()

    def one(data: bytes) -> None:
        attempt(target, data, place)

    atheris.Setup([sys.argv[0], *sys.argv[2:], str(seeds)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
