import errno
import io
import logging
import multiprocessing
import os
import socket
import sys
import tarfile
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data import media, media_cache, media_errors, media_store
from data.images import is_image_path
from data.media import LocalMedia, Piece, configure, find_media, list_media, local_copy
from data.media_cache import MediaCache
from data.media_errors import may_pass, retrying
from data.media_store import read_bytes
from data.video import VideoReader, VideoReadError, probe


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    for name in ("ZOETROPE_CACHE", "ZOETROPE_CACHE_GB", "ZOETROPE_PATIENCE"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(media_store, "_FRESH_SECONDS", 0)
    media_store._known.clear()
    media._warned.clear()
    configure(tmp_path / "cache", patience=20)
    return tmp_path / "cache"


@pytest.fixture
def memory():
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.store.clear()


def cached(folder):
    """The files in a cache, by name."""
    return {path.name: path.stat().st_size for path in Path(folder).glob("??/*")}


def ledger(folder):
    return int((folder / "ledger").read_text())


def frames(path, backend="pyav"):
    with VideoReader(path, backend) as reader:
        return reader.read_at([0.0, 0.5, 1.2])


def shard(path, members):
    """A tar file, and the pieces that its members are, by name."""
    pieces = {}
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with tarfile.open(path) as tar:
        for info in tar:
            suffix = os.path.splitext(info.name)[1]
            pieces[info.name] = str(Piece(str(path), info.offset_data, info.size, suffix))
    return pieces


# Pieces of tar shards


@given(
    file=st.sampled_from(
        ["a.tar", "s3://b/ü x#1+2.tar", "https://h/a.tar?key=1&b=c", "/x/y#z.tar"]
    ),
    offset=st.integers(0, 2**50),
    length=st.integers(0, 2**50),
    suffix=st.sampled_from(["", ".mp4", ".JPG"]),
)
def test_a_piece_is_a_path_and_back(file, offset, length, suffix):
    piece = Piece(file, offset, length, suffix)
    assert Piece.parse(str(piece)) == piece
    assert is_image_path(str(piece)) == (suffix == ".JPG")


@pytest.mark.parametrize("path", ["a.mp4", "a.tar", "a.tar#1.mp4", "a.zip#1+2.mp4", "b#1+2.mp4"])
def test_other_paths_are_no_pieces(path):
    assert Piece.parse(path) is None


def test_members_of_a_local_shard_are_read_in_place(tmp_path, make_video, cache):
    videos = [make_video("a.mp4"), make_video("b.mkv"), make_video("c.webm", codec="libvpx")]
    picture = tmp_path / "d.png"
    Image.fromarray(np.arange(48 * 64 * 3, dtype=np.uint8).reshape(48, 64, 3)).save(picture)
    sources = {path.name: path for path in [*videos, picture]}
    members = {name: path.read_bytes() for name, path in sources.items()}
    folder = tmp_path / "odd, name: ü"
    folder.mkdir()
    pieces = shard(folder / "00000.tar", members)
    for path in videos:
        assert np.array_equal(frames(pieces[path.name]), frames(path))
        if "decord" in sys.modules:
            with VideoReader(pieces[path.name]) as piece, VideoReader(path) as whole:
                assert piece.backend == whole.backend
                assert np.array_equal(piece.read_at([0.3]), whole.read_at([0.3]))
        with VideoReader(pieces[path.name]) as reader:
            assert reader.verify() == 20
    assert probe(pieces["d.png"]).is_image
    with VideoReader(pieces["d.png"]) as piece, VideoReader(picture) as whole:
        assert np.array_equal(piece.read_at([0.0]), whole.read_at([0.0]))
    assert not cache.exists()


def test_pieces_that_are_cut_off_or_empty_are_refused(tmp_path, make_video):
    data = make_video("a.mkv").read_bytes()
    pieces = shard(tmp_path / "0.tar", {"a.mkv": data[:-700], "b.mp4": b"", "c.mp4": b"x" * 9999})
    with pytest.raises(VideoReadError, match="cut off"):
        VideoReader(pieces["a.mkv"])
    with pytest.raises(VideoReadError, match="empty"):
        VideoReader(pieces["b.mp4"])
    whole = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(whole[:9000])
    with pytest.raises(VideoReadError, match=r"the shard is cut off, .* has 9000 bytes"):
        VideoReader(pieces["c.mp4"])
    with pytest.raises(VideoReadError, match="no such file"):
        VideoReader(f"{tmp_path}/none.tar#0+5.mp4")


# The cache


def test_a_url_is_read_through_the_cache_by_any_backend(memory, make_video, cache):
    path = make_video("a.mp4")
    memory.pipe("/b/a.mp4", path.read_bytes())
    assert np.array_equal(frames("memory://b/a.mp4"), frames(path))
    assert list(cached(cache).values()) == [path.stat().st_size]
    if "decord" in sys.modules:
        with VideoReader("memory://b/a.mp4") as reader:
            assert reader.backend == "decord"
    assert len(cached(cache)) == 1
    assert np.array_equal(frames(f"file://{path}"), frames(path))


def test_a_piece_of_a_remote_shard_is_one_file(memory, make_video, tmp_path, cache):
    path = make_video("a.mp4")
    pieces = shard(tmp_path / "0.tar", {"x.txt": b"text", "a.mp4": path.read_bytes()})
    memory.pipe("/b/0.tar", (tmp_path / "0.tar").read_bytes())
    url = pieces["a.mp4"].replace(str(tmp_path), "memory://b")
    assert np.array_equal(frames(url), frames(path))
    assert list(cached(cache).values()) == [path.stat().st_size]


def test_a_changed_file_is_not_served_stale(memory, make_video):
    a, b = make_video("a.mp4"), make_video("b.mp4", num_frames=15)
    for path in (a, b, a):
        memory.pipe("/b/x.mp4", path.read_bytes())
        assert np.array_equal(frames("memory://b/x.mp4"), frames(path))


def test_the_cache_is_bounded_and_keeps_what_is_used(memory, cache, monkeypatch):
    configure(max_bytes=35_000)
    fetched = []
    get_file = type(memory).get_file
    monkeypatch.setattr(
        type(memory),
        "get_file",
        lambda fs, *paths: fetched.append(paths[0]) or get_file(fs, *paths),
    )
    for k in range(20):
        memory.pipe(f"/b/{k}.bin", bytes([k]) * 10_000)
    now = time.time()
    for k in range(20):
        for wanted in (0, k):
            found = find_media(f"memory://b/{wanted}.bin")
            assert isinstance(found, LocalMedia)
            with found.open() as file:
                assert file.read() == bytes([wanted]) * 10_000
            # Used at moments that are told apart, whatever the clock of the file system.
            os.utime(found.path, (now + 2 * k, now + 2 * k + (wanted == 0)))
        assert sum(cached(cache).values()) == ledger(cache) <= 35_000
    assert fetched == [f"/b/{k}.bin" for k in range(20)], "each once, even the first"
    assert 2 <= len(cached(cache)) <= 3


def test_what_is_too_large_is_read_over_the_network(memory, make_video, cache, caplog):
    path = make_video("a.mp4")
    memory.pipe("/b/a.mp4", path.read_bytes())
    memory.pipe("/b/p.png", _png())
    configure(max_bytes=100)
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(frames("memory://b/a.mp4", "auto"), frames(path))
        assert probe("memory://b/p.png").is_image
    assert "larger than its bound of 100 bytes" in caplog.text
    assert list(cached(cache)) == [name for name in cached(cache) if name.endswith(".png")]
    with local_copy("memory://b/a.mp4") as copy:
        assert Path(copy).read_bytes() == path.read_bytes()
    assert not os.path.exists(copy)


def _png():
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "png")
    return file.getvalue()


def test_a_full_disk_is_said_and_got_round(memory, make_video, cache, monkeypatch, caplog):
    path = make_video("a.mp4")
    memory.pipe("/b/a.mp4", path.read_bytes())

    def full(_, source, target):
        Path(target).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), target)

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(type(memory), "get_file", full)
        for _ in range(2):
            assert np.array_equal(frames("memory://b/a.mp4"), frames(path))
    assert caplog.text.count("No space left on device") == 1
    assert (cached(cache), ledger(cache)) == ({}, 0)


def test_a_cache_that_cannot_be_written_is_got_round(memory, make_video, tmp_path, caplog):
    path = make_video("a.mp4")
    memory.pipe("/b/a.mp4", path.read_bytes())
    (tmp_path / "file").touch()
    configure(tmp_path / "file")
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(frames("memory://b/a.mp4"), frames(path))
    assert "not from the cache" in caplog.text


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


@pytest.mark.parametrize("max_bytes", [0, 10**6])
def test_an_answer_that_is_cut_off_is_asked_for_again(
    memory, make_video, tmp_path, monkeypatch, max_bytes
):
    path = make_video("a.mp4")
    pieces = shard(tmp_path / "0.tar", {"a.mp4": path.read_bytes()})
    memory.pipe("/b/0.tar", (tmp_path / "0.tar").read_bytes())
    memory.pipe("/b/a.mp4", path.read_bytes())
    configure(max_bytes=max_bytes)
    cat_file, get_file, cut = type(memory).cat_file, type(memory).get_file, []

    def cut_cat(filesystem, *arguments, **more):
        cut.append("cat")
        return cat_file(filesystem, *arguments, **more)[: -9 if cut.count("cat") % 2 else None]

    def cut_get(filesystem, source, target, **more):
        cut.append("get")
        get_file(filesystem, source, target, **more)
        if cut.count("get") % 2:
            os.truncate(target, 100)

    monkeypatch.setattr(type(memory), "cat_file", cut_cat)
    monkeypatch.setattr(type(memory), "get_file", cut_get)
    for url in ("memory://b/a.mp4", pieces["a.mp4"].replace(str(tmp_path), "memory://b")):
        assert np.array_equal(frames(url), frames(path))
    assert len(cut) > 3


# HTTP


class Quiet(SimpleHTTPRequestHandler):
    """Python's own: without ranges."""

    requests: list[str]

    def log_message(self, *_):
        pass

    def send_head(self):
        type(self).requests.append(self.headers.get("Range", ""))
        return super().send_head()


class Ranged(Quiet):
    def do_GET(self):
        wanted = self.headers.get("Range")
        if not wanted:
            return super().do_GET()
        type(self).requests.append(wanted)
        start, end = (int(n) for n in wanted.removeprefix("bytes=").split("-"))
        data = Path(self.translate_path(self.path)).read_bytes()
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{end}/{len(data)}")
        self.send_header("Content-Length", str(end + 1 - start))
        self.end_headers()
        self.wfile.write(data[start : end + 1])
        return None


@pytest.fixture
def serve(tmp_path):
    """serve(handler) -> the URL of a folder, which is tmp_path / "www" """
    (tmp_path / "www").mkdir()
    servers = []

    def start(handler):
        handler.requests = []
        server = ThreadingHTTPServer(
            ("127.0.0.1", 0), partial(handler, directory=str(tmp_path / "www"))
        )
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()


@pytest.mark.parametrize("handler", [Quiet, Ranged])
def test_http_with_and_without_ranges(serve, handler, make_video, tmp_path, cache):
    pytest.importorskip("aiohttp")
    a, b = make_video("a.mp4"), make_video("b.mp4", num_frames=15)
    pieces = shard(tmp_path / "www" / "0.tar", {p.name: p.read_bytes() for p in (a, b)})
    (tmp_path / "www" / "a.mp4").write_bytes(a.read_bytes())
    url = serve(handler)
    assert np.array_equal(frames(f"{url}/a.mp4"), frames(a))
    for path in (a, b):
        piece = pieces[path.name].replace(str(tmp_path / "www"), url)
        assert np.array_equal(frames(piece), frames(path))
    names = sorted(cached(cache).values())
    small = sorted([a.stat().st_size] * 2 + [b.stat().st_size])
    whole = [a.stat().st_size, (tmp_path / "www" / "0.tar").stat().st_size]
    # Pieces by themselves where that is possible; otherwise the shard that they are in.
    assert names == (small if handler is Ranged else sorted(whole))
    for name in ("x", "y"):  # of one size and time
        (tmp_path / "www" / f"{name}.bin").write_text(name)
        os.utime(tmp_path / "www" / f"{name}.bin", (1, 1))
        with find_media(f"{url}/{name}.bin").open() as file:
            assert file.read() == name.encode()
    configure(max_bytes=100)
    piece = pieces["b.mp4"].replace(str(tmp_path / "www"), url)
    if handler is Ranged:
        assert np.array_equal(frames(piece), frames(b))
    else:
        with pytest.raises(VideoReadError, match="does not send parts of files"):
            VideoReader(piece)
    with pytest.raises(VideoReadError, match="no such file"):
        VideoReader(f"{url}/none.mp4")


def test_http_errors_pass_or_do_not(serve, make_video, tmp_path):
    pytest.importorskip("aiohttp")

    class Unwell(Quiet):
        answers: list[int]

        def send_head(self):
            if not self.answers:
                return super().send_head()
            self.requests.append("")
            self.send_error(self.answers.pop(0))
            return None

    path = make_video("a.mp4")
    (tmp_path / "www" / "a.mp4").write_bytes(path.read_bytes())
    url = serve(Unwell)
    Unwell.answers = [503, 503, 429, 500]
    assert np.array_equal(frames(f"{url}/a.mp4"), frames(path))
    asked = len(Unwell.requests)
    Unwell.answers = [403] * 9
    (tmp_path / "www" / "b.mp4").write_bytes(b"x")
    with pytest.raises(VideoReadError, match="not allowed"):
        VideoReader(f"{url}/b.mp4")
    assert len(Unwell.requests) - asked <= 2


def test_http_folders_are_listed_if_their_server_can_be_reached(serve, tmp_path):
    pytest.importorskip("aiohttp")
    for name in ("a.mp4", "d/b c.mp4"):
        path = tmp_path / "www" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    url = serve(Quiet)
    found = [name for name, _ in list_media(url)]
    assert found == [f"{url}/a.mp4", f"{url}/d/b%20c.mp4"]
    assert [read_bytes(name) for name in found] == [b"a.mp4", b"d/b c.mp4"]
    configure(patience=0)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/x"
        with pytest.raises(OSError, match=r"http.*/x: .*\(tried once\)"):
            list(list_media(url))
        with pytest.raises(VideoReadError, match=r"Connect.*\(tried once\)"):
            VideoReader(url)


# Trying again


class Answered(Exception):
    def __init__(self, status):
        self.status = status


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_some_statuses_pass(status):
    error = FileNotFoundError("as fsspec has it")
    error.__cause__ = Answered(status)
    assert may_pass(error)


@pytest.mark.parametrize(
    "error",
    [
        *(Answered(404), Answered(403), Answered(400), OSError(errno.ENOSPC, "full"), KeyError()),
        *(FileNotFoundError(), PermissionError(), ValueError(), IsADirectoryError()),
    ],
)
def test_others_do_not(error):
    assert not may_pass(error)


@pytest.mark.parametrize(
    "error", [TimeoutError(), ConnectionResetError(), OSError(errno.EIO, ""), BrokenPipeError()]
)
def test_broken_connections_pass(error):
    assert may_pass(error)


def test_pauses_grow_and_patience_ends(monkeypatch):
    clock, pauses = [0.0], []

    def sleep(seconds):
        pauses.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr(media_errors.time, "sleep", sleep)
    monkeypatch.setattr(media_errors.time, "monotonic", lambda: clock[0])

    def fails():
        raise ConnectionResetError(errno.ECONNRESET, "reset\nby peer")

    with pytest.raises(OSError, match=r"^reset by peer \(tried 1\d times in 1\d\d s\)$"):
        retrying(fails, "test", 120)
    for k, pause in enumerate(pauses):
        usual = min(0.25 * 2**k, 20)
        assert usual / 2 <= pause <= usual
    assert clock[0] <= 120
    with pytest.raises(OSError, match=r"\(tried once\)$"):
        retrying(fails, "test", 0)


def test_an_extra_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(VideoReadError, match=r"pip install 'zoetrope\[s3\]'"):
        VideoReader("s3://b/a.mp4")


# The rest


def test_a_listing(memory):
    for name in ("a.mp4", "d/ü x.mp4", "d/#1?.txt"):
        memory.pipe(f"/b/{name}", b"12345")
    found = dict(list_media("memory://b"))
    assert found == dict.fromkeys(
        ("memory:///b/a.mp4", "memory:///b/d/ü x.mp4", "memory:///b/d/#1?.txt"), 5
    )
    assert all(read_bytes(url) == b"12345" for url in found)
    with pytest.raises(FileNotFoundError, match="memory://none: no such file"):
        list(list_media("memory://none"))


def test_settings_are_checked(memory, monkeypatch):
    with pytest.raises(ValueError, match="0 or more"):
        configure(max_bytes=-1)
    memory.pipe("/b/a.mp4", b"x")
    monkeypatch.setenv("ZOETROPE_CACHE_GB", "much")
    with pytest.raises(VideoReadError, match="ZOETROPE_CACHE_GB=much"):
        VideoReader("memory://b/a.mp4")
