"""What all ranks must have the same of, and what each must have for itself, checked before a run.

A rank with another config, other code or other rows trains on without a word, into weights that nobody
can explain: so they compare first, and the one that differs is named.
"""

from __future__ import annotations

import hashlib
import json
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import torch

from sample.processes import Ranks
from train.config import RunConfig

_ROOMS = ("data", "dit", "eval", "sample", "train")
# What to do about parts that differ; the frozen networks' names are the recipes' own.
_ADVICE = {
    "config": "start all processes with one file and the same overrides",
    "code": "give all hosts the same checkout",
    "torch": "install the same version on all hosts",
    "device": "start as many processes on each host as it has GPUs, or set device=cpu",
    "data.manifest": "give all hosts the same file",
    "data.validation": "give all hosts the same file",
}


@cache
def code_version() -> str:
    """Sixteen hex digits of the source files of all rooms, committed or not."""
    digest, root = hashlib.sha256(), Path(__file__).resolve().parents[1]
    for path in sorted(path for room in _ROOMS for path in (root / room).rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def check_program(config: RunConfig, ranks: Ranks) -> None:
    """Compares the config, the code and torch; to be called before anything depends on them.

    Raises:
        ValueError: a rank differs; on rank 0, which says so for all.
        SystemExit: the same, on the others.
    """
    parts = {
        "config": config.model_dump(mode="json"),
        "code": code_version(),
        "torch": str(torch.__version__),
        "device": ranks.device.type,
    }
    check_same(parts, ranks)


def check_same(parts: Mapping[str, Any], ranks: Ranks) -> None:
    """Compares the values of parts, which can be written as JSON.

    Raises:
        ValueError, SystemExit: see `check_program`.
    """
    digests = {name: _digest(value) for name, value in parts.items()}
    found = ranks.gather(digests)
    for name in dict.fromkeys(name for digests in found for name in digests):
        values = [digests.get(name) for digests in found]
        if len(set(values)) > 1:
            _differ(name, values, ranks.gather((socket.gethostname(), parts.get(name))), ranks)


def check_disjoint(counters: Sequence[int], first: int, ranks: Ranks) -> None:
    """Compares the sample counters that the ranks read in one step.

    Args:
        counters: of this rank; those that share a context have the same ones.
        first: the step's lowest; together they are all numbers from it on.
    Raises:
        ValueError, SystemExit: two ranks read the same sample or a sample is left out; see
            `check_program`.
    """
    readers: dict[int, list[int]] = {}
    found = ranks.gather(list(counters))
    for rank, numbers in enumerate(found):
        for number in numbers:
            readers.setdefault(number, []).append(rank)
    total = sum(map(len, found)) // ranks.context
    for number in sorted({*readers, *range(first, first + total)}):
        right = {rank // ranks.context for rank in readers.get(number, [])}
        if len(right) == 1 and len(readers[number]) == ranks.context:
            continue
        who = ranks_text(readers[number]) if number in readers else "no rank"
        _stop(
            f"{who} would read sample {number} of the first step, and every sample is for "
            f"{'one rank' if ranks.context == 1 else f'the {ranks.context} ranks of one context'}; "
            "RANK and WORLD_SIZE must be what torchrun sets",
            ranks,
        )


def ranks_text(ranks: Sequence[int]) -> str:
    """For people: rank 3, or ranks 0-2 and 7."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    head, _, tail = ", ".join(parts).rpartition(", ")
    return f"ranks {head} and {tail}" if head else f"rank{'s' * (len(ranks) > 1)} {tail}"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _differ(
    name: str, digests: Sequence[str | None], found: Sequence[tuple[str, Any]], ranks: Ranks
) -> NoReturn:
    """Names the ranks whose part is not the most common one.

    Args:
        digests: by rank.
        found: host and value by rank.
    """
    usual = Counter(digests).most_common(1)[0][0]
    right = digests.index(usual)
    wrong = next(rank for rank, digest in enumerate(digests) if digest != usual)
    odd = [rank for rank, digest in enumerate(digests) if digest == digests[wrong]]
    ours, theirs = found[right][1], found[wrong][1]
    detail = ""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        key, ours, theirs = _first_difference(ours, theirs)
        detail = f"{key}="
    same = [rank for rank, digest in enumerate(digests) if digest == usual]
    advice = _ADVICE.get(name, "give all hosts the same files")
    hosts = ", ".join(sorted({found[rank][0] for rank in odd})[:8])
    _stop(
        f"{ranks_text(odd)} ({hosts}) and {ranks_text(same)} have different {name}: "
        f"{detail}{theirs} and {detail}{ours}; {advice}",
        ranks,
    )


def _first_difference(
    one: Mapping[str, Any], two: Mapping[str, Any], prefix: str = ""
) -> tuple[str, Any, Any]:
    """The first dotted key with different values, and these."""
    key = next(key for key in sorted({*one, *two}) if one.get(key) != two.get(key))
    ours, theirs = one.get(key), two.get(key)
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return _first_difference(ours, theirs, f"{prefix}{key}.")
    return f"{prefix}{key}", ours, theirs


def _stop(text: str, ranks: Ranks) -> NoReturn:
    """Ends all ranks, of which one says why."""
    if ranks.is_main:
        raise ValueError(text)
    raise SystemExit(2)
