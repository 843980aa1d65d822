"""The loader: the same batches from any number of workers, and files that hang or kill their worker."""

import multiprocessing
import os
import signal
import time
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pytest
import torch

from data.loader import QUARANTINED, ClipLoader
from data.video_file import VideoReadError


@dataclass(frozen=True)
class Request:
    """A file that behaves as its name says."""

    g: int
    path: str
    is_here: bool = False
    references: tuple[str, ...] = ()

    @property
    def name(self):
        return self.path

    def read(self, note=None, /):
        behave(self.path)
        for path in self.references:
            note(path)
            behave(path)
        return torch.full((2,), self.g)


def behave(path):
    kind = path.split("-")[0]
    if kind == "hang":
        time.sleep(600)
    if kind == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind == "bad":
        raise VideoReadError(path, "damaged")
    if kind == "wrong":
        raise KeyError("a mistake of the program")
    if kind == "slow":
        time.sleep(0.2)


class Files:
    """Sample g is of file g modulo their number; a bad one is replaced by the next."""

    def __init__(self, *paths, here=False, references=None):
        self.paths, self.here, self.references = paths, here, references or {}

    def request(self, g, bad=()):
        if len(bad) > 5:
            raise ValueError("too many in a row")
        path = self.paths[(g + len(bad)) % len(self.paths)]
        return Request(g, path, self.here, self.references.get(path, ()))

    def sample(self, request, value, bad):
        return {"value": value, "path": request.path, "bad": list(bad), "g": request.g}

    def collate(self, samples):
        return {
            "value": torch.stack([sample["value"] for sample in samples]),
            "g": [sample["g"] for sample in samples],
            "paths": [sample["path"] for sample in samples],
            "bad": [entry for sample in samples for entry in sample["bad"]],
        }


def endless(size=3):
    first = 0
    while True:
        yield list(range(first, first + size))
        first += size


def take(count, dataset, batches=None, **options):
    items = iter(ClipLoader(dataset, batches or endless(), **options))
    try:
        return list(islice(items, count))
    finally:
        items.close()


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_are_those_of_one_process_in_order(workers):
    files = Files("slow-0", "good-1", "bad-2", "good-3", "good-4")
    expected, found = take(8, files), take(8, files, workers=workers, prefetch=3)
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one.pop("value"), other.pop("value"))
        assert one == other
    assert [number for batch in found for number in batch["g"]] == list(range(24))


def test_a_file_that_hangs_and_one_that_crashes_are_replaced_and_named_once_tried():
    files = Files("good-0", "hang-1", "good-2", "crash-3", "good-4")
    quarantine = {}
    began = time.monotonic()
    found = take(5, files, workers=2, file_seconds=2.0, quarantine=quarantine)
    assert [number for batch in found for number in batch["g"]] == list(range(15))
    paths = [path for batch in found for path in batch["paths"]]
    assert paths == ["good-0", "good-2", "good-2", "good-4", "good-4"] * 3
    reasons = {path: why for batch in found for path, why in batch["bad"]}
    assert reasons == quarantine
    assert reasons["hang-1"] == f"{QUARANTINED}it took longer than 2 s"
    assert (
        reasons["crash-3"] == f"{QUARANTINED}the process that read it died twice, of signal SIGSEGV"
    )
    # Three times each in the stream, and only the first met the file, which the rest of a run knows.
    assert time.monotonic() - began < 60
    again = take(5, files, workers=0, quarantine=quarantine)  # which would hang without it
    assert [path for batch in again for path in batch["paths"]] == paths


def test_of_a_clip_with_pictures_the_file_that_hangs_is_quarantined():
    pictures = {"good-0": ("good-9", "hang-8"), "good-1": ("good-9",), "good-2": ("hang-8",)}
    files, quarantine = Files("good-0", "good-1", "good-2", references=pictures), {}
    found = take(2, files, workers=1, file_seconds=2.0, quarantine=quarantine)
    assert [path for batch in found for path in batch["paths"]] == ["good-1"] * 6
    reason = f"{QUARANTINED}it took longer than 2 s (its reference hang-8)"
    assert quarantine == {"hang-8": reason}
    assert {entry for batch in found for entry in batch["bad"]} == {
        ("good-0", reason),
        ("good-2", reason),
    }


def test_what_is_in_memory_does_not_go_to_a_worker():
    found = take(2, Files("good-0", "bad-1", here=True), workers=1)
    assert [batch["paths"] for batch in found] == [["good-0"] * 3] * 2


def test_finite_batches_end():
    batches = [[0, 1], [2]]
    assert [b["g"] for b in take(9, Files("good-0"), batches, workers=2)] == batches
    assert [b["g"] for b in take(9, Files("good-0"), batches)] == batches


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_reach_the_one_who_asks(workers):
    with pytest.raises(KeyError, match="mistake of the program"):
        take(2, Files("wrong-0"), workers=workers)
    with pytest.raises(ValueError, match="too many in a row"):
        take(2, Files("bad-0"), workers=workers)


def test_good_batches_come_before_an_error():
    items = iter(ClipLoader(Files(*["good-0"] * 7, "wrong-7"), endless(), workers=1, prefetch=3))
    assert next(items)["g"] == [0, 1, 2]
    assert next(items)["g"] == [3, 4, 5]
    with pytest.raises(KeyError):
        next(items)


def test_no_more_is_read_ahead_than_asked_for():
    asked = []

    class Counting(Files):
        def request(self, g, bad=()):
            asked.append(g)
            return super().request(g, bad)

    items = iter(ClipLoader(Counting("good-0"), endless(), workers=1, prefetch=2))
    next(items)
    time.sleep(1.0)
    assert max(asked) < 9  # the batch that was taken, and two more
    items.close()


def test_its_processes_end_with_it():
    items = iter(ClipLoader(Files("good-0"), endless(), workers=2))
    next(items)
    assert multiprocessing.active_children()
    del items
    assert not multiprocessing.active_children()
    items = iter(ClipLoader(Files("good-0", "hang-1"), endless(1), workers=2))
    next(items)
    items.close()  # while a worker hangs
    assert not multiprocessing.active_children()


def test_bad_numbers_are_refused():
    for options in ({"workers": -1}, {"prefetch": 0}, {"file_seconds": 0.0}):
        with pytest.raises(ValueError, match="expected workers"):
            ClipLoader(Files("good-0"), endless(), **options)


def test_arrays_arrive_writable():
    (batch,) = take(1, Files("good-0"), workers=1)
    assert isinstance(batch["value"], torch.Tensor)
    assert np.asarray(batch["value"]).flags.writeable
