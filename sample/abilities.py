"""What `zoetrope sample` does with given videos: extend, connect, loop and edit them, one at a time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.randomness import stream_seed

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
        if self.strength is not None and not 0 < self.strength <= 1:
            raise ValueError(
                f"--strength {self.strength:g}: use a number above 0 (nothing changes), at most 1 "
                "(everything)"
            )

    @property
    def any(self) -> bool:
        """Whether videos are given, or one is to be made in several parts."""
        return self.loop or bool(self.paths)

    def check(self, pictures: list[str], frames: int | None, context: int) -> None:
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
            if self.mask is not None:
                mask = read_mask(self.mask, videos[0], fps)
        return lambda prompt, seed, asked: self.make(pipeline, prompt, videos, mask, seed, asked)

    @property
    def paths(self) -> list[Path]:
        """The videos that are read."""
        return [path for path in (self.extend, self.edit, *(self.connect or ())) if path]

    def make(
        self,
        pipeline: TextToVideo,
        prompt: str,
        videos: list[Tensor],
        mask: Tensor | None,
        seed: int,
        options: dict[str, Any],
    ) -> Tensor:
        """The video (3 f h w) in [-1, 1] that is asked for.

        Args:
            videos: those of `paths`, (3 f h w) in [-1, 1].
            mask: (f h w), True where an edit may change something.
            options: as `TextToVideo.__call__`.
        """
        import torch

        from sample import edit, extend

        if self.edit is not None:
            strength = 0.6 if self.strength is None else self.strength
            return edit.edit(pipeline, prompt, videos[0], strength, mask, seeds=[seed], **options)
        if self.extend is not None:
            return self._extended(pipeline, prompt, videos[0], seed, options)
        window = extend.window_of(pipeline, options["frames"], self.given, sides=2)
        if self.connect is not None:
            first, second = videos
            new = extend.connect(pipeline, prompt, first, second, window, seeds=[seed], **options)
            return torch.cat([first, new, second], dim=1)
        video = pipeline([prompt], seeds=[seed], **options)[0]
        back = {**options, "image": None, "keyframes": None}
        seeds = [stream_seed(seed, "loop", 0)]
        return torch.cat(
            [video, extend.loop(pipeline, prompt, video, window, seeds=seeds, **back)], dim=1
        )

    def _extended(
        self, pipeline: TextToVideo, prompt: str, video: Tensor, seed: int, options: dict[str, Any]
    ) -> Tensor:
        """The given video with so many seconds more; in as many windows as that takes."""
        from sample import extend

        seconds = 1.0 if self.seconds is None else self.seconds
        wanted = max(1, round(seconds * pipeline.info.fps))
        seeds = (stream_seed(seed, "extend", number) for number in count())
        for backward in (True, False):
            if self.both or backward == self.backward:
                window = extend.window_of(
                    pipeline, options["frames"], self.given, backward=backward
                )
                video = extend.lengthen(
                    *(pipeline, prompt, video, window, wanted, seeds), backward=backward, **options
                )
        return video


@dataclass(frozen=True)
class Rolling:
    """The flags of `zoetrope sample --minutes`."""

    minutes: float | None
    noise_level: float | None
    given: int | None

    def check(
        self,
        videos: FromVideos,
        frames: int | None,
        pictures: list[str],
        sheet: Path | None,
        gif: bool,
        context: int,
    ) -> None:
        """Raises ValueError: a number out of range, or flags that do not go with it."""
        if self.minutes is None:
            if self.noise_level is not None:
                raise ValueError("--noise-level goes with --minutes, which is not there")
            if self.given is not None and not (videos.any and videos.edit is None):
                raise ValueError("--given goes with --extend, --connect, --loop or --minutes")
            return
        if not 0 < self.minutes <= 60:
            raise ValueError(f"--minutes {self.minutes:g}: use a number above 0, at most 60")
        others = {
            "--frames": frames is not None,
            "--sheet": sheet is not None,
            "--gif": gif,
            f"--context {context}": context > 1,  # whose processes share one clip
            "a given video or --loop": videos.any,
            **dict.fromkeys([flag for flag in pictures if flag != "--image"], True),
        }
        for flag, is_given in others.items():
            if is_given:
                raise ValueError(f"{flag} does not go with --minutes; leave one of them out")

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

        assert self.minutes is not None
        num_frames = max(1, round(self.minutes * 60 * pipeline.info.fps))
        plan = roll.plan_windows(pipeline, num_frames, self.given)
        options = {k: v for k, v in options.items() if k not in ("frames", "keyframes")}
        for index in range(ranks.rank, len(texts), ranks.world_size):
            path, folder = paths[index], paths[index].with_suffix(".windows")
            preview = path.with_name(f"{path.stem}.preview.mp4")
            windows = roll.roll(
                pipeline,
                roll.Schedule.parse(texts[index]),
                plan,
                folder,
                seed=seed + index,
                noise_level=roll.NOISE_LEVEL if self.noise_level is None else self.noise_level,
                **options,
            )
            hidden = not ranks.is_main
            for done in tqdm(windows, total=plan.num_windows, desc="windows", disable=hidden):
                roll.write_preview(preview, pipeline, folder, done - 1)
            roll.write_rolled(path, pipeline, plan, folder, num_frames)
            preview.unlink(missing_ok=True)


def read_video(flag: str, path: Path, height: int, width: int, fps: float) -> Tensor:
    """All of a video (3 f h w) in [-1, 1], at a rate, scaled to cover a size and cut at the middle.

    Raises:
        FileNotFoundError, ValueError: there is none, or it cannot be read.
    """
    from data.video import VideoReader, VideoReadError, read_clip, to_float

    if not path.is_file():
        raise FileNotFoundError(f"{flag} {path}: no such file")
    try:
        with VideoReader(path) as reader:
            frames = max(1, int(reader.info.duration * fps + 1e-3))
        clip = read_clip(path, num_frames=frames, fps=fps, height=height, width=width)
    except VideoReadError as error:
        raise ValueError(f"{flag} {path}: {error.reason}") from None
    return to_float(clip)


def read_mask(path: Path, like: Tensor, fps: float) -> Tensor:
    """Where a mask video or picture is white, (f h w), for a video (3 f h w); a shorter one's last
    frame holds on.

    Raises:
        FileNotFoundError, ValueError: there is none, or it cannot be read.
    """
    import torch

    _, frames, height, width = like.shape
    white = read_video("--mask", path, height, width, fps).mean(dim=0) > 0
    if len(white) < frames:
        white = torch.cat([white, white[-1:].expand(frames - len(white), -1, -1)])
    return white[:frames]
