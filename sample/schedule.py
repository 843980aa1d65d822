"""Which prompt holds when, in a long video."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from math import isfinite


@dataclass(frozen=True)
class Schedule:
    """Which prompt holds from which second on; the first from 0."""

    starts: tuple[float, ...]
    prompts: tuple[str, ...]

    @classmethod
    def parse(cls, text: str, seconds: float | None = None) -> Schedule:
        """From `0s: a red circle | 20s: a blue square`, each also on a line of its own; or one prompt.

        Args:
            seconds: that the video lasts.
        Raises:
            ValueError: times do not rise from 0, or one is not in the video, or a prompt is empty.
        """
        if not is_schedule(text):
            return cls((0.0,), (text.strip(),))
        parts = [part.strip() for part in text.split("|")]
        lines = [line for line in text.splitlines() if line.strip()]
        if len(parts) == 1 and all(_number(line) is not None for line in lines):
            parts = lines
        starts, prompts = [], []
        for part in parts:
            time, prompt = _time(part), part.partition("s:")[2].strip()
            if time is None or not prompt:
                raise ValueError(
                    f"prompt schedule: got {part!r}; expected seconds and a prompt, such as "
                    "'0s: a red circle moving left | 20s: a blue square moving up'"
                )
            starts.append(time)
            prompts.append(prompt)
        times = ", ".join(f"{start:g}s" for start in starts)
        if starts[0] != 0 or any(b <= a for a, b in zip(starts, starts[1:])):
            raise ValueError(f"prompt schedule: got times {times}; they have to rise from 0s")
        if seconds is not None and starts[-1] >= seconds:
            raise ValueError(
                f"prompt schedule: got times {times}, and the video ends at {seconds:g}s; move them, "
                "or ask for a longer video"
            )
        return cls(tuple(starts), tuple(prompts))

    def at(self, seconds: float) -> str:
        """The prompt that holds then."""
        return self.prompts[bisect_right(self.starts, seconds + 1e-9) - 1]


def is_schedule(text: str) -> bool:
    """Whether a prompt has several parts, or a time before it."""
    return "|" in text or _number(text) is not None


def _number(part: str) -> float | None:
    """What stands before a part's `s:`; None where that is no number."""
    head, colon, _ = part.partition("s:")
    try:
        return float(head) if colon else None
    except ValueError:
        return None


def _time(part: str) -> float | None:
    """The seconds at the beginning of a part; None where there are none."""
    number = _number(part)
    return number if number is not None and isfinite(number) and number >= 0 else None
