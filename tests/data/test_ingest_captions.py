"""Captions that people wrote, beside their files."""

import json

import pytest

from data.ingest_captions import subtitles, written_captions

SRT = """\ufeff1
00:00:01,000 --> 00:00:02,500
<i>First</i> words,
on two lines

2
00:00:02,600 --> 00:00:04,000 X1:10
{\\an8}second <b>words</b> &amp; 1 < 2

3
01:00:00.5 --> 01:00:01.25
much later
4
"""


def sidecar(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return [[str(path), "1"]]


def captions(tmp_path, name, data, start=0.0, end=10.0, column=None):
    return written_captions(column, sidecar(tmp_path, name, data), start, end)


def test_subtitles_have_times_and_no_markup():
    found = list(subtitles(SRT.replace("\n", "\r\n")))
    assert found[0] == (1.0, 2.5, "First words, on two lines")
    assert found[1] == (2.6, 4.0, "second words &amp; 1 < 2")
    assert found[2][:2] == (3600.5, 3601.25)
    assert found[2][2].startswith("much later")


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (0.0, 2.5, ["First words, on two lines"]),
        (2.5, 2.6, []),
        (0.0, 3.0, ["First words, on two lines second words &amp; 1 < 2"]),
        (3.9, 9.0, ["second words &amp; 1 < 2"]),
        (5.0, 9.0, []),
    ],
)
def test_a_clip_has_the_subtitles_of_its_own_time(tmp_path, start, end, expected):
    assert captions(tmp_path, "a.srt", SRT, start, end) == (expected, [])


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.txt", "one\n\n  two  \r\none\n", ["one", "two"]),
        ("a.txt", "\ufeffwith a mark", ["with a mark"]),
        ("a.txt", "", []),
        ("a.json", '"just a text"', ["just a text"]),
        ("a.json", '["one", "two"]', ["one", "two"]),
        ("a.json", '{"caption": "one", "score": 3}', ["one"]),
        ("a.JSON", '{"captions": ["one\\nline", "☃"]}', ["one\nline", "☃"]),
    ],
)
def test_forms_of_sidecars(tmp_path, name, data, expected):
    assert captions(tmp_path, name, data) == (expected, [])


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("a.txt", b"\xff\xfe\x00", "not UTF-8 text at byte 0"),
        ("a.json", "{", "Expecting"),
        ("a.json", "[" * 100_000, "not JSON that anybody wrote"),
        ("a.json", '{"label": 1}', "expected a text, a list of texts"),
        ("a.json", "[1, 2]", "expected a text, a list of texts"),
    ],
)
def test_unusable_sidecars_are_named_and_cost_no_other_caption(tmp_path, name, data, problem):
    found, problems = captions(tmp_path, name, data, column=["of the column"])
    assert found == ["of the column"]
    (said,) = problems
    assert said.startswith(f"{name}: ")
    assert problem in said


def test_columns_come_first_and_nothing_comes_twice(tmp_path):
    files = sidecar(tmp_path, "a.txt", "b\na") + sidecar(tmp_path, "a.json", json.dumps("c"))
    assert written_captions("a", files, 0, 1) == (["a", "b", "c"], [])
    assert written_captions(None, [], 0, 1) == ([], [])
    assert written_captions(3, [], 0, 1)[1][0].startswith("caption: expected a text")
