import multiprocessing
import os
import threading
import time
from pathlib import Path

import pytest

from data import media_cache
from data.media_cache import MediaCache


def cached(folder):
    """The files in a cache, by name."""
    return {path.name: path.stat().st_size for path in folder.glob("??/*")}


def ledger(folder):
    return int((folder / "ledger").read_text())


def test_what_is_interrupted_leaves_nothing(tmp_path):
    cache = MediaCache(tmp_path, 1000)

    def interrupted(path):
        assert ledger(tmp_path) == 700, "reserved before anything is fetched"
        Path(path).write_bytes(b"12")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.add("abc.mp4", 700, interrupted)
    assert (cached(tmp_path), ledger(tmp_path), cache.find("abc.mp4")) == ({}, 0, None)


def test_what_a_killed_process_left_is_cleared_away(tmp_path):
    cache = MediaCache(tmp_path, 1000)
    cache.add("aa.mp4", 400, lambda path: Path(path).write_bytes(b"a" * 400))
    left = tmp_path / "bb" / "bb.mp4.500.0123.partial"
    left.parent.mkdir()
    left.write_bytes(b"b" * 10)
    (tmp_path / "ledger").write_text("900\n")  # as it had reserved them
    os.utime(left, (1, 1))
    cache.add("cc.mp4", 400, lambda path: Path(path).write_bytes(b"c" * 400))
    assert set(cached(tmp_path)) == {"aa.mp4", "cc.mp4"}
    assert ledger(tmp_path) == 800


def test_a_lost_ledger_is_counted_again(tmp_path):
    cache = MediaCache(tmp_path, 1000)
    cache.add("aa.mp4", 400, lambda path: Path(path).write_bytes(b"a" * 400))
    (tmp_path / "ledger").write_text("")
    cache.add("bb.mp4", None, lambda path: Path(path).write_bytes(b"b" * 300))
    assert ledger(tmp_path) == 700


def fill(folder, number, seen):
    """Reads files from a slow source through the cache, and watches how full it is."""
    cache = MediaCache(folder, 50_000)
    for step in range(60):
        k = (7 * step * (number + 1) + number) % 20
        name, data = f"{k:02d}{k:02d}.bin", bytes([k]) * 10_000

        def fetch(path, data=data):
            time.sleep(0.001)
            Path(path).write_bytes(data)

        for _ in range(100):
            try:
                assert (
                    Path(cache.find(name) or cache.add(name, len(data), fetch)).read_bytes() == data
                )
                break
            except FileNotFoundError:  # thrown out just before it was opened
                continue
        seen.put(sum(size for size in cached_sizes(folder)))


def cached_sizes(folder):
    for path in folder.glob("??/*"):
        try:
            yield path.stat().st_size
        except FileNotFoundError:
            continue


def test_processes_share_a_cache(tmp_path):
    context = multiprocessing.get_context("fork")
    seen = context.SimpleQueue()
    processes = [context.Process(target=fill, args=(tmp_path, n, seen)) for n in range(2)]
    for process in processes:
        process.start()
    sizes = [seen.get() for _ in range(120)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert 30_000 <= max(sizes) <= 60_000, "never above the bound by more than one file"
    assert sum(cached(tmp_path).values()) == ledger(tmp_path)
    assert not [name for name in cached(tmp_path) if name.endswith("partial")]


def test_the_ledger_is_changed_by_one_at_a_time(tmp_path, monkeypatch):
    cache = MediaCache(tmp_path, 10**6)
    rewrite, inside, most = media_cache._rewrite, [], []

    def slow(file, text):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.002)
        rewrite(file, text)
        inside.pop()

    def add(number):
        for k in range(4):
            cache.add(f"{k}{number}.bin", 10, lambda path: Path(path).write_bytes(b"x" * 10))

    cache.add("first.bin", 10, lambda path: Path(path).write_bytes(b"x" * 10))
    monkeypatch.setattr(media_cache, "_rewrite", slow)
    threads = [threading.Thread(target=add, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    assert ledger(tmp_path) == sum(cached(tmp_path).values()) == 170
