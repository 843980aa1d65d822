"""The parts of the world suite beside text to video, one for each ability of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from eval.world_edit import score_edit
from eval.world_extension import score_extension
from eval.world_identity import score_identity
from eval.world_minute import score_minute
from eval.world_physics import score_physics
from eval.world_suite import Progress, WorldSettings

if TYPE_CHECKING:
    from sample.pipeline import TextToVideo

# Each gives what `eval.tables.score_table` shows.
PARTS: dict[str, Callable[[TextToVideo, WorldSettings, Progress | None], dict[str, Any]]] = {
    "physics": score_physics,
    "extension": score_extension,
    "minute": score_minute,
    "identity": score_identity,
    "edit": score_edit,
}
# How many scenes, where nothing is said, of parts that make one clip at a time; 200 of the others.
DEFAULT_NUM = {"extension": 50, "minute": 8}
