import base64
import json
from html.parser import HTMLParser

import numpy as np
import pytest

from eval.report import ReportVideo, read_log, write_report
from eval.tables import Table
from sample.sheet import contact_sheet

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Collects tags, sources and text, and checks that every tag is closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.sources, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for key, value in attrs if key == "src"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data.strip())


def parse(path):
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    assert page.open == []
    return page


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "log.jsonl"
    rows = [{"step": k, "loss": 1 / (k + 1), "note": "x", "lr": 1.0} for k in range(40)]
    path.write_text("\n".join(json.dumps(row) for row in rows) + '\n{"step": 40, "lo')
    return path


def test_the_page_is_whole_and_carries_everything(tmp_path, log):
    small, big = tmp_path / "a.mp4", tmp_path / "videos" / "b.mp4"
    big.parent.mkdir()
    small.write_bytes(b"small video")
    big.write_bytes(b"b" * 2000)
    sheet = contact_sheet(tmp_path / "sheet.png", [np.zeros((2, 8, 8, 3), np.uint8)], ["x"])
    path = write_report(
        tmp_path / "out" / "report.html",
        title="A <demo>",
        intro="Level 1 & more",
        videos={"Held-out": [ReportVideo(small, 'a "red" <b>circle</b>'), ReportVideo(big, "two")]},
        tables=[Table("World", ["figure", "generated"], [["colour", "0.98 <1>"]], facts="N=200")],
        logs={"The VAE": log},
        picture=sheet,
        max_embedded_bytes=1000,
    )
    page = parse(path)
    assert {"title", "video", "table", "img"} <= set(page.tags)
    assert "b" not in page.tags  # the prompt's markup is text
    for text in ("A <demo>", 'a "red" <b>circle</b>', "0.98 <1>", "N=200", "colour"):
        assert text in page.text
    embedded = [s for s in page.sources if s.startswith("data:")]
    assert base64.b64decode(embedded[0].split(",")[1]) == b"small video"
    assert "../videos/b.mp4" in page.sources
    svg = next(s for s in embedded if "svg" in s)
    assert b"</svg>" in base64.b64decode(svg.split(",")[1])
    assert "image-rendering: pixelated" in path.read_text()
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_a_report_without_curves_or_videos_still_parses(tmp_path):
    empty = tmp_path / "log.jsonl"
    empty.write_text("")
    page = parse(write_report(tmp_path / "r.html", title="t", logs={"none": empty}))
    assert "img" not in page.tags


def test_a_log_cut_off_by_a_crash_is_read_and_garbage_is_refused(tmp_path, log):
    assert len(read_log(log)) == 40
    log.write_text('{"step": 1}\nnot json\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 2: not JSON"):
        read_log(log)
    log.write_text('[1]\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 1: got '\\[1\\]'"):
        read_log(log)


def test_a_missing_video_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.mp4"):
        write_report(
            tmp_path / "r.html",
            title="t",
            videos={"x": [ReportVideo(tmp_path / "gone.mp4", "p")]},
        )
    assert not (tmp_path / "r.html").exists()
