"""Media, manifests and shards on a real S3 server: moto's, on the loopback, well and unwell."""

import itertools
import multiprocessing
import socket
import struct
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from data import media_errors, media_store
from data.dataset import ClipDataset, StepSampler
from data.loader import ClipLoader
from data.manifest import read_manifest, write_manifest
from data.media import configure, list_media
from data.media_store import matching, read_bytes
from data.tar_index import index_shards
from data.tar_shards import write_shards
from data.video import VideoReader, VideoReadError, probe, write_video

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")

NUM_CLIPS = 60
SIZE = {"num_frames": 3, "height": 16, "width": 16, "fps": 8}


class Unwell:
    """A WSGI server in front of another: fails some requests, and may stop answering once."""

    def __init__(self, app):
        self.app = app
        self.lock = threading.Lock()
        self.heal()

    def heal(self):
        self.failing, self.stop_at, self.requests, self.failures = False, None, 0, []

    def __call__(self, environ, start_response):
        with self.lock:
            self.requests += 1
            number = self.requests
        clip = environ["REQUEST_METHOD"] == "GET" and environ["PATH_INFO"].endswith(".mp4")
        if clip and self.stop_at is not None and number >= self.stop_at:
            self.stop_at = None
            return self.stops(environ, start_response)
        if self.failing and number % 10 == 0:  # that is 10%
            kind = ("500", "503", "reset")[number // 10 % 3]
            self.failures.append(kind)
            if kind == "reset":
                self.reset(environ["werkzeug.socket"])
            status = 500 if kind == "reset" else kind
            start_response(f"{status} Unwell", [("Content-Length", "0")])
            return [b""]
        return self.app(environ, start_response)

    def stops(self, environ, start_response):
        """In the middle of the answer, for 5 seconds."""
        body = b"".join(self.app(environ, start_response))
        yield body[: len(body) // 2]
        time.sleep(5)
        self.failures.append("stopped")
        yield body[len(body) // 2 :]

    def reset(self, connection):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()


@pytest.fixture(scope="module")
def server():
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log(self, *_):
            pass

    app = Unwell(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    app.url = f"http://127.0.0.1:{server.server_port}"
    yield app
    server.shutdown()


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """Sixty clips of four frames, all different, with their manifest."""
    folder = tmp_path_factory.mktemp("clips")
    rows = []
    for k in range(NUM_CLIPS):
        video = np.random.default_rng(k).integers(0, 256, (4, 16, 16, 3), np.uint8)
        write_video(folder / f"{k:02d} ü.mp4", video, fps=8)
        rows.append({"path": f"{k:02d} ü.mp4", "caption": [f"clip {k}", f"number {k}"]})
    write_manifest(folder / "m.jsonl", rows)
    return folder


@pytest.fixture(autouse=True)
def s3(server, local, monkeypatch):
    """The server as everything finds it, with the clips in s3://clips/all."""
    server.heal()
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # what is tried again is tried by us
    monkeypatch.setattr(media_errors, "_FIRST_PAUSE", 0.05)
    configure(patience=60)
    filesystem, _ = media_store._filesystem("s3://clips")
    if not filesystem.exists("clips"):
        filesystem.mkdir("clips")
        for path in local.iterdir():
            media_store.upload(path, f"s3://clips/all/{path.name}")
    media_store._known.clear()
    return filesystem


def samples(manifest, num_workers=0):
    """All samples of an epoch: by row, video and caption; each once."""
    dataset = ClipDataset(manifest, **SIZE, seed=0, backend="pyav")
    sampler = StepSampler(6, grad_accum=1, rank=0, world_size=1)
    items = iter(ClipLoader(dataset, sampler, workers=num_workers))
    batches = list(itertools.islice(items, NUM_CLIPS // 6))
    items.close()
    assert not [bad for batch in batches for bad in batch["bad"]]
    rows = [row for batch in batches for row in batch["rows"]]
    assert sorted(rows) == list(range(NUM_CLIPS)), "each once"
    return (
        rows,
        torch.cat([b["video"] for b in batches]),
        [c for b in batches for c in b["captions"]],
    )


@pytest.fixture(scope="module")
def expected(local):
    return samples(read_manifest(local / "m.jsonl"))


def assert_same(found, expected):
    assert found[0] == expected[0]
    assert torch.equal(found[1], expected[1])
    assert found[2] == expected[2]


def test_a_bucket_gives_the_same_samples_as_a_folder(expected):
    # In this process; the workers of later tests so have a parent with s3 in use.
    assert_same(samples(read_manifest("s3://clips/all/m.jsonl")), expected)


def test_workers_may_be_spawned(server, local):
    server.failing = True
    names = [f"{k:02d} ü.mp4" for k in range(16)]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = pool.map(probe, [f"s3://clips/all/{name}" for name in names], chunksize=1)
    expected = [replace(probe(local / name), path=f"s3://clips/all/{name}") for name in names]
    assert found == expected
    assert server.failures


def test_a_server_that_fails_and_stops_loses_and_repeats_nothing(server, expected):
    server.failing, server.stop_at = True, 63
    manifest = read_manifest("s3://clips/all/m.jsonl")
    assert_same(samples(manifest, 2), expected)
    assert {"500", "503", "reset", "stopped"} <= set(server.failures)
    assert server.requests > 2 * NUM_CLIPS


def test_without_a_cache(server, expected):
    server.failing = True
    configure(max_bytes=0)
    assert_same(samples(read_manifest("s3://clips/all/m.jsonl")), expected)
    assert len(server.failures) > 5


def test_shards_in_a_bucket(server, local, tmp_path, expected):
    server.failing = True
    done = write_shards("s3://clips/all/m.jsonl", "s3://clips/shards", 100_000)
    assert (done.num_rows, done.bad) == (NUM_CLIPS, [])
    assert done.num_shards > 2
    manifest = read_manifest("s3://clips/shards/manifest.jsonl")
    assert_same(samples(manifest), expected)
    write_shards(local / "m.jsonl", str(tmp_path / "shards"), 100_000)
    for k in range(done.num_shards):
        name = f"{k:05d}.tar"
        assert read_bytes(f"s3://clips/shards/{name}") == (tmp_path / "shards" / name).read_bytes()
    index_shards(["s3://clips/shards/*.tar"], tmp_path / "index.jsonl")
    found = read_manifest(tmp_path / "index.jsonl")
    assert [manifest.locate(row) for row in manifest.rows] == [row.path for row in found.rows]
    assert_same(samples(found), expected)
    assert server.failures


def test_a_changed_object_is_noticed(s3, local, monkeypatch):
    monkeypatch.setattr(media_store, "_FRESH_SECONDS", 0)
    paths = sorted(local.glob("*.mp4"))[:2]
    url = "s3://clips/changing/ü.mp4"
    found = []
    for path in paths:
        other = type(s3)(skip_instance_cache=True)  # as of another process
        other.put_file(str(path), url)
        list(list_media("s3://clips/changing"))  # nor must a listing be remembered
        with VideoReader(url) as reader, VideoReader(path) as reference:
            found.append(reader.read_at([0.0]))
            assert np.array_equal(found[-1], reference.read_at([0.0]))
    assert not np.array_equal(*found)


def test_a_bucket_is_listed(local):
    found = dict(list_media("s3://clips/all"))
    assert len(found) == NUM_CLIPS + 1
    assert found["s3://clips/all/07 ü.mp4"] == (local / "07 ü.mp4").stat().st_size


def test_a_list_that_fails_once_is_asked_for_again(server, monkeypatch):
    app, asked = server.app, []

    def fails_at(number):
        def answer(environ, start_response):
            asked.append(environ["PATH_INFO"])
            if len(asked) != number:
                return app(environ, start_response)
            start_response("503 Slow Down", [("Content-Length", "0")])
            return [b""]

        return answer

    for number in range(1, 6):  # the listing itself is the fourth request
        for pattern, count in (("*.mp4", NUM_CLIPS), ("0*.mp4", 10)):
            asked.clear()
            monkeypatch.setattr(server, "app", fails_at(number))
            assert len(matching(f"s3://clips/all/{pattern}")) == count


def test_mistakes_are_named_at_once(server, s3, monkeypatch):
    for url, reason in [
        ("s3://clips/none.mp4", "no such file"),
        ("s3://nowhere/a.mp4", "no such bucket"),
        ("s3://clips/all", "a directory"),
    ]:
        with pytest.raises(VideoReadError, match=reason):
            VideoReader(url)
    with pytest.raises(OSError, match="s3://nowhere: no such bucket"):
        list(list_media("s3://nowhere"))
    asked = server.requests
    assert asked < 25


def test_a_refusal_is_named_at_once(server, monkeypatch):
    def refuse(environ, start_response):
        asked.append(environ["PATH_INFO"])
        start_response("403 Forbidden", [("Content-Length", "0")])
        return [b""]

    asked = []
    monkeypatch.setattr(server, "app", refuse)
    with pytest.raises(VideoReadError, match="not allowed with these credentials"):
        VideoReader("s3://clips/all/00 ü.mp4")
    assert len(asked) <= 2


def test_a_dead_server_is_given_up(server, monkeypatch):
    configure(patience=1.5)
    monkeypatch.setattr(
        server, "app", lambda e, s: s("503 No", [("Content-Length", "0")]) and [b""]
    )
    with pytest.raises(VideoReadError, match=r"tried [3-9] times in \d s") as error:
        VideoReader("s3://clips/all/00 ü.mp4")
    assert "\n" not in str(error.value)
