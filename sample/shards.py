"""Weights on disk: a part of a model is one safetensors file, or several with an index.

    dit.safetensors           or    dit-00001-of-00002.safetensors, dit-00002-of-00002.safetensors
                                    and dit.safetensors.index.json

which is how diffusers and transformers keep theirs. `copy_part` gives tensors new names without
loading them: names and shapes live in a file's header, so the bytes behind it are copied as they are.
"""

import errno
import glob
import json
import math
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sample.processes import whole

MAX_SHARD_BYTES = 5 * 1024**3
CHUNK_BYTES = 8 * 1024**2  # copied at once
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """What a safetensors file says about itself: shapes and types by name, and where data start."""

    path: Path
    tensors: dict[str, dict[str, Any]]  # name -> dtype, shape, data_offsets
    data_start: int
    data_bytes: int

    def shapes(self) -> dict[str, Shape]:
        return {name: tuple(tensor["shape"]) for name, tensor in self.tensors.items()}


def read_header(path: Path) -> Header:
    """The header of a safetensors file (huggingface/safetensors, "Format"), checked for completeness.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a safetensors file, or cut short.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; the folder is incomplete")
    try:
        with safe_open(path, "pt"):  # checks types, sizes and offsets; reads no data
            pass
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from error
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        tensors = json.loads(file.read(length))
    tensors.pop("__metadata__", None)
    data_bytes = max((t["data_offsets"][1] for t in tensors.values()), default=0)
    return Header(path, tensors, 8 + length, data_bytes)


def shard_name(stem: str, index: int, count: int) -> str:
    """File name of shard `index`, from 0, of `count`."""
    return (
        f"{stem}.safetensors"
        if count == 1
        else f"{stem}-{index + 1:05d}-of-{count:05d}.safetensors"
    )


def index_name(stem: str) -> str:
    return f"{stem}.safetensors.index.json"


def part_files(folder: Path, stem: str) -> list[Path]:
    """The files of one part, in order.

    Raises:
        FileNotFoundError: neither a file nor an index, or a shard of the index is missing.
        ValueError: the index cannot be read.
    """
    single, index = folder / f"{stem}.safetensors", folder / index_name(stem)
    if not index.is_file():
        if not single.is_file():
            raise FileNotFoundError(f"{single}: no such file; the folder is incomplete")
        return [single]
    names = sorted(set(_weight_map(index).values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder / missing[0]}: no such file; {index.name} lists {len(names)} shards and "
            f"{len(missing)} of them are missing"
        )
    return [folder / name for name in names]


def _weight_map(index: Path) -> dict[str, str]:
    """Each tensor's file, from an index."""
    try:
        files = json.loads(index.read_text())["weight_map"]
        if files and all(isinstance(file, str) for file in files.values()):
            return files
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        pass
    raise ValueError(f"{index}: not an index of safetensors files")


def part_headers(folder: Path, stem: str) -> list[Header]:
    """The headers of a part's files; see `part_files` and `read_header` for what may be wrong.

    Raises:
        ValueError: the files hold other tensors than the index says.
    """
    headers = [read_header(path) for path in part_files(folder, stem)]
    index = folder / index_name(stem)
    if index.is_file():
        listed = set(_weight_map(index).items())
        found = {(name, header.path.name) for header in headers for name in header.tensors}
        for name, file in sorted(listed ^ found):
            where = "lists" if (name, file) in listed else "does not list"
            raise ValueError(f"{index}: {where} {name} in {file}, which its shards contradict")
    return headers


def compare_part(
    folder: Path, settings: str, headers: list[Header], wanted: dict[str, Shape]
) -> None:
    """Refuses a part whose tensors do not fit the settings beside it.

    Raises:
        ValueError: tensors that are missing, unknown, of another shape, or not floating-point.
    """
    got = {name: shape for header in headers for name, shape in header.shapes().items()}
    misfit = f"{folder}: does not fit its {settings}"
    for problem, names in (
        ("lacks", sorted(wanted.keys() - got.keys())),
        ("has unknown", sorted(got.keys() - wanted.keys())),
    ):
        if names:
            raise ValueError(f"{misfit}: {problem} {names[0]} ({len(names)} in all)")
    for name, shape in got.items():
        if shape != wanted[name]:
            raise ValueError(f"{misfit}: {name} is {shape}, expected {wanted[name]}")
    for header in headers:
        for name, tensor in header.tensors.items():
            if tensor["dtype"] not in DTYPES:
                raise ValueError(
                    f"{header.path}: {name} is {tensor['dtype']}; quantised weights are not "
                    f"supported, expected {', '.join(DTYPES)}"
                )


def _write_index(folder: Path, stem: str, files: dict[str, list[str]], total: int) -> None:
    """Names of tensors by file; a part in one file needs none."""
    if len(files) == 1:
        return
    weight_map = {name: file for file, names in files.items() for name in names}
    contents = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / index_name(stem)).write_text(json.dumps(contents, indent=2) + "\n")


def copy_part(
    headers: list[Header],
    folder: Path,
    stem: str,
    names: dict[str, tuple[str, Shape]],
    progress: Callable[[Header, int], object] | None = None,
) -> None:
    """Writes a part again under other names, shard by shard, every tensor bit for bit.

    Args:
        headers: of the source's files.
        folder, stem: where the copy goes, see `shard_name`.
        names: of every tensor, its new name and shape, of as many elements.
        progress: called with the file being copied and the number of bytes just copied.
    """
    files: dict[str, list[str]] = {}
    for i, header in enumerate(headers):
        tensors: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for name, tensor in header.tensors.items():
            new, shape = names[name]
            assert math.prod(shape) == math.prod(tensor["shape"]), name
            tensors[new] = {**tensor, "shape": list(shape)}
        text = json.dumps(tensors, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that the data begin aligned
        target = folder / shard_name(stem, i, len(headers))
        files[target.name] = [name for name in tensors if name != "__metadata__"]
        try:
            with header.path.open("rb") as source, target.open("wb") as out:
                out.write(len(text).to_bytes(8, "little") + text)
                source.seek(header.data_start)
                while chunk := source.read(CHUNK_BYTES):
                    out.write(chunk)
                    if progress is not None:
                        progress(header, len(chunk))
        except OSError as error:  # a full disk does not say which
            raise OSError(error.errno, error.strerror, str(error.filename or target)) from error
    _write_index(folder, stem, files, sum(header.data_bytes for header in headers))


def save_tensors(weights: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """safetensors' save_file, readable to whom other new files are; it leaves them to their owner."""
    try:
        save_file(weights, path, metadata=metadata)
    except SafetensorError as error:  # such as a full disk
        raise OSError(errno.EIO, str(error).strip().splitlines()[0], str(path)) from error
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def _groups(weights: dict[str, Tensor], max_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Neighbours together, up to max_bytes; a larger tensor is alone."""
    group: dict[str, Tensor] = {}
    for name, value in weights.items():
        if group and sum(v.nbytes for v in group.values()) + value.nbytes > max_bytes:
            yield group
            group = {}
        group[name] = value
    yield group


def save_part(
    part: nn.Module, folder: Path | None, stem: str, max_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Writes a network's weights, in shards of at most max_bytes; one shard is in memory at a time.

    Args:
        folder: None to take part in gathering weights that are spread over ranks, and no more.
    """
    groups = list(_groups(part.state_dict(), max_bytes))
    files: dict[str, list[str]] = {}
    for i, group in enumerate(groups):
        name = shard_name(stem, i, len(groups))
        weights = {}
        for key, value in group.items():
            tensor = whole(value.detach())
            if folder is not None:
                weights[key] = tensor.cpu().contiguous()
        if folder is not None:
            save_tensors(weights, folder / name, {"format": "pt"})
        files[name] = list(group)
    if folder is not None:
        _write_index(folder, stem, files, sum(v.nbytes for group in groups for v in group.values()))


def load_part(
    part: nn.Module,
    folder: Path,
    stem: str,
    device: str | torch.device = "cpu",
    cast: Callable[[str, Tensor], Tensor] | None = None,
) -> None:
    """Fills a network, which may stand on the meta device, with a part's tensors, shard by shard.

    The tensors take the place of the network's own, in their own dtype.

    Args:
        device: meta for names, shapes and dtypes alone: no weights are read.
        cast: name and tensor to the tensor that is kept, before it goes to the device.
    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or does not fit the network.
    """
    wanted, first = set(part.state_dict()), folder / f"{stem}.safetensors"
    for path in (header.path for header in part_headers(folder, stem)):
        try:
            weights = load_file(path)  # mapped: bytes are read when they are used
            if torch.device(device).type == "meta":
                weights = {name: value.to(device) for name, value in weights.items()}
            if cast is not None:
                weights = {name: cast(name, value) for name, value in weights.items()}
            weights = {name: value.to(device) for name, value in weights.items()}
            absent, unknown = part.load_state_dict(weights, strict=False, assign=True)
        except SafetensorError as error:
            raise ValueError(f"{path}: not a whole safetensors file ({error})") from error
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise ValueError(f"{path}: does not fit model.yaml: {reason}") from error
        wanted &= set(absent)
        first = path
        if unknown:
            raise ValueError(_misfit(path, "has unknown", unknown))
    if wanted:
        raise ValueError(_misfit(first, "lacks", sorted(wanted)))


def _misfit(path: Path, problem: str, names: list[str]) -> str:
    return f"{path}: does not fit model.yaml: {problem} {names[0]} ({len(names)} in all)"


def copy_files(source: Path, target: Path) -> None:
    """The files of a folder, without its folders, to a new one."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        if path.is_file():
            shutil.copyfile(path, target / path.name)


@contextmanager
def new_folder(folder: Path, source: Path) -> Iterator[Path]:
    """A folder to write to, which takes `folder`'s name once the block ends; after an error or an
    interrupt nothing is left of it.

    Args:
        source: the folder that it is made from.
    Raises:
        FileExistsError: there is something of that name, now or when the block ends.
        ValueError: `folder` is inside of `source`.
    """
    exists = FileExistsError(f"{folder} exists; give a name that does not, or remove it first")
    if folder.exists():
        raise exists
    if source.resolve() in folder.resolve().parents:
        raise ValueError(f"{folder} is inside of {source}, which it is made from; write elsewhere")
    host = socket.gethostname()
    for old in folder.parent.glob(f".{glob.escape(folder.name)}.{host}.*.new"):
        if not _is_running(old.name.split(".")[-2]):  # left there by a kill
            shutil.rmtree(old, ignore_errors=True)
    fresh = folder.with_name(f".{folder.name}.{host}.{os.getpid()}.new")
    fresh.mkdir(parents=True)
    try:
        yield fresh
        if folder.exists():
            raise exists
        os.replace(fresh, folder)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def _is_running(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        pass
    return True
