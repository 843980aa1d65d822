"""Writes the procedural world to disk: .mp4 clips, a manifest, and the arguments they came from.

    OUT/world.json              the arguments; a repeated call must bring the same ones
    OUT/clips/000/000000.mp4    a thousand clips per folder
    OUT/references/000/000000-1.png    of scenario `subjects`: a picture of each, from 1
    OUT/manifest.jsonl          written last, so it lists only clips that exist

A clip appears under its name only when it is complete, so an interrupted call continues where it
stopped when it is repeated.
"""

import json
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from data.files import replacing
from data.randomness import numpy_generator
from data.video_write import write_video
from data.workers import interrupts_deferred
from data.world import SHAPES_SCENARIO, Scene, check_arguments, make_scene
from data.world_captions import captions
from data.world_render import render
from data.world_subjects import reference_scene

MANIFEST = "manifest.jsonl"
ARGUMENTS = "world.json"
# Of a scenario; changes whenever the same arguments would give different clips or captions.
WORLD_VERSIONS = {"subjects": 2}  # of all others 1
WORDINGS = 3  # captions per clip
_CHUNK = 64  # clips per task: long enough to hide the hand-over, short enough for the progress bar


@dataclass(frozen=True)
class WorldSpec:
    """What to render: everything that the clips depend on. Sizes in pixels.

    Raises:
        ValueError: no clips, an odd height or width, or what `check_arguments` refuses.
    """

    clips: int
    seed: int
    split: str
    level: int | None
    height: int
    width: int
    num_frames: int
    fps: float
    scenario: str = SHAPES_SCENARIO

    def __post_init__(self) -> None:
        if self.clips < 1:
            raise ValueError(f"clips={self.clips} leaves nothing to render; use at least 1")
        check_arguments(
            level=self.level,
            split=self.split,
            height=self.height,
            width=self.width,
            num_frames=self.num_frames,
            fps=self.fps,
            scenario=self.scenario,
        )
        if self.height % 2 or self.width % 2:
            raise ValueError(
                f"size={self.height}x{self.width} does not fit H.264's chroma planes; "
                f"use {self.height + self.height % 2}x{self.width + self.width % 2}"
            )

    def scene(self, index: int) -> Scene:
        """The scene of clip number `index`."""
        return make_scene(
            level=self.level,
            seed=self.seed,
            index=index,
            split=self.split,
            height=self.height,
            width=self.width,
            num_frames=self.num_frames,
            fps=self.fps,
            scenario=self.scenario,
        )

    @property
    def arguments(self) -> dict[str, Any]:
        """All that says which clips these are: `level` of `shapes`, else `scenario`."""
        unused = "scenario" if self.level is not None else "level"
        return {key: value for key, value in asdict(self).items() if key != unused}


def clip_path(index: int) -> str:
    """Where clip number `index` lies, relative to the manifest."""
    return f"clips/{index // 1000:03d}/{index:06d}.mp4"


def reference_paths(scene: Scene) -> list[str]:
    """Where the pictures of a scene's subjects lie, relative to the manifest, in their order."""
    folder = f"references/{scene.index // 1000:03d}"
    return [
        f"{folder}/{scene.index:06d}-{number + 1}.png"
        for number, item in enumerate(scene.objects)
        if item.identity is not None
    ]


def write_world(out: str | os.PathLike[str], spec: WorldSpec, workers: int | None = None) -> Path:
    """Render the clips that are not there yet and write the manifest.

    The clips do not depend on the number of workers.

    Args:
        out: a folder, made if missing.
        workers: processes; None takes every core, 0 or 1 renders in this process.
    Returns:
        The manifest's path.
    Raises:
        ValueError: `out` holds clips of other arguments, or `workers` is negative.
    """
    if workers is not None and workers < 0:
        raise ValueError(f"workers={workers} is negative; use 0 or more")
    out = Path(out)
    _claim(out, spec)
    missing = [index for index in range(spec.clips) if not _is_there(out, spec, index)]
    manifest = out / MANIFEST
    if not missing and manifest.exists():
        return manifest
    for folder in {(out / clip_path(index)).parent for index in missing}:
        folder.mkdir(parents=True, exist_ok=True)
        if spec.scenario == "subjects":
            (out / "references" / folder.name).mkdir(parents=True, exist_ok=True)
    chunks = [missing[i : i + _CHUNK] for i in range(0, len(missing), _CHUNK)]
    workers = min(os.cpu_count() or 1 if workers is None else workers, len(chunks))
    with interrupts_deferred():  # a bar that is only half made complains when it goes
        progress = tqdm(
            total=spec.clips, initial=spec.clips - len(missing), unit="clip", desc="world"
        )
    with progress:
        for done in _render_chunks(out, spec, chunks, workers):
            progress.update(done)
    lines = (json.dumps(manifest_row(spec, index)) + "\n" for index in range(spec.clips))
    _write_atomically(manifest, lines)
    return manifest


def manifest_row(spec: WorldSpec, index: int) -> dict[str, Any]:
    """The manifest's row for clip number `index`; `state` is `Scene.to_state()`."""
    scene = spec.scene(index)
    kind = spec.scenario if spec.level is None else spec.level
    rng = numpy_generator(spec.seed, "world captions", kind, spec.split, index)
    references = reference_paths(scene)
    return {
        "path": clip_path(index),
        "caption": captions(scene, WORDINGS, rng),
        "num_frames": spec.num_frames,
        "height": spec.height,
        "width": spec.width,
        "fps": spec.fps,
        "duration": spec.num_frames / spec.fps,
        **({"scenario": spec.scenario} if spec.level is None else {"level": spec.level}),
        **({"references": references} if references else {}),
        "split": spec.split,
        "seed": spec.seed,
        "index": index,
        "state": scene.to_state(),
    }


def _claim(out: Path, spec: WorldSpec) -> None:
    """Note down the arguments, or compare them with those noted down earlier."""
    wanted = {"version": WORLD_VERSIONS.get(spec.scenario, 1), **spec.arguments}
    path = out / ARGUMENTS
    if path.exists():
        try:
            found = json.loads(path.read_text())
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ValueError(f"{path} is damaged; remove {out} or use another folder")
        keys = sorted(k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k))
        if keys:
            got = ", ".join(f"{key}={wanted.get(key)}" for key in keys)
            had = ", ".join(f"{key}={found.get(key)}" for key in keys)
            raise ValueError(
                f"{out} holds a world of other arguments: got {got}, it was made with {had}; "
                f"use another folder or remove this one"
            )
        return
    if out.exists() and (
        not out.is_dir() or any(not found.name.startswith(".") for found in out.iterdir())
    ):
        raise ValueError(f"{out} exists and holds no world; use an empty or a new folder")
    out.mkdir(parents=True, exist_ok=True)
    _write_atomically(path, [json.dumps(wanted, indent=2) + "\n"])


def _render_chunks(
    out: Path, spec: WorldSpec, chunks: list[list[int]], workers: int
) -> Iterator[int]:
    """Render all chunks; yields the number of clips done each time some are."""
    if workers <= 1:
        for chunk in chunks:
            yield _render_clips(out, spec, chunk)
        return
    # Spawned, not forked: the caller may have threads, and a fork copies their locks.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        with interrupts_deferred():
            waiting = {pool.submit(_render_clips, out, spec, chunk) for chunk in chunks}
        try:
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield sum(future.result() for future in done)
        finally:
            # After an error or an interrupt, do not sit through the rest.
            pool.shutdown(cancel_futures=True)


def _render_clips(out: Path, spec: WorldSpec, indices: list[int]) -> int:
    for index in indices:
        scene = spec.scene(index)
        for number, path in enumerate(reference_paths(scene)):
            with replacing(out / path) as partial:
                picture = Image.fromarray(render(reference_scene(scene, number))[0])
                picture.save(partial, format="PNG")
        write_video(out / clip_path(index), render(scene), spec.fps)
    return len(indices)


def _is_there(out: Path, spec: WorldSpec, index: int) -> bool:
    if not (out / clip_path(index)).exists():
        return False
    # Pictures are written before their clip: only somebody who removed one leaves it out.
    if spec.scenario != "subjects":
        return True
    return all((out / path).exists() for path in reference_paths(spec.scene(index)))


def _write_atomically(path: Path, lines: Iterable[str]) -> None:
    with replacing(path) as partial, partial.open("w") as file:
        file.writelines(lines)
