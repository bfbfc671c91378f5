"""The order of streamed rows: windows of the shards' rows, shuffled, and the same from wherever one begins."""

from __future__ import annotations

import json
import os
import random
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from errors import refused
from opticnerve.data.dataset import streaming
from opticnerve.data.dataset.read import DataSource
from opticnerve.data.dataset.streaming import Stream, Streams
from opticnerve.data.sources.base import Streaming
from opticnerve.types import DataError

BAD = "not JSON"
# A file is made anew for each example.
SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def line(text: str) -> str:
    said = [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]
    return BAD if text.startswith("bad") else json.dumps({"messages": said})


def files(folder: Path, sizes: list[int], bad: Any = ()) -> Path:
    """Shards of so many rows each; row (shard, row) says "shard-row"."""
    for old in folder.glob("s*.jsonl"):
        old.unlink()
    for n, size in enumerate(sizes):
        rows = [line(f"{'bad' if (n, k) in bad else ''}{n}-{k}") + "\n" for k in range(size)]
        (folder / f"s{n}.jsonl").write_text("".join(rows))
    return folder / "s*.jsonl"


def opened(path: Path, *, window: int, limit: int | None = None, key: str = "0/s/0") -> Stream:
    return Stream(DataSource(path, stream=Streaming()), key=key, window=window, limit=limit)


def told(stream: Any, sampler: Any) -> list[str]:
    """What each sample's row says; of a bad one, where it stands."""
    found = []
    for index in sampler:
        try:
            conversations, count = stream.example(index)
        except DataError as e:
            found.append("bad " + Path(e.where.split(":")[0]).stem + ":" + e.where.split(":")[1])
        else:
            assert (len(conversations), count) == (1, 1)
            found.append(conversations[0].messages[0].text)
    return found


def oracle(sizes: list[int], bad: Any, window: int, limit: int | None, key: str, count: int) -> list[str]:
    """The order as the module's first lines say it, all in memory."""

    def epochs() -> Any:
        epoch = 0
        while True:
            shards = list(range(len(sizes)))
            if window > 1 and limit is None:
                random.Random(f"{key}/epoch {epoch}/shards").shuffle(shards)
            rows = [(n, k) for n in shards for k in range(sizes[n])][:limit]
            named = [f"bad s{n}:{k + 1}" if (n, k) in bad else f"{n}-{k}" for n, k in rows]
            for number in range(0, len(named), window):
                cut = named[number : number + window]
                if window > 1:
                    random.Random(f"{key}/epoch {epoch}/window {number // window}").shuffle(cut)
                yield cut
            epoch += 1

    return list(islice(chain.from_iterable(epochs()), count))


@st.composite
def shapes(draw: Any) -> tuple[list[int], set[tuple[int, int]], int, int | None]:
    sizes = draw(st.lists(st.integers(0, 7), min_size=1, max_size=4))
    sizes[draw(st.integers(0, len(sizes) - 1))] += 1
    rows = [(n, k) for n, size in enumerate(sizes) for k in range(size)]
    bad = draw(st.sets(st.sampled_from(rows), max_size=len(rows) - 1))
    limit = draw(st.one_of(st.none(), st.integers(1, sum(sizes) + 2)))
    return sizes, bad, draw(st.sampled_from([1, 2, 3, 5, 100])), limit


@given(shape=shapes(), seed=st.integers(0, 3))
@SETTINGS
def test_the_order_is_the_one_that_is_promised(shape: Any, seed: int, tmp_path: Path) -> None:
    sizes, bad, window, limit = shape
    key = f"{seed}/s/0"
    stream = opened(files(tmp_path, sizes, bad), window=window, limit=limit, key=key)
    count = 2 * sum(sizes) + 3
    wanted = oracle(sizes, bad, window, limit, key, count)
    assert told(stream, range(count)) == wanted
    assert stream.length == min(sum(sizes), limit or sum(sizes))
    again = random.Random(seed).sample(range(count), count)  # in any order, too
    assert told(stream, again) == [wanted[v] for v in again]


@given(shape=shapes(), stopped=st.integers(0, 40), early=st.integers(0, 40))
@SETTINGS
def test_going_on_anywhere_is_never_having_stopped(shape: Any, stopped: int, early: int, tmp_path: Path) -> None:
    """With the marks of the run that stopped, with those of a shorter one, and with none."""
    sizes, bad, window, limit = shape
    path = files(tmp_path, sizes, bad)
    stopped %= 2 * sum(sizes) + 1
    wanted = told(opened(path, window=window, limit=limit), range(stopped + 20))
    for seen in (stopped, min(early, stopped), 0):
        before = opened(path, window=window, limit=limit)
        told(before, range(seen))
        after = opened(path, window=window, limit=limit)
        after.load_state_dict(json.loads(json.dumps(before.state_dict())))
        assert told(after, range(stopped, stopped + 20)) == wanted[stopped:]


def test_going_on_opens_the_shard_where_it_stopped(tmp_path: Path) -> None:
    path = files(tmp_path, [10] * 6)
    before = opened(path, window=4)
    told(before, range(45))
    after = opened(path, window=4)
    after.load_state_dict(before.state_dict())
    read: list[tuple[int, int]] = []
    rows = after.records.rows

    def noted(shard: int, start: int = 0) -> Any:
        read.append((shard, start))
        return rows(shard, start)

    after.records.rows = noted  # type: ignore[method-assign]
    told(after, [45])
    assert len(read) == 1
    assert read[0][1] == 4  # window 11 begins behind 44 rows: the fifth shard's first four


def test_marks_of_other_processes_lead_to_the_same_rows(tmp_path: Path) -> None:
    """A process that saves has read nothing itself: its workers did, each some of the windows."""
    path = files(tmp_path, [7, 7, 7])
    wanted = told(opened(path, window=3), range(60))
    workers = [opened(path, window=3) for _ in range(2)]
    main = opened(path, window=3)
    for batch in range(6):
        worker = workers[batch % 2]
        assert told(worker, range(5 * batch, 5 * batch + 5)) == wanted[5 * batch : 5 * batch + 5]
        main.load_state_delta(worker.state_delta())
    assert main.length == 21
    assert max(main.marks) == (1, 3)
    after = opened(path, window=3)
    after.load_state_dict(main.state_dict())
    assert told(after, range(30, 60)) == wanted[30:]


def test_a_forked_process_leaves_its_parents_place_alone(tmp_path: Path) -> None:
    path = files(tmp_path, [400])
    wanted = told(opened(path, window=2), range(400))
    stream = opened(path, window=2)
    assert told(stream, range(11)) == wanted[:11]
    if (child := os.fork()) == 0:
        os._exit(0 if told(stream, range(11, 400)) == wanted[11:] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert told(stream, range(11, 400)) == wanted[11:]


def test_no_more_than_two_windows_are_kept(tmp_path: Path) -> None:
    stream = opened(files(tmp_path, [50, 50]), window=4)
    for index in range(150):
        stream.example(index)
        assert sum(map(len, stream._windows.values())) <= 8


def test_few_marks_are_kept_and_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "MOST_MARKS", 6)
    path = files(tmp_path, [40])
    stream = opened(path, window=2)
    wanted = told(stream, range(75))
    assert len(stream.marks) <= 6
    assert (1, 17) in stream.marks
    assert told(stream, range(75)) == wanted  # those that were dropped are found again


def test_epochs_seeds_and_entries_have_orders_of_their_own(tmp_path: Path) -> None:
    path = files(tmp_path, [10, 10, 10])
    orders = [tuple(told(opened(path, window=8, key=k), range(30))) for k in ("0/s/0", "1/s/0", "0/t/0", "0/s/1")]
    orders.append(tuple(told(opened(path, window=8), range(30, 60))))
    assert len(set(orders)) == 5
    assert {tuple(sorted(o)) for o in orders} == {tuple(sorted(orders[0]))}


def test_several_streams_take_turns(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    a, b = (opened(files(tmp_path / n, [size]), window=1) for n, size in (("a", 5), ("b", 3)))
    both = Streams([a, b], [2, 1])
    assert told(both, range(9)) == ["0-0", "0-1", "0-0", "0-2", "0-3", "0-1", "0-4", "0-0", "0-2"]
    with refused("missing-field", "steps"):
        len(both)


def test_data_that_change_under_way_are_refused(tmp_path: Path) -> None:
    path = files(tmp_path, [5, 5])
    stream = opened(path, window=4)
    told(stream, range(10))
    (tmp_path / "s1.jsonl").write_text(line("1-0") + "\n")
    with refused("mismatch", 10, 6):
        told(stream, range(10, 20))


def test_nothing_in_it(tmp_path: Path) -> None:
    (tmp_path / "s0.jsonl").write_text("\n\n")
    with refused("empty-file", "s0.jsonl", error=DataError):
        opened(tmp_path / "s0.jsonl", window=4)
