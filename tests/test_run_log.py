"""The run log: what goes in comes out, also after a kill and from a damaged file."""

import contextlib
import math
import os
import random
import re
import shutil
import sqlite3
import struct
import sys
import threading
from pathlib import Path

import pytest

from zofl_jax.runs import run_log, run_repair
from zofl_jax.runs.run_files import RunError
from zofl_jax.runs.run_log import RoundRow

GOLDEN = Path(__file__).parent / "data" / "golden_log.sqlite"
DOCUMENT = Path(__file__).parents[1] / "docs" / "log_format.md"
BROADCAST_SPEC = [["scalars", "float32", [1, 5]]]


def golden_rows():
    return [
        RoundRow(
            round=r,
            key=struct.pack("<2I", 0x9E3779B9, r),
            broadcast=struct.pack("<5f", *(r + p / 8 for p in range(5))),
            train_loss=math.nan if r == 7 else 2.5 - r / 16,
            bytes_up=200,
            seed_down=80,
            broadcast_down=200,
            catch_up_down=28 * r,
            first_sync_down=2**33 if r == 0 else 0,
        )
        for r in range(12)
    ]


GOLDEN_METRICS = {
    0: {"params_fingerprint": 4294967295.0, "test_accuracy": 0.125, "test_loss": 2.5},
    12: {"params_fingerprint": 305419896.0, "test_accuracy": 0.75, "test_loss": math.nan},
}


def write_golden():
    """Made the golden log once; it must never be made again."""
    log, _ = run_repair.open_log(GOLDEN)
    log.write_meta({"broadcast": BROADCAST_SPEC})
    log.append(golden_rows(), GOLDEN_METRICS)
    log.close()


def random_rows(start, stop):
    rng = random.Random(start)
    return [
        RoundRow(r, rng.randbytes(8), rng.randbytes(20), rng.random(), 200, 80, 200, 28 * r, 0)
        for r in range(start, stop)
    ]


def open_sound(path):
    log, notice = run_repair.open_log(path)
    assert notice is None
    return log


@pytest.fixture
def path(tmp_path):
    return tmp_path / "log.sqlite"


@pytest.fixture(scope="module")
def sound_log(tmp_path_factory):
    """The bytes of a log, its rounds and its metrics."""
    path = tmp_path_factory.mktemp("sound") / "log.sqlite"
    rows = random_rows(0, 300)
    log = open_sound(path)
    log.write_meta({"broadcast": BROADCAST_SPEC})
    for at in range(0, 300, 10):
        log.append(rows[at : at + 10], {at + 10: {"test_loss": 1 / (at + 1), "test_accuracy": 0.5}})
    metrics = log.metrics()
    log.close()
    return path.read_bytes(), rows, metrics


def test_golden_log_stays_readable(path):
    shutil.copyfile(GOLDEN, path)
    log = open_sound(path)
    assert repr(log.rounds()) == repr(golden_rows())
    assert repr(log.metrics()) == repr(GOLDEN_METRICS)
    assert log.meta() == {
        "format_version": 1,
        "library_version": "0.1.0",
        "broadcast": BROADCAST_SPEC,
    }
    log.close()
    assert path.read_bytes() == GOLDEN.read_bytes()


def test_documented_reader_reads_the_golden_log(path):
    shutil.copyfile(GOLDEN, path)
    (program,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.S)
    names = {"path": path}
    exec(program, names)
    assert [row[:3] for row in names["rounds"]] == [tuple(row[:3]) for row in golden_rows()]


def test_document_has_the_schema():
    documented = " ".join(DOCUMENT.read_text().split())
    for statement in run_log.SCHEMA:
        assert statement + ";" in documented
    assert f"application_id = {run_log.APPLICATION_ID}" in documented


def test_values_survive_reopening(path):
    rows = random_rows(0, 20)
    rows[3] = rows[3]._replace(train_loss=math.inf, first_sync_down=2**62, broadcast=b"")
    log = open_sound(path)
    assert (log.last_round, log.rounds(), log.metrics()) == (-1, [], {})
    log.append(rows[:5])
    log.append([])
    log.append(rows[5:], {20: {"test_loss": 0.5}})
    log.write_metrics(20, {"test_loss": 0.25, "params_fingerprint": 2**32 - 1})
    log.write_meta({"note": {"λ": [1, None]}})
    log.close()
    log = open_sound(path)
    assert log.last_round == 19
    assert log.rounds() == rows
    assert log.rounds(5, 7) == rows[5:7]
    assert log.rounds(18) == rows[18:]
    assert log.rounds(20) == []
    assert log.metrics() == {20: {"test_loss": 0.25, "params_fingerprint": 2**32 - 1}}
    assert log.meta()["note"] == {"λ": [1, None]}
    log.close()


@pytest.mark.parametrize(
    ("rounds", "message"),
    [
        ([0], "round 0 can't be logged where round 3 is due"),
        ([4], "round 4 can't be logged where round 3 is due"),
        ([3, 5], "round 5 can't be logged where round 4 is due"),
        ([3, 3], "round 3 can't be logged where round 4 is due"),
    ],
)
def test_append_refuses_gaps_and_repeats(path, rounds, message):
    log = open_sound(path)
    log.append(random_rows(0, 3))
    template = random_rows(0, 1)[0]
    with pytest.raises(ValueError, match=message):
        log.append([template._replace(round=r) for r in rounds])
    assert log.last_round == 2
    log.close()


def test_append_is_all_or_nothing(path):
    log = open_sound(path)
    with pytest.raises(TypeError):
        log.append(random_rows(0, 3), {3: {"test_loss": "low"}})
    with pytest.raises(ValueError, match="must be bytes, got str and bytes"):
        log.append([random_rows(0, 1)[0]._replace(key="seed")])
    assert log.last_round == -1
    log.append(random_rows(0, 1))
    log.close()


def test_asking_for_rounds_that_are_not_there_raises(path):
    log = open_sound(path)
    log.append(random_rows(0, 3))
    for start, stop in ((0, 4), (-1, 2), (2, 1), (4, None)):
        with pytest.raises(ValueError, match="not all in the log: choose them from its 3 rounds"):
            log.rounds(start, stop)
    log.close()


def test_truncation_drops_rounds_and_the_metrics_of_later_states(path):
    log = open_sound(path)
    log.append(random_rows(0, 10), {n: {"test_loss": n} for n in range(11)})
    log.truncate_after(4)
    assert log.last_round == 4
    assert list(log.metrics()) == [0, 1, 2, 3, 4, 5]
    log.append(random_rows(5, 7))
    log.truncate_after(-1)
    assert (log.last_round, list(log.metrics())) == (-1, [0])
    log.close()


@pytest.mark.parametrize("value", [math.nan, {1, 2}, b"raw"])
def test_meta_refuses_what_json_cannot_hold(path, value):
    log = open_sound(path)
    with pytest.raises(ValueError, match="meta 'fact' must be plain, finite JSON"):
        log.write_meta({"fact": value})
    with pytest.raises(ValueError, match="'format_version' is written by the log itself"):
        log.write_meta({"format_version": 7})
    log.close()


def test_thousand_rounds_are_small_on_disk_also_while_written(path):
    log = open_sound(path)
    rows = random_rows(0, 1000)
    sizes = []
    done = threading.Event()

    def watch():
        while not done.is_set():
            for entry in os.scandir(path.parent):
                with contextlib.suppress(FileNotFoundError):
                    sizes.append((entry.name, entry.stat().st_size))

    watcher = threading.Thread(target=watch)
    watcher.start()
    for at in range(0, 1000, 20):
        log.append(rows[at : at + 20], {at + 20: {"test_loss": 0.1 * at, "test_accuracy": 0.9}})
    done.set()
    watcher.join()
    log.close()
    journals = [size for name, size in sizes if name != path.name]
    assert path.stat().st_size <= 85_000
    assert max(journals, default=0) <= 10_000
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def check_salvage(path, data, sound):
    """Opens a damaged log; returns how many rounds are left and the notice."""
    _, rows, metrics = sound
    path.write_bytes(data)
    log, notice = run_repair.open_log(path)
    left = log.last_round + 1
    assert log.rounds() == rows[:left]
    lost = {
        (n, name)
        for n, values in metrics.items()
        for name in values
        if n <= left and name not in log.metrics().get(n, {})
    }
    for n, values in log.metrics().items():
        assert metrics[n].items() >= values.items()
    assert max(log.metrics(), default=0) <= left
    if notice is None:
        assert (left, log.metrics(), log.meta()["broadcast"]) == (300, metrics, BROADCAST_SPEC)
    else:
        kept = path.with_name(f"{path.name}.damaged-1")
        assert kept.read_bytes() == data
        assert kept.name in notice
        assert f"after round {left - 1}, the last good one" in notice or left == 0
        assert "some metrics before it may be lost" in notice or left == 0 or not lost
        kept.unlink()
    # It is a log like any other: it can be written, and is sound when opened again.
    log.append([rows[0]._replace(round=left)], {0: {"test_loss": 7.0}})
    log.close()
    log = open_sound(path)
    assert (log.last_round, log.metrics()[0]) == (left, {"test_loss": 7.0})
    log.close()
    return left, notice


def test_cut_short(path, sound_log):
    data = sound_log[0]
    sizes = [0, 1, 99, 100, 1023, 1024, 4096, 4097, len(data) // 3, len(data) // 2, len(data) - 1]
    left = []
    for size in sizes:
        rounds, notice = check_salvage(path, data[:size], sound_log)
        assert notice is not None
        left.append(rounds)
    assert left == sorted(left)
    assert left[0] == 0
    assert left[-3] > 60 and left[-2] > 100 and left[-1] > 270


@pytest.mark.parametrize("column", range(9))
def test_flipped_byte_in_a_row(path, sound_log, column):
    """Whatever is altered in round 137, the rounds before it are good."""
    data, rows, _ = sound_log
    start = data.index(rows[137].key)
    # The record: key, broadcast, loss, then the counts of bytes and the checksum.
    offset = start + [0, 7, 8, 20, 27, 28, 35, 36, 37][column]
    damaged = data[:offset] + bytes([data[offset] ^ 0x10]) + data[offset + 1 :]
    left, notice = check_salvage(path, damaged, sound_log)
    assert left == 137
    assert "the run resumes after round 136, the last good one" in notice


@pytest.mark.parametrize("length", [16, 100, 1024])
def test_zeroed_header_loses_no_round(path, sound_log, length):
    left, notice = check_salvage(path, bytes(length) + sound_log[0][length:], sound_log)
    assert left == 300
    assert notice is not None


@pytest.mark.parametrize("offset", [18, 19])
@pytest.mark.parametrize("mode", [2, 3])
def test_altered_journal_mode_is_damage(path, sound_log, offset, mode):
    """SQLite would take these logs for write-ahead or read-only ones."""
    damaged = bytearray(sound_log[0])
    damaged[offset] = mode
    left, notice = check_salvage(path, bytes(damaged), sound_log)
    assert (left, "damaged" in notice) == (300, True)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_altered_type_is_damage(path, sound_log):
    """The same 8 bytes as an integer in place of a real."""
    data, rows, _ = sound_log
    damaged = bytearray(data)
    # The types of a record stand before its values: here key, broadcast, real, integers.
    start = data.index(rows[137].key)
    types = data.rindex(bytes([28, 52, 7]), 0, start)
    damaged[types + 2] = 6
    left, _ = check_salvage(path, bytes(damaged), sound_log)
    assert left == 137


def test_rounds_after_a_missing_one_are_not_kept(path, sound_log):
    """Their rows are sound, but without the missing one they can't be replayed."""
    path.write_bytes(sound_log[0])
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("DELETE FROM rounds WHERE round = 137")
    left, notice = check_salvage(path, path.read_bytes(), sound_log)
    assert left == 137
    assert "the run resumes after round 136, the last good one" in notice


def test_altered_bookkeeping_of_a_page_is_damage(path, sound_log):
    """All rows can be read, but rows written later might not be."""
    damaged = bytearray(sound_log[0])
    damaged[1024 * 5 + 7] ^= 1  # the count of unused bytes on a page
    left, notice = check_salvage(path, bytes(damaged), sound_log)
    assert (left, "damaged" in notice) == (300, True)


def test_any_damage_leaves_a_prefix_of_the_truth(path, sound_log):
    data = sound_log[0]
    rng = random.Random(1)
    for offset in [*range(16, 100, 4), *(rng.randrange(len(data)) for _ in range(40))]:
        damaged = bytearray(data)
        length = rng.choice([1, 1, 30, 1024])
        damaged[offset : offset + length] = rng.randbytes(len(data[offset : offset + length]))
        check_salvage(path, bytes(damaged), sound_log)


def test_every_damaged_file_is_kept(path, sound_log):
    for n in (1, 2):
        path.write_bytes(sound_log[0][:20_000])
        log, notice = run_repair.open_log(path)
        log.close()
        assert f"{path.name}.damaged-{n}" in notice
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "log.sqlite",
        "log.sqlite.damaged-1",
        "log.sqlite.damaged-2",
    ]


def test_newer_format_is_refused_and_left_alone(path):
    open_sound(path).close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 2")
    connection.execute("UPDATE meta SET value = '2' WHERE key = 'format_version'")
    connection.commit()
    connection.close()
    before = path.read_bytes()
    with pytest.raises(RunError, match=r"format version 2 .* up to 1: update zofl_jax"):
        run_repair.open_log(path)
    assert path.read_bytes() == before


def test_altered_version_is_damage_not_a_newer_format(path, sound_log):
    damaged = bytearray(sound_log[0])
    damaged[63] = 99
    left, notice = check_salvage(path, bytes(damaged), sound_log)
    assert (left, "damaged" in notice) == (300, True)


def kill_during_append(path, rows):
    """Leaves log and journal as a kill in the middle of a transaction does."""
    connection = run_log.connect(path)
    connection.execute("PRAGMA cache_size = 1")  # so that pages reach the file before the commit
    connection.execute("BEGIN")
    run_log.insert_rounds(connection, rows)
    files = {file: file.read_bytes() for file in (path, Path(f"{path}-journal"))}
    connection.rollback()
    connection.close()
    assert files[path] != path.read_bytes()
    for file, data in files.items():
        file.write_bytes(data)


def test_interrupted_append_is_rolled_back(path):
    log = open_sound(path)
    log.append(random_rows(0, 100))
    log.close()
    kill_during_append(path, random_rows(100, 300))
    log = open_sound(path)
    assert log.rounds() == random_rows(0, 100)
    log.close()


def test_journal_of_a_deleted_log_is_not_played_back(path):
    log = open_sound(path)
    empty_size = path.stat().st_size
    log.append(random_rows(0, 100))
    log.close()
    kill_during_append(path, random_rows(100, 300))
    path.unlink()
    log = open_sound(path)
    assert log.last_round == -1
    log.close()
    assert path.stat().st_size == empty_size
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_busy_log_is_not_taken_for_a_damaged_one(path, monkeypatch):
    monkeypatch.setattr(run_log, "_BUSY_SECONDS", 0.01)
    log = open_sound(path)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(RunError, match="close other programs that hold it"):
        log.append(random_rows(0, 1))
    with pytest.raises(RunError, match="close other programs that hold it"):
        run_repair.open_log(path)
    other.close()
    log.append(random_rows(0, 1))
    log.close()
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_damage_during_a_run_names_the_remedy(path, sound_log):
    path.write_bytes(sound_log[0])
    log = open_sound(path)
    path.write_bytes(sound_log[0][:1024] + bytes(len(sound_log[0]) - 1024))
    with pytest.raises(RunError, match="start the same command again, which repairs it"):
        log.rounds()
    log.close()


if __name__ == "__main__" and sys.argv[1:] == ["write_golden"]:
    write_golden()
