"""Captions written by a vision-language model: any of transformers' image-text-to-text models.

Several captions of different length per clip, as Sora's and DALL-E 3's recaptioning has them
(Betker et al. 2023): a model trained on long ones alone does badly with the short prompts that
people type.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.ingest_config import Captioner, Prompt

Record = dict[str, Any]


def file_stamps(path: str | os.PathLike[str]) -> list[list[Any]]:
    """[name, bytes, time of change] of a file, or of each file of a folder: what tells models apart
    without reading them."""
    root = Path(path)
    files = sorted(p for p in root.rglob("*") if p.is_file()) if root.is_dir() else [root]
    stamps = []
    for file in files:
        if file.is_file():
            status = file.stat()
            stamps.append([file.name, status.st_size, status.st_mtime_ns])
    return stamps


@dataclass(frozen=True)
class _Model:
    network: Any
    processor: Any
    device: str
    chats: bool  # has a chat template
    sees_video: bool


def check_captioner(settings: Captioner) -> None:
    """Raises FileNotFoundError where there is no such model, ValueError without transformers."""
    if not (settings.model / "config.json").is_file():
        raise FileNotFoundError(
            f"captions.captioner.model={settings.model} has no config.json; expected the folder of "
            "a transformers model, downloaded before (nothing is fetched)"
        )
    if importlib.util.find_spec("transformers") is None:
        raise ValueError("a captioner needs transformers: pip install 'zoetrope[caption]'")


@functools.cache
def _load(path: str, device: str) -> _Model:
    import torch
    import transformers

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    try:
        processor: Any = transformers.AutoProcessor.from_pretrained(path, local_files_only=True)
        network: Any = transformers.AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype, local_files_only=True
        )
    except (ValueError, OSError, KeyError, ImportError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"captions.captioner.model={path}: not a model that transformers loads for images and "
            f"text: {lines[0][:200]}"
        ) from error
    if not hasattr(processor, "tokenizer"):
        raise ValueError(f"captions.captioner.model={path}: its processor has no tokenizer")
    processor.tokenizer.padding_side = "left"  # so that answers begin at the same place
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    chats = bool(getattr(processor, "chat_template", None) or processor.tokenizer.chat_template)
    sees_video = chats and getattr(processor, "video_processor", None) is not None
    return _Model(network.to(device).eval(), processor, device, chats, sees_video)


def caption_clips(tasks: list[Record], settings: Captioner) -> list[list[Record]]:
    """The captions of each clip, `generated`: one per prompt, without those that came out empty.

    A clip that cannot be read becomes a record with `error`.
    """
    from data.ingest_steps import clip_frames, reason_of

    model = _load(str(settings.model), settings.device)
    if settings.frames_as == "video" and not model.sees_video:
        raise ValueError(
            f"captions.captioner.frames_as=video, but the processor in {settings.model} takes no "
            "videos; use images or auto"
        )
    results: list[list[Record]] = [[] for _ in tasks]
    clips: dict[int, np.ndarray] = {}
    for index, task in enumerate(tasks):
        try:
            clips[index] = clip_frames(task, settings.num_frames, settings.height)
        except Exception as error:  # as any step: the clip is at fault, not the run
            results[index] = [{"error": reason_of(error)}]
    # Images and videos are worded differently, and pictures of one size batch best.
    groups: dict[tuple[int, bool], list[int]] = {}
    for index, frames in clips.items():
        groups.setdefault((len(frames), tasks[index]["is_image"]), []).append(index)
    for (_, is_image), members in groups.items():
        as_video = model.sees_video and not is_image and settings.frames_as != "images"
        texts = [
            _answers(model, [clips[i] for i in members], [_fps(tasks[i], settings) for i in members],
                     prompt, as_video)
            for prompt in settings.prompts
        ]  # fmt: skip
        for index, answers in zip(members, zip(*texts, strict=True), strict=True):
            results[index] = [{"generated": [answer for answer in answers if answer]}]
    return results


def _fps(task: Record, settings: Captioner) -> float:
    """At which the frames shown to the model follow each other."""
    if task["is_image"]:
        return 1.0
    return settings.num_frames / max(task["end"] - task["start"], 1e-3)


def _answers(
    model: _Model, clips: list[np.ndarray], fps: list[float], prompt: Prompt, as_video: bool
) -> list[str]:
    """What the model says of each clip (f h w 3) when asked `prompt`."""
    import torch

    if model.chats:
        inputs = _chat(model, clips, fps, prompt.prompt, as_video)
    else:  # such models take one picture: the middle one
        pictures = [clip[len(clip) // 2] for clip in clips]
        inputs = model.processor(
            images=pictures, text=[prompt.prompt] * len(clips), padding=True, return_tensors="pt"
        )
    inputs = inputs.to(model.device)
    for name, value in inputs.items():
        if torch.is_tensor(value) and value.is_floating_point():
            inputs[name] = value.to(model.network.dtype)
    with torch.inference_mode():
        tokens = model.network.generate(
            **inputs, max_new_tokens=prompt.max_new_tokens, do_sample=False
        )
    asked = inputs["input_ids"]
    if model.chats and not model.network.config.is_encoder_decoder:
        tokens = tokens[:, asked.shape[1] :]
    said = model.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    if not model.chats:  # the caption goes on from the prompt, which may be part of it
        echo = model.processor.tokenizer.batch_decode(asked, skip_special_tokens=True)
        said = [text.removeprefix(before) for text, before in zip(said, echo)]
    return [" ".join(text.split()) for text in said]


def _chat(
    model: _Model, clips: list[np.ndarray], fps: list[float], prompt: str, as_video: bool
) -> Any:
    """The model's inputs for one question about each clip, in its own chat format."""
    num_frames = len(clips[0])
    shown = [{"type": "video"}] if as_video else [{"type": "image"}] * num_frames
    message = [{"role": "user", "content": [*shown, {"type": "text", "text": prompt}]}]
    text = model.processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    texts = [text] * len(clips)
    if not as_video:
        images = [list(clip) for clip in clips]
        return model.processor(text=texts, images=images, padding=True, return_tensors="pt")
    # The frames have been picked already; what rate that makes goes into the model's timestamps.
    metadata = [
        {
            "total_num_frames": num_frames,
            "fps": rate,
            "duration": num_frames / rate,
            "frames_indices": list(range(num_frames)),
            "height": clip.shape[1],
            "width": clip.shape[2],
        }
        for clip, rate in zip(clips, fps)
    ]
    return model.processor(
        text=texts,
        videos=list(clips),
        video_metadata=metadata,
        do_sample_frames=False,
        padding=True,
        return_tensors="pt",
    )
