"""`scoring.scorers.run_shards`: streamed, durable, resumable; killed at any moment, nothing is lost, doubled or done twice."""

from __future__ import annotations

import errno
import json
import random
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from handshake import Child

from sparsort.errors import SparsortError
from sparsort.scoring.data.readers import SequenceReader
from sparsort.scoring.data.rows import Row, RowSource, open_rows
from sparsort.scoring.scorers.run_shards import Coverage, ShardRun, run, run_part
from sparsort.scoring.store import shards
from sparsort.scoring.store.claims import Claims, Owner
from sparsort.scoring.store.score_tables import score_table
from sparsort.scoring.store.scores import Scores
from sparsort.scoring.store.shard_files import read_shard

SHARD = 25
ROWS = [{"id": f"q{i}", "text": "x" * (i % 13)} for i in range(390)]


class Lengths:
    """A scorer that costs nothing: the length of the text, none for an empty one. Notes the first row of every call."""

    metrics: Sequence[str] = ("length", "minus")

    def __init__(self, **settings: Any) -> None:
        orientation = {"length": 1, "minus": -1}
        self.provenance = {"scorer": "length", "metric": "length", "orientation": orientation, **settings}
        self.calls: list[int] = []
        self.before: Callable[[Sequence[Row]], None] = lambda rows: None

    def score_rows(self, rows: Sequence[Row], advance: Callable[[int], None]) -> pa.Table:
        self.before(rows)
        self.calls.append(rows[0].position)
        lengths = np.array([len(row.fields["text"]) or np.nan for row in rows], dtype=np.float64)
        status = ["empty" if np.isnan(length) else "ok" for length in lengths]
        reason = ["the text is empty" if state == "empty" else "" for state in status]
        for _ in rows:
            advance(1)
        zeros = np.zeros(len(rows), dtype=np.int32)
        return score_table(rows, lengths, status, reason, zeros, zeros, {"length": lengths, "minus": -lengths})


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file()}


def test_memory_and_folder_give_the_same_scores(tmp_path: Path) -> None:
    scorer, ticks = Lengths(environment={"threads": 2}), []
    kept = run(open_rows(ROWS), scorer, out=None, shard_rows=SHARD, advance=ticks.append)
    stored = run(open_rows(ROWS), scorer, out=tmp_path / "out", shard_rows=SHARD)
    assert sum(ticks) == len(ROWS)
    assert scorer.calls == 2 * list(range(0, 390, SHARD))
    assert repr(stored.table.to_pylist()) == repr(kept.table.to_pylist())  # NaN is not equal to itself
    added = {"source": "list of 390 rows", "id_column": "id", "content": None}
    assert stored.provenance == kept.provenance == {**scorer.provenance, **added}
    assert len(stored) == 390
    assert stored.counts("status") == kept.counts("status") == {"ok": 360, "empty": 30}
    np.testing.assert_array_equal(stored.by("minus").difficulty, kept.difficulty)
    assert Scores.load(tmp_path / "out").ranked() == kept.ranked()


def test_only_the_columns_that_are_asked_for_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = run(open_rows(ROWS), Lengths(), out=tmp_path / "out", shard_rows=100)
    read: list[Any] = []
    monkeypatch.setattr(shards, "_MAX_WHOLE_ROWS", 0)
    monkeypatch.setattr(shards, "_SMALL_ROWS", 0)
    monkeypatch.setattr(shards, "read_shard", lambda path, columns: read.append(columns) or read_shard(path, columns))
    assert len(scores) == 390
    assert scores.metrics == ["length", "minus"]
    assert scores.difficulty[1] == 1.0
    assert read == [["difficulty"]] * 4
    # Opening a small shard takes longer than reading it, so what a report needs is read in one pass.
    monkeypatch.setattr(shards, "_SMALL_ROWS", 100)
    read.clear()
    assert scores.counts("status") == {"ok": 360, "empty": 30}
    assert scores.ids == [row["id"] for row in ROWS]
    assert read == [list(shards._REPORT_COLUMNS)] * 4
    assert scores.column("minus")[1] == -1.0
    assert read[4:] == [["minus"]] * 4


def test_a_second_run_does_nothing_and_changes_nothing(tmp_path: Path) -> None:
    first, second, ticks = Lengths(), Lengths(), []
    run(open_rows(ROWS), first, out=tmp_path / "out", shard_rows=SHARD)
    before = contents(tmp_path / "out")
    run(open_rows(ROWS), second, out=tmp_path / "out", shard_rows=SHARD, advance=ticks.append)
    assert second.calls == []
    assert sum(ticks) == len(ROWS)
    assert contents(tmp_path / "out") == before


def test_a_run_continues_with_a_moved_file_and_refuses_a_changed_one(tmp_path: Path) -> None:
    def write(name: str, rows: list[dict[str, Any]]) -> Path:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / name

    out = tmp_path / "out"
    run(open_rows(write("a.jsonl", ROWS)), Lengths(), out=out, shard_rows=SHARD)
    moved = Lengths()
    run(open_rows(write("b.jsonl", ROWS)), moved, out=out, shard_rows=SHARD)
    assert moved.calls == []
    changed = [*ROWS[:60], {**ROWS[60], "text": "other"}, *ROWS[61:]]
    with pytest.raises(SparsortError, match=r"has changed since shard-00002.parquet was scored: rows 50 to 74"):
        run(open_rows(write("c.jsonl", changed)), Lengths(), out=out, shard_rows=SHARD)
    with pytest.raises(SparsortError, match=r"has changed since shard-00015.parquet"):
        run(open_rows(write("d.jsonl", [*ROWS, {"id": "new", "text": ""}])), Lengths(), out=out, shard_rows=SHARD)
    with pytest.raises(SparsortError, match="has become shorter"):
        run(open_rows(write("e.jsonl", ROWS[:375])), Lengths(), out=out, shard_rows=SHARD)
    with pytest.raises(SparsortError, match=r'prompt: absent → "{text}"'):
        run(open_rows(write("a.jsonl", ROWS)), Lengths(prompt="{text}"), out=out, shard_rows=SHARD)


def test_a_damaged_shard_is_reported_and_scored_again(tmp_path: Path) -> None:
    run(open_rows(ROWS), Lengths(), out=tmp_path, shard_rows=SHARD)
    before = contents(tmp_path)
    path = tmp_path / "shard-00003.parquet"
    path.write_bytes(path.read_bytes()[:-30])
    (tmp_path / "shard-00007.parquet").unlink()
    scorer, notes = Lengths(), []
    run(open_rows(ROWS), scorer, out=tmp_path, shard_rows=SHARD, note=notes.append)
    assert scorer.calls == [75, 175]
    assert len(notes) == 1
    assert "shard-00003.parquet is damaged" in notes[0]
    assert contents(tmp_path) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "full"), MemoryError()])
def test_what_was_finished_before_an_interruption_stays(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = Lengths()
    real = pq.write_table

    def stop(table: pa.Table, *rest: Any, **options: Any) -> None:
        if table["position"][0].as_py() == 75:
            raise error
        real(table, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", stop)
        expected = SparsortError if isinstance(error, OSError) else type(error)
        with pytest.raises(expected):
            run(open_rows(ROWS), scorer, out=tmp_path, shard_rows=SHARD)
    assert sorted(contents(tmp_path)) == ["manifest.json", *(f"shard-0000{i}.parquet" for i in range(3))]
    with pytest.raises(SparsortError, match="not complete"):
        Scores.load(tmp_path)
    scorer.calls.clear()
    scores = run(open_rows(ROWS), scorer, out=tmp_path, shard_rows=SHARD)
    assert scorer.calls == list(range(75, 390, SHARD))
    assert scores.ids == [row["id"] for row in ROWS]


def test_parts_together_make_the_whole(tmp_path: Path) -> None:
    run(open_rows(ROWS), Lengths(), out=tmp_path / "whole", shard_rows=SHARD)
    scorer = Lengths()
    covered = [
        run_part(open_rows(ROWS), scorer, out=tmp_path / "parts", part=(k, 3), shard_rows=SHARD) for k in (2, 0, 1)
    ]
    common = {"folder": tmp_path / "parts", "total": 16}
    assert covered == [
        Coverage(**common, done=5, scored=5, kept=0, complete=False),
        Coverage(**common, done=11, scored=6, kept=0, complete=False),
        Coverage(**common, done=16, scored=5, kept=0, complete=True),
    ]
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert not (tmp_path / "parts" / "workers").exists()
    assert covered[2].load().ids == [row["id"] for row in ROWS]
    again = run_part(open_rows(ROWS), scorer, out=tmp_path / "parts", part=(1, 3), shard_rows=SHARD)
    assert again == Coverage(**common, done=16, scored=0, kept=5, complete=True)
    assert len(scorer.calls) == 16
    alone = run_part(open_rows(ROWS), scorer, out=tmp_path / "parts", part=(20, 30), shard_rows=SHARD)
    assert alone == Coverage(**common, done=16, scored=0, kept=0, complete=True)
    for part in ((3, 3), (-1, 2), (0, 0)):
        with pytest.raises(SparsortError, match="expected \\(k, n\\) with 0 <= k < n"):
            run_part(open_rows(ROWS), scorer, out=tmp_path / "parts", part=part, shard_rows=SHARD)


def test_one_shard_of_rows_is_held_at_a_time(tmp_path: Path) -> None:
    class Fields(dict[str, Any]):
        """A dict that can be watched, so that those alive can be counted."""

    class Made:
        """A sequence that makes its rows when they are asked for."""

        def __len__(self) -> int:
            return 7800

        def __getitem__(self, position: int) -> Fields:
            fields = Fields(text="x" * (position % 13), n=position)
            alive[id(fields)] = fields
            return fields

    alive: weakref.WeakValueDictionary[int, Fields] = weakref.WeakValueDictionary()
    scorer, held = Lengths(), []
    scorer.before = lambda _rows: held.append(len(alive))
    run(RowSource(SequenceReader("made", Made())), scorer, out=tmp_path / "out", shard_rows=300)
    assert len(held) == 26
    assert max(held) <= 2 * 300


def test_a_scorer_that_gives_another_table_is_refused() -> None:
    class Short(Lengths):
        def score_rows(self, rows: Sequence[Row], advance: Callable[[int], None]) -> pa.Table:
            return super().score_rows(rows, advance).slice(1)

    class Backwards(Lengths):
        def score_rows(self, rows: Sequence[Row], advance: Callable[[int], None]) -> pa.Table:
            return super().score_rows(rows[::-1], advance)

    class Bare(Lengths):
        metrics = ("length",)

    for scorer in (Short(), Backwards(), Bare()):
        with pytest.raises(SparsortError, match=rf"{type(scorer).__name__}\.score_rows.*fault of the scorer"):
            run(open_rows(ROWS), scorer, out=None, shard_rows=SHARD)
    with pytest.raises(SparsortError, match="shard_rows is 0"):
        run(open_rows(ROWS), Lengths(), out=None, shard_rows=0)


# A process that scores rows.jsonl in its folder and notes every call of the scorer; argv: folder, out, part, n, and the call
# of the scorer after which it dies, with the number of function calls between the two (0: it does not).
_PROCESS = """
import sys
from pathlib import Path
import numpy as np
from handshake import die_in
from sparsort.scoring.scorers.run_shards import run_part
from sparsort.scoring.store.score_tables import score_table
from sparsort.scoring.data.rows import open_rows

folder, out, (k, n, last, moment) = Path(sys.argv[1]), Path(sys.argv[2]), map(int, sys.argv[3:])
calls = 0

class Scorer:
    provenance = {"scorer": "length", "metric": "length", "orientation": {"length": 1}}
    metrics = ("length",)
    def score_rows(self, rows, advance):
        global calls
        with (folder / "calls.log").open("a") as log:
            log.write(f"{rows[0].position}\\n")
        calls += 1
        if calls == last:
            die_in(moment)
        lengths = np.array([len(row.fields["text"]) for row in rows], dtype=float)
        zeros = np.zeros(len(rows), dtype=np.int32)
        return score_table(rows, lengths, ["ok"] * len(rows), [""] * len(rows), zeros, zeros, {"length": lengths})

print(run_part(open_rows(folder / "rows.jsonl"), Scorer(), out=out, part=(k, n), shard_rows=25))
"""


def start(folder: Path, out: str, part: tuple[int, int] = (0, 1), dies: tuple[int, int] = (0, 0)) -> Child:
    (folder / "calls.log").touch()
    return Child(_PROCESS, folder, folder / out, *part, *dies)


def write_rows(folder: Path, count: int) -> None:
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps({"text": "x" * (i % 13), "n": i}) + "\n" for i in range(count))
    )


def test_killed_at_any_moment_and_started_again(tmp_path: Path) -> None:
    write_rows(tmp_path, 25 * 120)
    log, out, chance = tmp_path / "calls.log", tmp_path / "out", random.Random(7)
    done: set[int] = set()
    kills = 0
    for _attempt in range(12):
        called = len(log.read_text().split()) if log.exists() else 0
        # A shard takes about 1,140 function calls, so the kill falls into this one or the next.
        with start(tmp_path, "out", dies=(chance.randint(1, 9), chance.randint(1, 2300))) as process:
            kills += process.was_killed()
        # Nothing that was done at the last kill was scored since, and it is all still there.
        assert done.isdisjoint(map(int, log.read_text().split()[called:]))
        now = {25 * int(file.stem.removeprefix("shard-")) for file in out.glob("shard-*.parquet")}
        assert done <= now
        done = now
    assert kills == 12
    assert 0 < len(done) < 120
    called = len(log.read_text().split())
    assert start(tmp_path, "out").communicate()[0].endswith("complete=True)\n")
    assert sorted(map(int, log.read_text().split()[called:])) == sorted(set(range(0, 3000, 25)) - done)
    assert "scored=120, kept=0" in start(tmp_path, "whole").communicate()[0]
    assert contents(out) == contents(tmp_path / "whole")
    assert Scores.load(out).ids == [str(i) for i in range(3000)]


def test_processes_that_score_parts_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    write_rows(tmp_path, 25 * 40)
    processes = [start(tmp_path, "out", (k, 4)) for k in range(4)]
    sentences = [process.communicate()[0] for process in processes]
    assert all("scored=10, kept=0" in sentence for sentence in sentences)
    assert any("complete=True" in sentence for sentence in sentences)
    assert sorted(map(int, (tmp_path / "calls.log").read_text().split())) == list(range(0, 1000, 25))
    start(tmp_path, "whole").communicate()
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# Scores a file and measures its own memory after every shard; argv: folder.
_MEASURED = """
import json, sys
from pathlib import Path
import numpy as np, psutil
from sparsort.scoring.scorers.run_shards import run
from sparsort.scoring.store.score_tables import score_table
from sparsort.scoring.data.rows import open_rows

class Scorer:
    provenance = {"scorer": "length", "metric": "length", "orientation": {"length": 1}}
    metrics = tuple("abcdefghijklm")
    def score_rows(self, rows, advance):
        lengths = np.array([len(row.fields["text"]) for row in rows], dtype=float)
        zeros = np.zeros(len(rows), dtype=np.int32)
        metrics = {name: lengths for name in self.metrics}
        table = score_table(rows, lengths, ["ok"] * len(rows), [""] * len(rows), zeros, zeros, metrics)
        used.append(memory().rss)
        return table

folder, memory = Path(sys.argv[1]), psutil.Process().memory_info
used = [memory().rss]
scores = run(open_rows(folder / "rows.jsonl"), Scorer(), out=folder / "out")
counts = scores.counts("status")
hardest = scores.difficulty.max()
used.append(memory().rss)
print(json.dumps({"rows": len(scores), "counts": counts, "used": used, "hardest": hardest}))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_rows(tmp_path: Path) -> None:
    # What the rows of one shard need is there after the first shards. All 250,000 rows would add 150 MiB from then on.
    n = 250_000
    with (tmp_path / "rows.jsonl").open("w") as file:
        for i in range(n):
            file.write(f'{{"id": "example-{i}", "text": "What is {i} + {i}?"}}\n')
    with Child(_MEASURED, tmp_path) as child:
        measured = json.loads(child.line())
    used = measured["used"]
    assert measured["rows"] == n
    assert measured["counts"] == {"ok": n}
    assert len(used) > 100
    assert max(used) - used[0] < 300 * 2**20
    assert max(used) - max(used[: len(used) // 10]) < 40 * 2**20


def test_a_shard_that_another_process_has_claimed_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = ShardRun.begin(open_rows(ROWS), Lengths, out=tmp_path, shard_rows=SHARD)
    scorer, notes, pauses = Lengths(), [], []
    with ShardRun.begin(open_rows(ROWS), lambda: scorer, out=tmp_path, shard_rows=SHARD, note=notes.append) as shards:
        elsewhere = Owner(host="other", machine="other boot", pid=1, start="1", since=0.0)
        claims = Claims(tmp_path / "workers", owner=elsewhere)
        claims._take("00003")

        def pause() -> None:
            pauses.append(len(scorer.calls))
            if len(pauses) == 2:
                claims._release("00003", 0)
                assert other.score_shard(3) == "scored"

        monkeypatch.setattr(shards.store.claims, "pause", pause)
        coverage = shards.run(shards.numbers())
    # All others are scored first, and this one is then found done.
    assert pauses == [15, 15]
    assert (coverage.scored, coverage.kept, coverage.complete) == (15, 1, True)
    assert notes == ["waiting for 1 shard(s) that other processes have claimed."]
    assert 75 not in scorer.calls
