import errno
import importlib.util
import io
import logging
import os
import sys
import tarfile
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data import media, media_store
from data.images import is_image_path
from data.media import LocalMedia, Piece, configure, find_media, list_media, local_copy
from data.media_store import read_bytes
from data.video import VideoReader, VideoReadError, probe

DECORD = importlib.util.find_spec("decord") is not None


@pytest.fixture(autouse=True)
def cache(media_cache, monkeypatch):
    monkeypatch.setattr(media_store, "_FRESH_SECONDS", 0)
    media_store._known.clear()
    media._warned.clear()
    configure(patience=20)
    return media_cache


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
        if DECORD:
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
    if DECORD:
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


# The rest


def test_an_extra_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    loaded = sys.modules["fsspec.registry"]._registry  # by earlier tests
    monkeypatch.delitem(loaded, "s3", raising=False)
    with pytest.raises(VideoReadError, match=r"pip install 'zoetrope\[s3\]'"):
        VideoReader("s3://b/a.mp4")


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
