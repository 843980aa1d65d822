"""Ranks that differ are named; ranks that read each other's samples too."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice

import pytest
import torch
from torch.distributed import DistNetworkError, HashStore

from data.dataset import StepSampler
from sample.processes import _agree_on_name
from train import agreement
from train.agreement import check_disjoint, check_program, check_same, code_version, ranks_text
from train.config_file import load_config


@dataclass
class Group:
    """Ranks of one process: `gather` gives what the others would, from functions of the rank."""

    world_size: int = 4
    rank: int = 0
    context: int = 1
    odd: tuple = ()  # ranks that have something else
    device = torch.device("cpu")

    @property
    def is_main(self):
        return self.rank == 0

    def gather(self, value):
        return [self.other(value) if rank in self.odd else value for rank in range(self.world_size)]

    def other(self, value):
        if isinstance(value, tuple):  # host and value
            return ("elsewhere", self.other(value[1]))
        if isinstance(value, dict):
            return {key: self.other(nested) for key, nested in value.items()}
        return f"not {value}"


def test_same_parts_pass():
    check_same({"config": {"a": 1}, "code": "x"}, Group())


def test_a_rank_that_differs_is_named_once():
    group = Group(odd=(2,))
    with pytest.raises(
        ValueError, match=r"^rank 2 \(elsewhere\) and ranks 0, 1 and 3 have diff"
    ) as e:
        check_same({"code": "abc"}, group)
    assert str(e.value).endswith(
        "different code: not abc and abc; give all hosts the same checkout"
    )
    group.rank = 1
    with pytest.raises(SystemExit) as exit:
        check_same({"code": "abc"}, group)
    assert exit.value.code == 2


def test_the_part_is_named_even_if_it_is_missing_there():
    group = Group(world_size=3)
    group.gather = lambda value: [value, value, {} if isinstance(value, dict) else ("b", None)]
    with pytest.raises(ValueError, match=r"^rank 2 \(b\) and ranks 0 and 1 .* VAE: None and abc"):
        check_same({"VAE": "abc"}, group)


def test_a_config_names_its_key_and_most_ranks_are_right(room, tmp_path):
    config = load_config(room.write(tmp_path / "run", "vae"))
    check_program(config, Group())
    group = Group(odd=(1, 2, 3))

    def other(value):
        if isinstance(value, dict):  # hashes of the parts
            return {**value, "config": "0"}
        return "b", {**value[1], "data": {**value[1]["data"], "backend": "decord"}}

    group.other = other
    with pytest.raises(
        ValueError, match=r"^rank 0 \(.*different config: data\.backend=auto and data"
    ):
        check_program(config, group)


def test_code_version_is_of_the_files(tmp_path, monkeypatch):
    before = code_version()
    assert len(before) == 16
    for room in ("train", "dit"):
        (tmp_path / room).mkdir()
        (tmp_path / room / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(agreement, "__file__", str(tmp_path / "train" / "agreement.py"))
    versions = []
    for text in ("x = 1\n", "x = 2\n"):
        (tmp_path / "dit" / "a.py").write_text(text)
        versions.append(code_version.__wrapped__())
    assert len({before, *versions}) == 3


def counters(rank, groups, accum=2):
    batches = islice(iter(StepSampler(24, accum, rank, groups, start_step=5)), accum)
    return [g for batch in batches for g in batch]


@pytest.mark.parametrize("context", [1, 2])
def test_disjoint_shares_pass(context):
    group = Group(context=context)
    found = [counters(rank // context, 4 // context) for rank in range(4)]
    group.gather = lambda _: found
    check_disjoint(found[0], 5 * 24, group)


@pytest.mark.parametrize("context", [1, 2])
def test_shares_that_overlap_or_leave_out_are_named(context):
    group = Group(context=context)
    found = [counters(rank // context, 4 // context) for rank in range(4)]
    group.gather = lambda _: found
    found[3] = found[0]
    who = "ranks 0 and 3" if context == 1 else "ranks 0, 1 and 3"
    with pytest.raises(ValueError, match=rf"^{who} would read sample 120 of the first step"):
        check_disjoint(found[0], 120, group)
    found[3] = counters(3 // context, 4 // context)
    found[0] = [n + 1000 for n in found[0]]
    who = "no rank" if context == 1 else "rank 1"
    with pytest.raises(ValueError, match=rf"^{who} would read sample 120"):
        check_disjoint(found[0], 120, group)


def test_ranks_read_well():
    assert ranks_text([3]) == "rank 3"
    assert ranks_text([1, 0]) == "ranks 0 and 1"
    assert ranks_text([0, 1, 2]) == "ranks 0-2"
    assert ranks_text([7, 0, 1, 2, 4]) == "ranks 0-2, 4 and 7"


def test_processes_that_start_again_have_a_store_of_their_own():
    """Whatever those before them left in it, and whoever of them comes first."""
    store, timeout = HashStore(), timedelta(seconds=60)
    store.set("word/1", "of a process that died")
    names = []
    for _ in range(2):
        with ThreadPoolExecutor(3) as pool:
            order = (1, 0, 2)
            ranks = [pool.submit(_agree_on_name, store, rank, 3, timeout) for rank in order]
            found = {rank.result() for rank in ranks}
        assert len(found) == 1
        names += found
    assert len(set(names)) == 2
    with pytest.raises(DistNetworkError, match=r"rank 1 did not start in 0\.1 s"):
        _agree_on_name(HashStore(), 0, 2, timedelta(seconds=0.1))
