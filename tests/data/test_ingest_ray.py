"""The ingest through Ray Data on a local Ray of two workers, which is started once."""

import json
import os

import pytest
from PIL import Image

from data.ingest import ingest
from data.ingest_config import load_ingest_config
from data.ray_engine import ray_engine
from data.video_write import write_video

ray = pytest.importorskip("ray")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1"])
def test_no_cluster_at_the_address(address):
    assert not ray.is_initialized()
    with (
        pytest.raises(ConnectionError, match="no Ray cluster answers there"),
        ray_engine(address, 1),
    ):
        pass


@pytest.fixture(scope="module")
def cluster():
    ray.init(
        num_cpus=2,
        object_store_memory=80 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
    )
    yield
    ray.shutdown()


def test_the_manifest_is_that_of_the_local_engine(cluster, tmp_path, pan):
    src = tmp_path / "src é"
    src.mkdir()
    for k in range(4):
        write_video(src / f"{k}\n☃.mp4", pan(60 + k // 2, 30, dx=1 + k % 2), fps=20)
        (src / f"{k}\n☃.txt").write_text(f"caption {k} ☃")
    cut = src / "0\n☃.mp4"
    (src / "cut.mp4").write_bytes(cut.read_bytes()[:-500])
    (src / "copy.mp4").write_bytes(cut.read_bytes())
    Image.fromarray(pan(70, 1)[0]).save(src / "p.png")
    config = load_ingest_config(None, ["filters.min_sharpness=null", "filters.min_height=64"])
    local = ingest(str(src), tmp_path / "local", config, workers=2)
    ours = ingest(str(src), tmp_path / "ray", config, engine="ray", workers=2)
    assert ours.manifest.read_bytes() == local.manifest.read_bytes()
    rows = [json.loads(line) for line in local.manifest.read_text().splitlines()]
    assert len({row["keep"] for row in rows}) == 2
    assert ray.is_initialized()  # a Ray that was there before is left running
    pages = [result.report.read_text() for result in (local, ours)]
    assert pages[0] == pages[1]


def test_a_task_that_kills_its_process_takes_no_other_with_it(cluster):
    tasks = ["'a'", "__import__('os')._exit(3)", "'b'", "'c'"]
    with ray_engine(None, 2) as run:
        outcomes = dict(run(eval, tasks, is_model=False, time_limit=60.0))
    assert "exit code 3" in outcomes.pop(1).reason
    assert outcomes == {0: "a", 2: "b", 3: "c"}


def test_a_model_runs_in_a_process_that_keeps_it(cluster):
    with ray_engine(None, 2) as run:
        outcomes = dict(
            run(eval, ["__import__('os').getpid()"] * 3, is_model=True, time_limit=None)
        )
    assert len(outcomes) == 3
    assert len(set(outcomes.values()) - {os.getpid()}) == 1
