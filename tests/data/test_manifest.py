import csv
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.manifest import read_manifest, write_manifest

GOOD = {"path": "a.mp4", "caption": "a red circle"}


def jsonl(path, *lines):
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n")
    return path


def test_rows_are_read(tmp_path):
    path = jsonl(
        tmp_path / "m.jsonl",
        GOOD | {"start": 1, "end": 2.5, "fps": 8, "state": {"seed": [1, 2]}},
        "",
        {"path": "b.mp4", "caption": ["one", "two"]},
    )
    manifest = read_manifest(path)
    first, second = manifest.rows
    assert (first.path, first.captions, first.start, first.end) == (
        "a.mp4",
        ["a red circle"],
        1.0,
        2.5,
    )
    assert first.model_extra == {"fps": 8, "state": {"seed": [1, 2]}}
    assert second.captions == ["one", "two"]
    assert (manifest.lines, manifest.bad, manifest.root) == ([1, 3], [], tmp_path)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_every_format_is_a_round_trip(tmp_path, suffix):
    rows = [
        GOOD | {"start": 0.5, "end": 2.0, "num_frames": 9, "has_audio": True, "tag": 'a, "b"\nc'},
        {"path": "017", "caption": "12", "num_frames": 17, "has_audio": False, "tag": "x"},
        {"path": "c.mp4", "caption": "ünï — 例", "num_frames": 5},
    ]
    path = tmp_path / f"m.{suffix}"
    write_manifest(path, rows)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    manifest = read_manifest(path)
    assert manifest.bad == []
    read = [row.model_dump(exclude_none=True) for row in manifest.rows]
    assert read == rows


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_lists_of_captions_are_a_round_trip(tmp_path, suffix):
    path = tmp_path / f"m.{suffix}"
    write_manifest(path, [{"path": "a", "caption": ["x", "y, z"]}, {"path": "b", "caption": "w"}])
    assert [row.captions for row in read_manifest(path).rows] == [["x", "y, z"], ["w"]]


text = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(text, text, st.lists(text, max_size=3)), min_size=1, max_size=4))
@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_any_text_survives(tmp_path, suffix, rows):
    written = [
        {"path": path.strip() or "p", "caption": [caption.strip() or "c", *more], "n": 1}
        for path, caption, more in rows
        if all(wording.strip() for wording in more)
    ]
    if written:
        path = tmp_path / f"m.{suffix}"
        write_manifest(path, written)
        assert [row.model_dump(exclude_none=True) for row in read_manifest(path).rows] == written


BAD_ROWS = [
    ({"path": "a.mp4"}, "no caption"),
    ({"caption": "x"}, "no path"),
    ({"path": "a.mp4", "caption": None}, "no caption"),
    (GOOD | {"path": 3}, "path: expected text, not empty, got 3"),
    (GOOD | {"path": ""}, "path: expected text, not empty, got ''"),
    (GOOD | {"caption": "  "}, "caption: expected text, or a list of texts, not empty, got '  '"),
    (GOOD | {"caption": []}, "caption: expected text, or a list of texts, not empty, got []"),
    (GOOD | {"caption": ["a", ""]}, "caption: expected text, or a list"),
    (GOOD | {"caption": ["a", 3]}, "caption: expected text, or a list"),
    (GOOD | {"start": -1}, "start: expected seconds, 0 or more, got -1"),
    (GOOD | {"start": "soon"}, "start: expected seconds, 0 or more, got 'soon'"),
    (GOOD | {"start": 2, "end": 2}, "end=2 is not after start=2"),
    (GOOD | {"end": 0}, "end=0 is not after start=0"),
    (GOOD | {"end": float("inf")}, "end: expected seconds, got inf"),
    ("{not json", "not JSON: Expecting property name"),
    ("[1, 2]", "expected a JSON object, got list"),
    ("null", "expected a JSON object, got NoneType"),
    ("[" * 100000, "not JSON"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS)
def test_a_bad_row_is_named_and_left_out(tmp_path, row, reason):
    manifest = read_manifest(jsonl(tmp_path / "m.jsonl", GOOD, row, GOOD))
    assert (len(manifest.rows), manifest.lines) == (2, [1, 3])
    ((line, found),) = manifest.bad
    assert line == 2
    assert found.startswith(reason)
    assert "\n" not in found


def test_bytes_that_are_not_text_spoil_their_row_only(tmp_path):
    path = tmp_path / "m.jsonl"
    good = json.dumps(GOOD).encode()
    path.write_bytes(b"\xef\xbb\xbf" + good + b"\n\xff\xfe{}\n" + good)
    manifest = read_manifest(path)
    assert (manifest.lines, manifest.bad) == ([1, 3], [(2, "not UTF-8 text")])


def test_csv_cells(tmp_path):
    path = tmp_path / "m.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "caption", "start", "end", "n", "note"])
        writer.writerow(["a.mp4", "a cat", "", "2.5", "9", "null"])
        writer.writerow(["b.mp4", '["a cat", "a dog"]', "1", "", "", "two\nlines"])
        writer.writerow(["c.mp4", "", "", "", "", ""])
        writer.writerow(["d.mp4", "x", "2", "1", "", ""])
        writer.writerow(["e.mp4", "a", "b", "c", "d", "e", "too many"])
        writer.writerow(["f.mp4", "[draft] a cat"])
    manifest = read_manifest(path)
    a, b, f = manifest.rows
    assert (a.start, a.end, a.model_extra) == (None, 2.5, {"n": 9, "note": "null"})
    assert (b.captions, b.start, b.end) == (["a cat", "a dog"], 1.0, None)
    assert b.model_extra == {"note": "two\nlines"}
    assert f.captions == ["[draft] a cat"]
    assert manifest.lines == [2, 4, 8]
    assert manifest.bad == [
        (5, "no caption"),
        (6, "end=1 is not after start=2"),
        (7, "more cells than the 6 columns: quote commas"),
    ]


def test_nan_is_missing_in_parquet(tmp_path):
    path = tmp_path / "m.parquet"
    write_manifest(path, [GOOD | {"start": float("nan"), "end": 1.0}, GOOD | {"end": None}])
    assert [(row.start, row.end) for row in read_manifest(path).rows] == [(None, 1.0), (None, None)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.jsonl", b"", "none of its 0 rows can be used"),
        ("m.jsonl", b'{"path": "a"}\n{}\n', "none of its 2 rows can be used; line 1: no caption"),
        ("m.csv", b"path,caption\n", "none of its 0 rows"),
        ("m.csv", b"path\na.mp4\n", "none of its 1 rows can be used; line 2: no caption"),
        ("m.csv", b'path,caption\na.mp4,"open\n', "is not CSV"),
        ("m.csv", b"path,caption\n\xff\xfe,b\n", "not UTF-8 text at byte 13"),
        ("m.parquet", b"nonsense", "not readable as Parquet"),
        ("m.txt", b"x", r"expected one of .jsonl, .csv, .parquet, got '.txt'"),
    ],
)
def test_a_useless_manifest_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_manifest(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_missing_manifest(tmp_path):
    with pytest.raises(FileNotFoundError, match="no manifest at"):
        read_manifest(tmp_path / "m.jsonl")


def test_paths_start_at_the_manifest(tmp_path):
    rows = [GOOD, GOOD | {"path": "/abs/b.mp4"}, GOOD | {"path": "s3://bucket/c.mp4"}]
    manifest = read_manifest(jsonl(tmp_path / "m.jsonl", *rows))
    assert [manifest.locate(row) for row in manifest.rows] == [
        str(tmp_path / "a.mp4"),
        "/abs/b.mp4",
        "s3://bucket/c.mp4",
    ]


def test_the_fingerprint_follows_the_rows(tmp_path):
    def fingerprint(name, *rows):
        (tmp_path / name).mkdir(exist_ok=True)
        return read_manifest(jsonl(tmp_path / name / "m.jsonl", *rows)).fingerprint()

    other = GOOD | {"caption": "b"}
    same = fingerprint("x", GOOD, other)
    assert fingerprint("y", GOOD, other) == same
    assert len({same, fingerprint("y", other, GOOD), fingerprint("y", GOOD)}) == 3
    assert fingerprint("y", GOOD, other | {"end": 3}) != same
    assert fingerprint("y", GOOD, other | {"extra": 3}) != same


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "m.jsonl"
    write_manifest(path, [GOOD])

    def rows():
        yield GOOD
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_manifest(path, rows())
    assert len(read_manifest(path).rows) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["m.jsonl"]


def test_what_parquet_cannot_hold_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not writable as Parquet"):
        write_manifest(tmp_path / "m.parquet", [GOOD | {"n": 1}, GOOD | {"n": "x"}])
    with pytest.raises(ValueError, match="expected one of"):
        write_manifest(tmp_path / "m.json", [GOOD])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_rows_that_say_so_are_left_out_on_purpose(tmp_path, suffix):
    path = tmp_path / f"m.{suffix}"
    rows = [
        GOOD | {"keep": True, "drop_reasons": []},
        GOOD | {"path": "b.mp4", "keep": False, "drop_reasons": ["too dark", "no caption"]},
        {"path": "c.mp4", "caption": None, "keep": False, "drop_reasons": []},
    ]
    write_manifest(path, rows)
    manifest = read_manifest(path)
    assert [row.path for row in manifest.rows] == ["a.mp4"]
    assert manifest.bad == []
    assert [why for _, why in manifest.dropped] == [
        "b.mp4: too dark; no caption",
        "c.mp4: no reason given",
    ]
    jsonl(tmp_path / "none.jsonl", rows[1])
    with pytest.raises(ValueError, match=r"none of its 1 rows can be used; 1 say keep: false"):
        read_manifest(tmp_path / "none.jsonl")
    mistaken = read_manifest(jsonl(tmp_path / "n.jsonl", GOOD, GOOD | {"keep": "no"}))
    assert mistaken.bad == [(2, "keep: expected true or false, got 'no'")]


def test_crops_are_four_numbers(tmp_path):
    rows = [GOOD | {"crop": [0, 12, 64, 36]}, GOOD | {"crop": [0, 0, 0, 5]}, GOOD | {"crop": "all"}]
    manifest = read_manifest(jsonl(tmp_path / "m.jsonl", *rows))
    assert [row.crop for row in manifest.rows] == [(0, 12, 64, 36)]
    reasons = [why for _, why in manifest.bad]
    assert all(why.startswith("crop: expected [x, y, width, height] in pixels") for why in reasons)


def test_columns_and_slices(tmp_path):
    rows = [GOOD | {"width": 64, "start": 1}, {"path": "b.PNG", "caption": "b", "width": "wide"}]
    manifest = read_manifest(jsonl(tmp_path / "m.jsonl", *rows, GOOD | {"width": True}))
    assert np.array_equal(manifest.column("width"), [64, np.nan, np.nan], equal_nan=True)
    assert np.array_equal(manifest.column("start"), [1, np.nan, np.nan], equal_nan=True)
    assert manifest.images.tolist() == [False, True, False]
    part = manifest.rows[1:]
    assert [row.path for row in part] == ["b.PNG", "a.mp4"]
    assert part.column("width").shape == (2,)
    assert manifest.rows[-1].path == "a.mp4"
    with pytest.raises(IndexError):
        manifest.rows[3]


def test_names_that_are_no_text(tmp_path):
    name = b"caf\xe9.mp4".decode("utf-8", "surrogateescape")
    lines = [GOOD | {"note": name, "none": None}, GOOD | {"path": name}]
    manifest = read_manifest(jsonl(tmp_path / "m.jsonl", *lines))
    (row,) = manifest.rows
    assert row.model_extra == {"note": name}
    assert manifest.bad == [(2, r"path: not Unicode text, got 'caf\udce9.mp4'; rename the file")]
