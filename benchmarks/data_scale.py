"""What it takes to begin on a data file of LLaVA's size: seconds and memory until the first batch's samples are there.

    python benchmarks/data_scale.py                    # 665,000 conversations, 1 GB of JSON on one line
    python benchmarks/data_scale.py --rows 20000       # a smaller one
    python benchmarks/data_scale.py --form jsonl       # a record a line
    python benchmarks/data_scale.py --starts 1         # the first start alone
    python benchmarks/data_scale.py --streaming --rows 200000 --form parquet   # all rows, streamed

The file is made in a temporary folder and deleted afterwards. Each start is a process of its own: the first one reads
the file, the second finds its index, and both then read the same 2,000 samples in the order of training. Memory is
counted from the moment that everything is imported: the peak of the process, and what of it is its own (anonymous),
for pages of a file that is mapped go back to the system when it wants them.

With `--streaming` one process draws every row once, in the order of training, another starts again at the last tenth
with the marks of the first. Memory is looked at after every tenth of the rows.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

TEXT = (
    "the a of picture red small round square left right behind shows there what where colour how many people dog "
    "street table holds blue looks stands window because light morning large between"
)
VISITS = 2_000
# The smallest PNG: its pixel is never looked at here.
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c4944415408d763f8ffff3f0005fe02fe"
    "dccc59e70000000049454e44ae426082"
)


def made_rows(rows: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """LLaVA records of about 1.5 kB: a picture, and three questions with their answers."""
    rng, words = random.Random(seed), TEXT.split()
    texts = [" ".join(rng.choices(words, k=60)) for _ in range(4_000)]
    for number in range(rows):
        turns: list[dict[str, str]] = []
        for turn in range(3):
            asked = " ".join(rng.choices(words, k=12)) + "?"
            turns.append({"from": "human", "value": "<image>\n" + asked if turn == 0 else asked})
            turns.append({"from": "gpt", "value": rng.choice(texts)})
        picture = rng.randrange(min(rows, 20_000))
        yield {"id": f"{number:09d}", "image": f"{picture % 50:02d}/{picture}.png", "conversations": turns}


def make(folder: Path, rows: int, form: str) -> Path:
    for picture in range(min(rows, 20_000)):
        place = folder / "media" / f"{picture % 50:02d}" / f"{picture}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(PIXEL)
    path = folder / f"conversations.{form}"
    if form == "parquet":
        return _parquet(path, rows)
    with path.open("w") as file:
        for number, row in enumerate(made_rows(rows)):
            before = "" if form == "jsonl" else "[" if number == 0 else ", "
            file.write(before + json.dumps(row) + ("\n" if form == "jsonl" else ""))
        file.write("" if form == "jsonl" else "]")
    return path


def _parquet(path: Path, rows: int, group: int = 1_000) -> Path:
    """As data sets on the hub are: compressed, 1,000 rows to a group."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    found = made_rows(rows)
    first = pa.Table.from_pylist(list(islice(found, group)))
    with pq.ParquetWriter(path, first.schema) as writer:
        writer.write_table(first)
        while more := list(islice(found, group)):
            writer.write_table(pa.Table.from_pylist(more, schema=first.schema))
    return path


def status(*names: str) -> list[float]:
    """Fields of /proc/self/status, in MiB."""
    found = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return [int(found[name].split()[0]) / 1024 for name in names]


def start(path: Path) -> dict[str, Any]:
    """One start: the units of a stage, the order of its first epoch, and the samples of its first visits."""
    from opticnerve.data.dataset.load import load_examples
    from opticnerve.recipe import DataSpec, Stage
    from opticnerve.train.sampler import StageSampler

    spec = DataSpec(path=str(path), media=str(path.parent / "media"))
    stage = Stage(name="instruct", train={"connector": 1e-3}, data=[spec], batch_size=8, steps=VISITS // 8)
    before, before_own = status("VmRSS", "RssAnon")
    started = time.perf_counter()
    units = load_examples([spec], on_error=print)
    sampler = StageSampler(units, stage, _Processor(), seed=0)
    first = [c.id for v in range(8) for c in sampler.drawn(v)]
    ready = time.perf_counter() - started
    seen = hashlib.sha256()
    started = time.perf_counter()
    for index in range(VISITS):
        for c in sampler.drawn(index):
            seen.update(repr((c.id, c.where, c.messages)).replace(str(path.parent), "").encode())
    each = (time.perf_counter() - started) / VISITS
    peak, own = status("VmHWM", "RssAnon")
    return {
        "samples": len(units), "seconds": ready, "peak_mib": peak - before, "own_mib": own - before_own,
        "visit_us": each * 1e6, "first": first, "seen": seen.hexdigest(),
    }  # fmt: skip


def stream(path: Path, rows: int, marks: Path) -> dict[str, Any]:
    """Every row drawn once; where marks lie already, the last tenth of them."""
    from opticnerve.data.dataset.load import load_streams
    from opticnerve.recipe import DataSpec, Stage
    from opticnerve.train.sampler import StreamingSampler

    spec = DataSpec(path=str(path), media=str(path.parent / "media"), streaming=True)
    stage = Stage(name="instruct", train={"connector": 1e-3}, data=[spec], batch_size=8, steps=rows // 8)
    before, before_own = status("VmRSS", "RssAnon")
    started = time.perf_counter()
    sampler = StreamingSampler(load_streams(stage, seed=0), stage, _Processor(), seed=0)
    first = 0
    if marks.exists():
        sampler.load_state_dict(json.loads(marks.read_text()))
        first = rows * 9 // 10
    sampler.drawn(first)
    ready = time.perf_counter() - started
    own, seen = [], hashlib.sha256()
    started = time.perf_counter()
    for index in range(first, rows):
        found = repr([(c.id, c.messages) for c in sampler.drawn(index)]).replace(str(path.parent), "")
        if index >= rows * 9 // 10:
            seen.update(found.encode())
        if (index + 1 - first) % ((rows - first) // 10) == 0:
            own.append(round(status("RssAnon")[0] - before_own, 1))
    each = (time.perf_counter() - started) / (rows - first)
    if not first:
        marks.write_text(json.dumps(sampler.state_dict()))
    peak = status("VmHWM")[0] - before
    return {"ready": ready, "visit_us": each * 1e6, "peak_mib": peak, "own_mib": own, "last_tenth": seen.hexdigest()}


class _Processor:
    """Nothing is tokenised here."""

    class tokenizer:
        pad_token_id = 0

    image_processor = feature_extractor = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=665_000)
    parser.add_argument("--form", choices=("json", "jsonl", "parquet"), default="json")
    parser.add_argument("--starts", type=int, choices=(1, 2), default=2)
    parser.add_argument("--streaming", action="store_true", help="read all rows as a stream, with no index")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)  # a process that starts on this file
    given = parser.parse_args()
    if given.start:
        if given.streaming:
            print(json.dumps(stream(given.start, given.rows, given.start.with_suffix(".marks"))))
        else:
            print(json.dumps(start(given.start)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = make(Path(folder), given.rows, given.form)
        time.sleep(3 if given.starts > 1 else 0)  # an index of a file that has just changed is not taken for good
        print(f"{given.rows:,} conversations, {path.stat().st_size / 1e6:,.0f} MB of {given.form}")
        environment = {**os.environ, "OPTICNERVE_CACHE": f"{folder}/cache"}
        results = []

        def told_by(*options: str) -> dict[str, Any]:
            """The figures of a process of its own."""
            command = [sys.executable, __file__, *options, "--start", str(path)]
            done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
            return found

        if given.streaming:
            for name in ("from the first row", "from the last tenth on"):
                results.append(found := told_by("--streaming", "--rows", str(given.rows)))
                print(
                    f"{name:22}  ready in {found['ready']:5.2f} s, {found['visit_us']:4.0f} µs a row; peak "
                    f"{found['peak_mib']:.0f} MiB; own MiB after each tenth "
                    f"{' '.join(f'{x:.0f}' for x in found['own_mib'])}; last tenth's rows {found['last_tenth'][:8]}"
                )
        for name in () if given.streaming else ("first start", "second start")[: given.starts]:
            results.append(found := told_by())
            print(
                f"{name:12}  {found['seconds']:7.1f} s  peak {found['peak_mib']:7.0f} MiB, own {found['own_mib']:6.0f} "
                f"MiB ({found['own_mib'] * 2**20 / given.rows:,.0f} bytes a row)  {found['visit_us']:4.0f} µs a visit  "
                f"samples {found['seen'][:8]}"
            )
        if given.json:
            given.json.write_text(json.dumps({"rows": given.rows, "form": given.form, "starts": results}, indent=1))


if __name__ == "__main__":
    main()
