"""zoetrope data ingest, from a folder to a manifest and a report."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from data.cli import app
from data.ingest import ingest
from data.ingest_config import IngestConfig, load_ingest_config
from data.ingest_steps import _CLIP, Step, each
from data.ingest_store import Store, local_engine
from data.manifest import read_manifest
from data.video_read import VideoReader
from data.video_write import write_video

MILD = ["filters.min_sharpness=null", "filters.min_width=64", "filters.min_height=64"]


def config(*overrides):
    return load_ingest_config(None, [*MILD, *overrides])


def rows_of(result):
    return [json.loads(line) for line in result.manifest.read_text().splitlines()]


def named(result):
    return {os.path.basename(row["path"]): row for row in rows_of(result)}


def kinds(row):
    return [reason.split(":")[0] for reason in row["drop_reasons"]]


def put(path, video, caption="a caption", fps=20, **how):
    write_video(path, video, fps=fps, **how)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)


@pytest.fixture
def counted(monkeypatch):
    """How many times a media file is opened."""
    opened = []
    original = VideoReader.__init__

    def init(self, path, *rest):
        opened.append(os.fspath(path))
        original(self, path, *rest)

    monkeypatch.setattr(VideoReader, "__init__", init)
    return opened


@pytest.fixture(scope="module")
def raw(tmp_path_factory, pan):
    """A folder of everything, with one clip for each reason to be dropped."""
    root = tmp_path_factory.mktemp("raw")
    put(root / "good.mp4", pan(1, 40))
    put(root / "two shots.mp4", np.concatenate([pan(2, 30), pan(3, 30)]), "one\ntwo\n\n")
    boxed = np.pad(pan(4, 30), ((0, 0), (24, 24), (0, 0), (0, 0)))
    put(root / "boxed.mp4", boxed)
    put(root / "short.mp4", pan(5, 10))
    put(root / "small.mp4", pan(6, 30, height=48, width=62))
    put(root / "slow.mp4", pan(7, 8), fps=4)
    put(root / "silent.mp4", pan(8, 30), None)
    put(root / "frozen.mp4", np.repeat(pan(9, 1), 30, axis=0))
    put(root / "black.mp4", (pan(10, 30) * 0.05).astype(np.uint8))
    rng = np.random.default_rng(0)
    wide = pan(11, 1, height=180, width=300, dx=0)[0]
    shaken = [wide[y : y + 96, x : x + 160] for y, x in rng.integers(0, 8, (40, 2))]
    grey = np.stack(shaken).mean(axis=-1, keepdims=True).repeat(3, axis=-1)  # no cuts in it
    put(root / "shaken.mp4", grey.astype(np.uint8))
    text = pan(12, 30, height=180, width=320)
    for frame in text:
        for k in range(4):
            for colour, thickness in (((0, 0, 0), 5), ((255, 255, 255), 2)):
                where = (8, 36 + 40 * k)
                cv2.putText(frame, "much too much of text", where, 0, 0.8, colour, thickness)
    put(root / "text.mp4", text)
    copy = np.stack([cv2.resize(f, (120, 72), interpolation=cv2.INTER_AREA) for f in pan(1, 40)])
    put(root / "copy.mp4", copy, crf=33)
    Image.fromarray(pan(13, 1)[0]).save(root / "picture.png")
    (root / "picture.json").write_text(json.dumps({"caption": ["a picture", "of colours"]}))
    cut = root / "damaged.mp4"
    put(cut, pan(14, 30))
    cut.write_bytes(cut.read_bytes()[:-2000])
    (root / "empty.mkv").touch()
    (root / "notes.pdf").write_text("no media")
    (root / "lonely.srt").write_text("")
    (root / ".hidden.mp4").write_text("")
    deep = root / "föld er" / "neu\nline"
    deep.mkdir(parents=True)
    put(deep / "ünï ☃.mp4", pan(15, 30), "<b>bold</b> & 'quoted'\u2028snow ☃")
    os.symlink(root, deep / "loop")
    os.symlink(root / "nowhere", root / "broken.mp4")
    os.mkfifo(root / "pipe.mp4")
    return root


@pytest.fixture(scope="module")
def done(raw, tmp_path_factory):
    return ingest(str(raw), tmp_path_factory.mktemp("out") / "set", config(), workers=2)


def test_each_clip_is_kept_or_dropped_for_its_reason(done):
    rows = named(done)
    expected = {
        "boxed.mp4": [],
        "short.mp4": ["too short"],
        "small.mp4": ["too narrow", "too low"],
        "slow.mp4": ["too few frames a second"],
        "silent.mp4": ["no caption"],
        "frozen.mp4": ["too little motion", "too many frozen frames"],
        "black.mp4": ["too little motion", "too much black"],
        "shaken.mp4": ["too jerky"],
        "text.mp4": ["too much text", "too much of a logo"],
        "picture.png": [],
        "damaged.mp4": ["not readable"],
        "empty.mkv": ["not readable"],
        "ünï ☃.mp4": [],
        "good.mp4": [],
    }
    assert {name: kinds(rows[name]) for name in expected} == expected
    assert kinds(rows["copy.mp4"])[0].startswith("duplicate of ")
    assert rows["copy.mp4"]["duplicate_of"].endswith("good.mp4 [0.000-2.000 s]")
    assert "at least 1 is asked for (filters.min_seconds)" in rows["short.mp4"]["drop_reasons"][0]
    assert rows["short.mp4"]["drop_reasons"][0].startswith("too short: 0.5, ")
    for row in rows.values():
        assert row["keep"] == (not row["drop_reasons"])


@pytest.mark.parametrize(
    ("override", "name", "kind"),
    [
        ("filters.max_seconds=1.9", "good.mp4", "too long"),
        ("filters.max_fps=19", "good.mp4", "too many frames a second"),
        ("filters.max_motion=0.01", "good.mp4", "too much motion"),
        ("filters.min_sharpness=1000", "good.mp4", "too blurred"),
        ("filters.max_logo=0.0001", "text.mp4", "too much of a logo"),
    ],
)
def test_the_other_thresholds_drop_too(raw, done, tmp_path, override, name, kind):
    out = tmp_path / "set"
    shutil.copytree(done.manifest.parent, out)
    overrides = ["filters.max_text=null"] if name == "text.mp4" else []
    result = ingest(str(raw), out, config(override, *overrides), workers=0)
    assert kind in kinds(named(result)[name])


def test_shots_bars_captions_and_measures_are_in_the_manifest(done):
    pieces = [row for row in rows_of(done) if row["path"].endswith("two shots.mp4")]
    assert [(row["start"], row["end"]) for row in pieces] == [(0, 1.5), (1.5, 3.0)]
    assert [row["keep"] for row in pieces] == [True, True]
    assert pieces[0]["caption"] == ["one", "two"]
    rows = named(done)
    x, y, width, height = rows["boxed.mp4"]["crop"]
    assert (x, width) == (0, 160)
    assert abs(y - 24) <= 2
    assert abs(height - 96) <= 2
    assert rows["picture.png"]["caption"] == ["a picture", "of colours"]
    assert "start" not in rows["picture.png"]
    measured = ("motion", "jerk", "sharpness", "black", "frozen", "text", "brightness", "hashes")
    assert all(name in rows["black.mp4"] for name in measured)
    assert rows["good.mp4"]["fps"] == 20
    assert rows["good.mp4"]["seconds"] == 2


def test_the_manifest_is_one_that_trains(done):
    manifest = read_manifest(done.manifest)
    assert not manifest.bad
    assert len(manifest.rows) == done.num_kept == 6
    row = next(row for row in manifest.rows if "☃" in row.path)
    assert "neu\nline" in row.path
    assert row.caption == ["<b>bold</b> & 'quoted'", "snow ☃"]
    assert os.path.samefile(manifest.locate(row), os.path.join(manifest.root, row.path))


def test_every_file_seen_is_accounted_for(raw, done):
    seen = set()
    for folder, folders, files in os.walk(raw):
        seen |= {os.path.join(folder, name) for name in files}
        seen |= {os.path.join(folder, name) for name in folders if name == "loop"}
    media = {record["path"] for record in done.source.files}
    sidecars = {path for record in done.source.files for path, _ in record["sidecars"]}
    skipped = dict(done.source.skipped)
    assert media | sidecars | set(skipped) == seen
    assert len(media) + len(sidecars) + len(skipped) == len(seen)
    why = {os.path.basename(path): reason for path, reason in skipped.items()}
    assert why["notes.pdf"] == "neither video nor image"
    assert why["lonely.srt"] == "a sidecar without its media file"
    assert why[".hidden.mp4"] == "hidden"
    assert why["broken.mp4"] == "a broken link"
    assert why["pipe.mp4"] == "not a regular file"
    assert "by a link" in why["loop"]
    assert done.source.skipped_kinds[".mp4"] == 3


def test_the_report_shows_everything_and_escapes_it(done):
    page = done.report.read_text(encoding="utf-8")
    assert "&lt;b&gt;bold&lt;/b&gt; &amp; &#x27;quoted&#x27;" in page
    assert "<b>bold" not in page
    for words in ("Dropped: too jerky (1)", "Duplicates (1)", "Not readable (2)", "the file is empty",
                  "cut off", "notes.pdf", "motion, diagonals per second", "Skipped (6)"):  # fmt: skip
        assert words in page, words
    pictures = set(__import__("re").findall(r'src="([^"]*)"', page))
    assert len(pictures) >= 14
    for name in pictures:
        with Image.open(done.report.parent / name) as picture:
            picture.verify()
    assert page.count("<svg") == page.count("</svg>") == 12


def test_long_sections_are_cut_off_and_say_so(raw, done, tmp_path):
    out = tmp_path / "set"
    shutil.copytree(done.manifest.parent, out)
    result = ingest(str(raw), out, config("report_clips=2"), workers=0)
    page = result.report.read_text(encoding="utf-8")
    assert "<p>4 more, in manifest.jsonl</p>" in page  # of 6 kept


def test_another_threshold_re_selects_without_reading(raw, done, tmp_path, counted):
    out = tmp_path / "set"
    shutil.copytree(done.manifest.parent, out)
    before = rows_of(done)
    result = ingest(str(raw), out, config("filters.min_seconds=0.2"), workers=0)
    assert named(result)["short.mp4"]["keep"]
    assert counted == []
    ingest(str(raw), out, config(), workers=0)
    assert counted == []
    assert [row | {"path": ""} for row in rows_of(result) if row["keep"] != 0] != before
    paths = [os.path.basename(row["path"]) for row in before]
    assert [os.path.basename(row["path"]) for row in rows_of(result)] == paths


def test_another_detector_redoes_that_and_what_follows(raw, done, tmp_path, counted):
    out = tmp_path / "set"
    shutil.copytree(done.manifest.parent, out)
    probed = (out / "steps" / "probe.jsonl").read_bytes()
    result = ingest(str(raw), out, config("scenes.detector=none"), workers=0)
    assert (out / "steps" / "probe.jsonl").read_bytes() == probed
    # The clip that is a new one is looked at by all that follow; the scenes step opens nothing more
    # than each readable video once.
    assert sum(path.endswith("two shots.mp4") for path in counted) == 3
    assert sum(path.endswith("good.mp4") for path in counted) == 1
    whole = [row for row in rows_of(result) if row["path"].endswith("two shots.mp4")]
    assert [(row["start"], row["end"]) for row in whole] == [(0, 3.0)]


def test_a_changed_file_is_read_again_and_only_that(tmp_path, pan, counted):
    src = tmp_path / "src"
    src.mkdir()
    put(src / "a.mp4", pan(1, 30))
    put(src / "b.mp4", pan(2, 30))
    ingest(str(src), tmp_path / "out", config(), workers=0)
    counted.clear()
    put(src / "b.mp4", pan(3, 41))
    result = ingest(str(src), tmp_path / "out", config(), workers=0)
    assert {os.path.basename(path) for path in counted} == {"b.mp4"}
    assert named(result)["b.mp4"]["seconds"] == 2.05
    (src / "b.txt").write_text("other words")
    counted.clear()
    result = ingest(str(src), tmp_path / "out", config(), workers=0)
    assert named(result)["b.mp4"]["caption"] == "other words"
    assert counted == []


def test_results_survive_a_kill(tmp_path, pan):
    """Killed in the middle, and its last line cut off, it goes on, to the same manifest."""
    src = tmp_path / "src"
    src.mkdir()
    for k in range(6):
        put(src / f"{k}.mp4", pan(20 + k, 30, height=192, width=320))
    code = (
        "from pathlib import Path; from data.ingest import ingest; "
        "from data.ingest_config import load_ingest_config as c; import sys; "
        "ingest(sys.argv[1], Path(sys.argv[2]), c(None, sys.argv[3:]), workers=0)"
    )
    out = tmp_path / "killed"
    command = [sys.executable, "-c", code, str(src), str(out), *MILD]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    measured = out / "steps" / "measures.jsonl"
    while process.poll() is None and not (measured.exists() and measured.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    lines = measured.read_bytes().splitlines(keepends=True)
    assert 0 < len(lines) < 6
    measured.write_bytes(b"".join(lines) + b'{"key": "0123", "rec')
    reference = ingest(str(src), tmp_path / "straight", config(), workers=0)
    result = ingest(str(src), out, config(), workers=0)
    assert result.manifest.read_bytes() == reference.manifest.read_bytes()
    again = measured.read_bytes().splitlines(keepends=True)
    assert again[: len(lines)] == lines
    assert len(again) == 7  # the torn one is left standing, and nothing was done twice


def hang(task, _):
    if "hang" in task["path"]:
        time.sleep(100)
    if "die" in task["path"]:
        os._exit(7)
    if "raise" in task["path"]:
        raise KeyError("damaged\nin an odd way")
    return [{"fine": True}]


def test_a_step_that_hangs_dies_or_raises_is_a_record(tmp_path):
    names = ["a.mp4", "hang.mp4", "die.mp4", "raise.mp4", "b.mp4"]
    records = [{"path": name} for name in names]
    # Spawned workers import functions by name, which those of tests have not.
    sys.modules.setdefault("ingest_hang", sys.modules[__name__])
    code = tmp_path / "ingest_hang.py"
    import inspect

    code.write_text(f"import os, time\n{inspect.getsource(hang)}")
    sys.path.insert(0, str(tmp_path))
    try:
        sys.modules.pop("ingest_hang")
        import ingest_hang

        step = Step("odd", each(ingest_hang.hang), ("path",), None)
        store = Store(tmp_path)
        result = store.run(step, records, local_engine(2), time_limit=1.0)
        reasons = [record.get("error", "") for record in result]
        assert [record["path"] for record in result] == names
        assert reasons[0] == reasons[4] == ""
        assert "longer than 1 s" in reasons[1]
        assert "exit code 7" in reasons[2]
        assert reasons[3] == "KeyError: 'damaged\\nin an odd way'"
        assert [record.get("failed") for record in result] == [None, "odd", "odd", "odd", None]
        # What failed is not tried again, unless asked for.
        mended = Step("odd", each(lambda task, _: [{"fine": 2}]), ("path",), None)
        same = store.run(mended, records, local_engine(0), None)
        assert [r.get("error", "") for r in same] == reasons
        retried = Store(tmp_path, retry=True).run(mended, records, local_engine(0), None)
        assert [record["fine"] for record in retried] == [True, 2, 2, 2, True]
    finally:
        sys.path.remove(str(tmp_path))


def test_a_manifest_as_source(tmp_path, pan):
    put(tmp_path / "a b.mp4", np.concatenate([pan(1, 40), pan(2, 40)]), None)
    rows = [
        {"path": "a b.mp4", "caption": "from a column", "source": "mine", "motion": "fast"},
        {"path": "a b.mp4", "caption": ["x", "y"], "start": 1.0, "end": 3.0},
        {"path": "missing.mp4", "caption": "gone"},
        {"caption": "no path"},
        {"path": "a b.mp4", "start": 3, "end": 2},
    ]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "oops\n")
    result = ingest(
        str(tmp_path / "list.jsonl"),
        tmp_path / "out",
        config("duplicates.max_distance=null"),
        workers=0,
    )
    found = [(r["path"], r.get("start"), r.get("end"), r.get("caption")) for r in rows_of(result)]
    assert found[:4] == [
        ("../a b.mp4", 0, 2, "from a column"),
        ("../a b.mp4", 2, 4, "from a column"),
        ("../a b.mp4", 1, 2, ["x", "y"]),
        ("../a b.mp4", 2, 3, ["x", "y"]),
    ]
    first = rows_of(result)[0]
    assert first["source"] == "mine"
    assert isinstance(first["motion"], float)
    assert rows_of(result)[4]["drop_reasons"] == ["not readable: no such file"]
    assert [reason for _, reason in result.source.skipped] == [
        "no path",
        "end=2 is not after start=3",
        "not JSON",
    ]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_other_manifests_and_single_files(tmp_path, pan, suffix):
    from data.manifest import write_manifest

    put(tmp_path / "a.mp4", pan(1, 30), "beside it")
    write_manifest(tmp_path / f"list{suffix}", [{"path": "a.mp4", "caption": "of the list"}])
    result = ingest(str(tmp_path / f"list{suffix}"), tmp_path / "out", config(), workers=0)
    assert rows_of(result)[0]["caption"] == ["of the list", "beside it"]
    result = ingest(str(tmp_path / "a.mp4"), tmp_path / "one", config(), workers=0)
    assert [row["caption"] for row in rows_of(result)] == ["beside it"]


def test_a_bucket_as_source(tmp_path, pan):
    import fsspec

    put(tmp_path / "a.mp4", pan(1, 30), "in a bucket")
    files = fsspec.filesystem("memory")
    for name in ("a.mp4", "a.txt"):
        files.pipe_file(f"/ingest/deep/{name}", (tmp_path / name).read_bytes())
    files.pipe_file("/ingest/readme.md", b"words")
    result = ingest("memory://ingest", tmp_path / "out", config(), workers=0)
    (row,) = rows_of(result)
    assert row["path"] == "memory:///ingest/deep/a.mp4"
    assert (row["caption"], row["keep"]) == ("in a bucket", True)
    assert [reason for _, reason in result.source.skipped] == ["neither video nor image"]
    rows = b'{"path": "deep/a.mp4", "caption": "in a list"}\n'
    files.pipe_file("/ingest/list.jsonl", rows)
    result = ingest("memory://ingest/list.jsonl", tmp_path / "other", config(), workers=0)
    (row,) = rows_of(result)
    assert row["path"] == "memory://ingest/deep/a.mp4"
    assert (row["caption"], row["keep"]) == ("in a list", True)


def test_odd_values_of_a_manifest_stop_nothing(tmp_path, pan):
    put(tmp_path / "a.mp4", pan(1, 30), None)
    (tmp_path / "a.json").write_text('"half a pair \\ud83d"')
    lines = ['{"path": "a.mp4", "note": "\\udc00", "score": NaN, "deep": {"x": [1, null]}}']
    lines += ['{"path": "nul\\u0000.mp4", "caption": "x"}', '{"path": "\\ud800.mp4"}', "[1]"]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    result = ingest(str(tmp_path / "list.jsonl"), tmp_path / "out", config(), workers=1)
    rows = rows_of(result)
    assert [row["keep"] for row in rows] == [True, False, False]
    assert rows[0]["caption"] == "half a pair ?"
    assert (rows[0]["note"], rows[0]["deep"]) == ("?", {"x": [1, None]})
    assert all("not readable" in kinds(row) for row in rows[1:])


def test_results_inside_the_source_are_not_ingested(tmp_path, pan):
    put(tmp_path / "a.mp4", pan(1, 30))
    for _ in range(2):
        result = ingest(str(tmp_path), tmp_path / "out", config(), workers=0)
        assert len(rows_of(result)) == 1


def test_the_command(tmp_path, pan):
    put(tmp_path / "a.mp4", pan(1, 30))
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"filters": {"min_sharpness": None}}))
    arguments = ["ingest", str(tmp_path / "a.mp4"), str(tmp_path / "out"), "--workers", "1"]
    arguments += ["--config", str(tmp_path / "mine.yaml"), "filters.min_height=64"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "1 files, 1 clips, 1 kept" in result.output
    result = CliRunner().invoke(app, [*arguments, "filters.min_seconds=9"])
    assert result.exit_code == 1
    assert "too short" in result.output


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ({"src": "nowhere"}, FileNotFoundError, "nothing at"),
        ({"src": "empty"}, ValueError, "no video or image in"),
        ({"engine": "slurm"}, ValueError, "expected local or ray"),
        ({"address": "auto"}, ValueError, "use it with --engine ray"),
        ({"workers": -1}, ValueError, "must not be negative"),
    ],
)
def test_mistakes_are_named(tmp_path, how, kind, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.doc").touch()
    (tmp_path / "one.png").touch()
    src = str(tmp_path / how.pop("src", "one.png"))
    with pytest.raises(kind, match=message):
        ingest(src, tmp_path / "out", config(), **how)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("filters: {min_motoin: 1}", "filters.min_motoin: unknown key"),
        ("scenes: {detector: magic}", "scenes.detector: got 'magic', expected 'content'"),
        ("captions: {recaption: true}", "captions: recaption is true, but there is no captioner"),
        ("captions: {captioner: {}}", "captions.captioner.model: missing"),
        ("- 1", "expected keys and values, got list"),
        ("a: [", "not valid YAML"),
    ],
)
def test_mistakes_in_the_config_are_named(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"c\.yaml") as error:
        load_ingest_config(tmp_path / "c.yaml")
    assert message in str(error.value)


def test_the_example_config_is_the_default():
    assert load_ingest_config("configs/ingest.yaml") == IngestConfig()
    assert (
        load_ingest_config("configs/ingest.yaml", ["filters.max_seconds=3"]).filters.max_seconds
        == 3
    )
    with pytest.raises(ValueError, match=r"expected section\.key=value"):
        load_ingest_config(None, ["filters"])


def test_the_columns_of_the_steps_name_a_clip():
    assert {"path", "version", "start", "end"} <= set(_CLIP)
