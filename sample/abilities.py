"""The flags of `zoetrope sample` that have to do with given videos and with long ones."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.files import locked
from sample.media import read_mask, read_video
from sample.options import OutsideTraining, outside_trained
from sample.schedule import Schedule, is_schedule

if TYPE_CHECKING:
    from torch import Tensor

    from sample.pipeline import TextToVideo
    from sample.processes import Ranks


@dataclass(frozen=True)
class FromVideos:
    """The flags of `zoetrope sample` that have to do with given videos.

    Attributes:
        extend, edit: a video; connect: two.
        loop: what is made is to end where it begins.
        seconds: to add; backward: in front of it; both: so many on either side.
        strength, mask: of an edit; see `sample.edit`.
        given: latent frames of a video that a window is given.
    """

    extend: Path | None = None
    connect: tuple[Path, Path] | None = None
    loop: bool = False
    edit: Path | None = None
    seconds: float | None = None
    backward: bool = False
    both: bool = False
    strength: float | None = None
    mask: Path | None = None
    given: int | None = None

    def __post_init__(self) -> None:
        asked = {
            "--extend": self.extend,
            "--connect": self.connect,
            "--edit": self.edit,
            "--loop": self.loop or None,
        }
        named = [flag for flag, value in asked.items() if value is not None]
        if len(named) > 1:
            raise ValueError(f"{named[0]} and {named[1]}: use one at a time")
        needs = {
            "--seconds": (self.seconds is not None, "--extend", self.extend),
            "--backward": (self.backward, "--extend", self.extend),
            "--both": (self.both, "--extend", self.extend),
            "--strength": (self.strength is not None, "--edit", self.edit),
            "--mask": (self.mask is not None, "--edit", self.edit),
        }
        for flag, (is_given, owner, value) in needs.items():
            if is_given and value is None:
                raise ValueError(f"{flag} goes with {owner}, which is not there")
        if self.backward and self.both:
            raise ValueError("--backward and --both: use one of them")
        if self.seconds is not None and not 0 < self.seconds < float("inf"):
            raise ValueError(f"--seconds {self.seconds:g}: use a number above 0")
        if self.strength is not None and not 0.001 <= self.strength <= 1:
            raise ValueError(
                f"--strength {self.strength:g}: use 0.001 (nothing changes) to 1 (everything)"
            )

    @property
    def any(self) -> bool:
        """Whether videos are given, or one is to be made in several parts."""
        return self.loop or bool(self.paths)

    def check(
        self, pictures: list[str], frames: int | None, batch_size: int | None, context: int
    ) -> None:
        """Raises ValueError: other flags do not go with these.

        Args:
            pictures: the flags of given pictures.
            frames: that are asked for; context: processes that share a clip.
        """
        if not self.any:
            return
        if self.paths and pictures:
            raise ValueError(f"{pictures[0]} does not go with a given video; leave one of them out")
        if self.edit is not None and frames is not None:
            raise ValueError("--frames: an edited video has its own length; leave it out")
        if batch_size is not None:
            raise ValueError("--batch-size: such videos are made one at a time; leave it out")
        if context > 1:
            raise ValueError(f"--context {context} is for clips from text and pictures alone")

    def maker(
        self, pipeline: TextToVideo, height: int, width: int, options: dict[str, Any]
    ) -> Callable[[str, int, dict[str, Any]], Tensor] | None:
        """What makes a video (3 f h w) from a prompt, a seed and options; None where no video is
        given and no loop is asked for. Reads the videos.

        Raises:
            FileNotFoundError, ValueError: one of them cannot be read, or does not fit.
        """
        if not self.any:
            return None
        flag = {self.extend: "--extend", self.edit: "--edit"}
        fps = pipeline.info.fps
        videos = [
            read_video(flag.get(path, "--connect"), path, height, width, fps) for path in self.paths
        ]
        mask = None
        if self.edit is not None:
            step = pipeline.vae.frame_step
            length = 1 + (videos[0].shape[1] - 1) // step * step
            if length != videos[0].shape[1]:
                print(
                    f"warning: --edit {self.edit}: the VAE takes {step}*k+1 frames, so the last "
                    f"{videos[0].shape[1] - length} of {videos[0].shape[1]} are left out",
                    file=sys.stderr,
                )
            videos[0] = videos[0][:, :length]
            for text in outside_trained(pipeline.info, length, height, width):
                print(f"warning: {text}", file=sys.stderr)
            if self.mask is not None:
                mask = read_mask(self.mask, self.edit, videos[0], fps)

        def make(prompt: str, seed: int, asked: dict[str, Any]) -> Tensor:
            from sample.generate import generate

            if self.edit is not None:
                asked = {**asked, "frames": None}

            with warnings.catch_warnings(action="ignore", category=OutsideTraining):  # it is said
                return generate(
                    pipeline,
                    prompt,
                    extend=videos[0] if self.extend else None,
                    connect=(videos[0], videos[1]) if self.connect else None,
                    loop=self.loop,
                    edit=videos[0] if self.edit else None,
                    mask=mask,
                    strength=self.strength,
                    seconds=self.seconds,
                    backward=self.backward,
                    both=self.both,
                    given_latents=self.given,
                    seed=seed,
                    **asked,
                )

        return make

    @property
    def paths(self) -> list[Path]:
        """The videos that are read."""
        return [path for path in (self.extend, self.edit, *(self.connect or ())) if path]


@dataclass(frozen=True)
class Rolling:
    """The flags of `zoetrope sample --minutes`."""

    minutes: float | None
    noise_level: float | None
    given: int | None

    def check(
        self,
        texts: Sequence[str],
        videos: FromVideos,
        pictures: Sequence[str],
        others: Mapping[str, bool],
    ) -> None:
        """Raises ValueError: a number out of range, a schedule that cannot be, or flags that do not go
        with it.

        Args:
            pictures: the flags of given pictures; others: flags that do not go with it, and whether
                they are given.
        """
        if self.minutes is None:
            if any(map(is_schedule, texts)):
                print(
                    "warning: a prompt that looks like a schedule is read as it stands; schedules go "
                    "with --minutes",
                    file=sys.stderr,
                )
            if self.noise_level is not None:
                raise ValueError("--noise-level goes with --minutes, which is not there")
            if self.given is not None and not (videos.any and videos.edit is None):
                raise ValueError("--given goes with --extend, --connect, --loop or --minutes")
            return
        if not 0 < self.minutes <= 60:
            raise ValueError(f"--minutes {self.minutes:g}: use a number above 0, at most 60")
        refused = {
            **others,
            "a given video or --loop": videos.any,
            **dict.fromkeys([flag for flag in pictures if flag != "--image"], True),
        }
        for flag, is_given in refused.items():
            if is_given:
                raise ValueError(f"{flag} does not go with --minutes; leave one of them out")
        for text in texts:
            Schedule.parse(text, 60 * self.minutes)

    def write(
        self,
        paths: Sequence[Path],
        pipeline: TextToVideo,
        texts: Sequence[str],
        seed: int,
        options: dict[str, Any],
        ranks: Ranks,
    ) -> None:
        """Makes the videos, each from its prompt or schedule; where a window is done already, it goes
        on behind it."""
        from tqdm import tqdm

        from sample import roll
        from sample.generate import num_frames_of

        assert self.minutes is not None
        noise_level = self.noise_level or roll.NOISE_LEVEL
        num_frames = num_frames_of(self.minutes, pipeline.info.fps)
        plan = roll.plan_windows(pipeline, num_frames, self.given)
        options = {k: v for k, v in options.items() if k not in ("frames", "keyframes")}
        schedules = [Schedule.parse(text) for text in texts]
        for schedule in schedules:
            roll.check_schedule(pipeline, schedule, plan)
        for index in range(ranks.rank, len(texts), ranks.world_size):
            path, folder = paths[index], paths[index].with_suffix(".windows")
            windows = roll.roll(
                pipeline,
                schedules[index],
                plan,
                folder,
                seed=seed + index,
                noise_level=noise_level,
                **options,
            )
            hidden = not ranks.is_main
            busy = f"{path}: another process is making it; wait for it, or choose another name"
            with locked(folder.with_name(f".{folder.name}.lock"), busy):
                for done in tqdm(windows, total=plan.num_windows, desc="windows", disable=hidden):
                    roll.write_preview(pipeline, folder, done - 1)
                roll.write_rolled(path, pipeline, plan, folder, num_frames)
