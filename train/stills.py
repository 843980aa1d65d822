"""Single frames of a clip as pictures: what a user gives as a keyframe, in training.

Which frames these are follows from a row's number alone, so that a latent cache can hold them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from train.config_recipes import TasksConfig


def num_stills(config: TasksConfig) -> int:
    """How many of each clip the tasks need: its last frame, and some others."""
    if config.keyframes:
        return 3
    return 2 if config.keyframe else int(bool(config.last or config.ends))


def still_frames(row: int, num_frames: int, count: int) -> list[int]:
    """Which frames of a row's clip they are: the last one first; three differ if the clip has three."""
    others = num_frames - 1
    spread = (row * 0x9E3779B1 & 0xFFFFFFFF) * others >> 32  # in [0, others)
    further = 1 + ((row * 0x85EBCA6B & 0xFFFFFFFF) * max(1, others - 1) >> 32)
    return [others, spread, (spread + further) % max(1, others)][:count]


def take_frames(clips: Tensor, places: Tensor) -> Tensor:
    """Some frames of each clip, (b ... k h w) of (b ... f h w), by their places (b, k)."""
    places = places.to(clips.device)
    return torch.stack(
        [clip.index_select(-3, which) for clip, which in zip(clips, places, strict=True)]
    )


def cut_stills(video: Tensor, rows: Sequence[int], count: int) -> list[Tensor]:
    """The stills of some rows' clips (b 3 f h w), `count` batches of one frame each (b 3 1 h w)."""
    frames = [still_frames(row, video.shape[2], count) for row in rows]
    each = torch.arange(len(rows))
    return [video[each, :, list(which), None] for which in zip(*frames)]
