"""What a run says while it runs: lines on the terminal, log.jsonl, videos, and wandb.

Only the main rank writes. wandb is a mirror: when it fails, the run says so once and goes on.
"""

from __future__ import annotations

import json
import netrc
import os
import secrets
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from torch import Tensor

from data.video import write_video
from sample.processes import Ranks
from train.config import RunConfig

# Fields of a log.jsonl row that depend on the machine and its clock; all others are the same on every
# repetition.
TIME_FIELDS = (
    "seconds",
    "samples_per_second",
    "samples_per_second_per_process",
    "tokens_per_second_per_process",
    "data_wait_share",
    "mfu",
    "peak_memory_gb",
    "checkpoint_seconds",
    "checkpoint_write_seconds",
    "slowest_rank",
    "slowest_rank_seconds",
    "fastest_rank",
    "fastest_rank_seconds",
)


def panel(name: str) -> str:
    """What wandb calls a figure; it groups them by what is before the first slash."""
    if "/" in name:
        return name
    return f"perf/{name}" if name in (*TIME_FIELDS, "peak_tflops") else f"train/{name}"


def read_log(path: Path) -> list[dict[str, Any]]:
    """Rows of a log.jsonl; lines that are none, such as one cut off in writing, are left out."""
    rows = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


class RunLog:
    """log.jsonl, samples/ and wandb of one run.

    Args:
        start_step: of the checkpoint that the run goes on from, or 0; rows of later steps, which an
            interrupted run wrote, are dropped from log.jsonl, because they will be made again.
    """

    def __init__(self, config: RunConfig, ranks: Ranks, start_step: int) -> None:
        self.config, self.enabled = config, ranks.is_main
        self.path = config.out / "log.jsonl"
        self._wandb: Any = None
        if self.enabled:
            kept = [row for row in read_log(self.path) if row["step"] <= start_step]
            text = "".join(json.dumps(row) + "\n" for row in (kept if start_step else []))
            partial = self.path.with_name(".log.jsonl.partial")
            partial.write_text(text)
            os.replace(partial, self.path)
            self._wandb = _start_wandb(config)

    def say(self, text: str) -> None:
        """A line on the terminal."""
        if self.enabled:
            print(text, flush=True)

    def row(self, step: int, values: dict[str, float]) -> None:
        """Appends a row about the state after `step` steps."""
        if not self.enabled:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        shown = {panel(name): value for name, value in values.items()}
        self._mirror(lambda: self._wandb.log(shown, step=step))

    def videos(self, step: int, videos: dict[str, Tensor]) -> None:
        """Writes uint8 videos (3 f h w) as samples/step-00001000/NAME.mp4."""
        if not self.enabled or not videos:
            return
        folder = self.config.out / "samples" / f"step-{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        for name, video in videos.items():
            write_video(folder / f"{name}.mp4", video, self.config.data.fps)

        def show() -> None:
            import wandb

            files = {
                f"samples/{name}": wandb.Video(str(folder / f"{name}.mp4"), format="mp4")
                for name in videos
            }
            self._wandb.log(files, step=step)

        self._mirror(show)

    def histograms(self, step: int, values: Callable[[], dict[str, Tensor]]) -> None:
        """Shows wandb how values are distributed; without it they are not even computed."""

        def show() -> None:
            import wandb

            shown = {
                f"val/{name}": wandb.Histogram(value.float().cpu().numpy())  # type: ignore[arg-type]
                for name, value in values().items()
            }
            self._wandb.log(shown, step=step)

        self._mirror(show)

    def close(self, exit_code: int = 0) -> None:
        """Ends the wandb run."""
        if self.enabled:
            self._mirror(lambda: self._wandb.finish(exit_code=exit_code))

    def _mirror(self, send: Callable[[], Any]) -> None:
        if self._wandb is None:
            return
        try:
            send()
        except Exception as error:
            self.say(f"wandb stopped ({type(error).__name__}: {error}); the run goes on without it")
            self._wandb = None


def _start_wandb(config: RunConfig) -> Any:
    mode = config.logging.wandb
    if mode == "disabled" or os.environ.get("WANDB_MODE") == "disabled":
        return None
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE") or ("online" if _logged_in() else "offline")
    try:
        import wandb

        return wandb.init(
            project=config.logging.project,
            name=config.out.name,
            dir=str(config.out),
            config=config.model_dump(mode="json"),
            mode=mode,  # type: ignore[arg-type]
            id=_wandb_id(config.out),
            resume="allow" if mode == "online" else None,
            settings=wandb.Settings(silent=True, console="off"),
        )
    except Exception as error:
        print(f"wandb did not start ({type(error).__name__}: {error}); the run goes on without it")
        return None


def _wandb_id(out: Path) -> str:
    """The run's name at wandb: drawn once, so that a resumed run goes on there too."""
    path = out / "wandb-id.txt"
    if not path.is_file():
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(secrets.token_hex(8) + "\n")
        os.replace(partial, path)
    return path.read_text().strip()


def _logged_in() -> bool:
    """Whether wandb has a key to use, so that it never stops to ask for one."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class Window:
    """The figures since the last row: means over steps, and what the clock says.

    Its content goes into checkpoints, so that the row that a resumed run writes first is the one
    that an uninterrupted run writes.
    """

    def __init__(self, saved: dict[str, list[float]] | None = None, seconds: float = 0.0) -> None:
        self.values: dict[str, list[float]] = saved or {}
        self.seconds = seconds  # spent in training steps since the run first started
        self._busy = self._wait = 0.0
        self._samples = 0

    def add(self, values: dict[str, float], samples: int, busy: float, wait: float) -> None:
        """One step: its figures, samples, and seconds in all and for data."""
        for name, value in values.items():
            self.values.setdefault(name, []).append(value)
        self._samples += samples
        self._busy += busy
        self._wait += wait
        self.seconds += busy

    def take(self) -> dict[str, float]:
        """The row, and a fresh start."""
        row = {name: sum(values) / len(values) for name, values in self.values.items()}
        row["samples_per_second"] = float(f"{self._samples / max(self._busy, 1e-9):.6g}")
        row["data_wait_share"] = round(self._wait / max(self._busy, 1e-9), 4)
        row["seconds"] = round(self.seconds, 3)
        self.values, self._busy, self._wait, self._samples = {}, 0.0, 0.0, 0
        return row


_ENDS = ("fastest", "slowest")


def describe(step: int, num_steps: int, row: dict[str, float]) -> str:
    """The line of one row; `left` is the time that the remaining steps need at this speed."""
    shown = [f"step {step:>{len(str(num_steps))}}/{num_steps}"]
    for name in ("loss", "l1", "psnr", "discriminator", "grad_norm"):
        if name in row:
            shown.append(f"{name} {row[name]:.4g}")
    shown.append(f"lr {row['lr']:.2e}")
    speed = row["samples_per_second"]
    shown.append(f"{speed:.0f} samples/s" if speed >= 10 else f"{speed:.2g} samples/s")
    if "tokens_per_second_per_process" in row:
        shown.append(f"{row['tokens_per_second_per_process']:,.0f} tokens/s per process")
    if "mfu" in row:
        shown.append(f"MFU {100 * row['mfu']:.1f}% of {row['peak_tflops']:g} TFLOP/s")
    shown.append(f"data wait {100 * row['data_wait_share']:.0f}%")
    if "peak_memory_gb" in row:
        shown.append(f"memory {row['peak_memory_gb']:.3g} GB")
    if row.get("checkpoint_seconds"):
        writing = row["checkpoint_write_seconds"]
        shown.append(f"checkpoint {row['checkpoint_seconds']:.2g} s (written in {writing:.2g} s)")
    if row.get("slowest_rank") != row.get("fastest_rank"):
        ends = (
            f"{row[f'{end}_rank_seconds']:.3g} s (rank {row[f'{end}_rank']:.0f})" for end in _ENDS
        )
        shown.append(f"own work {' to '.join(ends)}")
    return "  ".join(shown)


def describe_validation(step: int, num_steps: int, figures: dict[str, float]) -> str:
    """The line of a validation: what is one figure, and the loss by noise level."""
    shown = [f"step {step:>{len(str(num_steps))}}/{num_steps}"]
    shown += [f"{name} {value:.4g}" for name, value in figures.items() if "=" not in name]
    prefix = "val/loss/t="
    bins = {name: value for name, value in figures.items() if name.startswith(prefix)}
    if bins:
        levels = ", ".join(f"{name[len(prefix) :]} {value:.3g}" for name, value in bins.items())
        shown.append(f"by t: {levels}")
    return "  ".join(shown)


def describe_unread(reasons: dict[str, str]) -> str:
    """The line about clips that could not be read, from why by clip; at most five reasons."""
    counted = Counter(reasons.values()).most_common()
    shown = [f"{reason} ({count})" for reason, count in counted[:5]]
    more = [f"{len(counted) - 5} other reasons"] if len(counted) > 5 else []
    return f"{len(reasons)} clips could not be read: {'; '.join(shown + more)}"


def clock(seconds: float) -> str:
    """1:02:03, or 2:03; hours are not cut off at a day."""
    minutes, second = divmod(int(max(0.0, seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
