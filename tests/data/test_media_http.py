"""Media from HTTP servers, of which not all answer as they should."""

import io
import os
import socket
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from data import media, media_store
from data.media import Piece, configure, find_media, list_media
from data.media_store import read_bytes
from data.video import VideoReader, VideoReadError


@pytest.fixture(autouse=True)
def cache(media_cache, monkeypatch):
    monkeypatch.setattr(media_store, "_FRESH_SECONDS", 0)
    media_store._known.clear()
    media._warned.clear()
    configure(patience=20)
    return media_cache


def cached(folder):
    """The files in a cache, by name."""
    return {path.name: path.stat().st_size for path in Path(folder).glob("??/*")}


def frames(path):
    with VideoReader(path, "pyav") as reader:
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
