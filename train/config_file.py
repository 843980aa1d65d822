"""Reading a run's YAML with overrides from the command line; every mistake is one clear line."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from train.config import RunConfig


class ConfigError(ValueError):
    """A config that cannot be used; the message has one line per problem."""


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> RunConfig:
    """The validated run described by a YAML file.

    Args:
        path: the file.
        overrides: `section.key=value` each; values are parsed as YAML.
    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: not YAML, an unknown key or an unusable value.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder; give a YAML file" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"config {path} {what}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text; expected a config in YAML") from None
    values = _parse(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected keys and values, got {type(values).__name__}")
    for override in overrides:
        _apply(values, override)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        lines = [f"{path}: {_describe(problem)}" for problem in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def dump_config(config: RunConfig) -> str:
    """The resolved config as YAML that `load_config` reads back to the same."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark is not None else ""
        problem = getattr(error, "problem", None) or "cannot be parsed"
        raise ConfigError(f"{where}: {line}not valid YAML: {problem}") from None


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: expected section.key=value")
    *parents, last = key.split(".")
    section = values
    for parent in parents:
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            raise ConfigError(f"override {override!r}: {parent} is a value, not a section")
    section[last] = _parse(text, f"override {override!r}")


def _describe(problem: ErrorDetails) -> str:
    """`train.batch_size: got -1, expected greater than 0`, from one of pydantic's errors."""
    name, siblings = _locate(problem["loc"])
    kind, message, got = problem["type"], problem["msg"], problem["input"]
    if kind == "extra_forbidden":
        close = difflib.get_close_matches(str(problem["loc"][-1]), siblings, n=1, cutoff=0.5)
        advice = f"did you mean {close[0]}?" if close else f"the keys are {', '.join(siblings)}"
        return f"{name}: unknown key; {advice}"
    if kind == "missing":
        return f"{name}: missing; it has no default"
    if kind == "union_tag_not_found":
        return f"{name}.kind: missing; it has no default"
    if kind == "union_tag_invalid":
        context = problem.get("ctx", {})
        return f"{name}.kind: got {context['tag']!r}, expected {context['expected_tags']}"
    if kind == "value_error":
        text = message.removeprefix("Value error, ")
        return f"{name}: {text}" if name else text
    expected = "a path" if kind == "path_type" else message.removeprefix("Input should be ")
    return f"{name}: got {got!r}, expected {expected}"


def _locate(loc: tuple[int | str, ...]) -> tuple[str, list[str]]:
    """The dotted key of a pydantic location, and the keys that are valid beside its last part.

    Inside a discriminated union pydantic inserts the union's tag; a reader of the YAML never wrote
    that, so the models are walked along and tags dropped.
    """
    model: type[BaseModel] | None = RunConfig
    names: list[str] = []
    siblings: list[str] = []
    parts = list(loc)
    while parts:
        part = parts.pop(0)
        names.append(str(part))
        if isinstance(part, int):  # of a list, whose members are of the same model
            continue
        fields = model.model_fields if model is not None else {}
        siblings = [key for key, field in fields.items() if not field.exclude]
        field = fields.get(str(part))
        choices = [] if field is None else [field.annotation, *get_args(field.annotation)]
        models = [c for c in choices if isinstance(c, type) and issubclass(c, BaseModel)]
        if field is not None and field.discriminator and parts:
            tag = parts.pop(0)
            models = [m for m in models if tag in get_args(m.model_fields["kind"].annotation)]
        elif field is not None and not models:
            # What follows names a member of a plain union, not a key.
            parts = [rest for rest in parts if isinstance(rest, int)]
        model = models[0] if models else None
    return ".".join(names), siblings


def check_keys(config: RunConfig, keys: Sequence[str]) -> Sequence[str]:
    """The keys, if the config has them all, as keys or as sections.

    Raises:
        ValueError: it has not; names the first one that is missing, and those there are beside it.
    """
    dump = config.model_dump(mode="json")
    for key in keys:
        values: Any = dump
        for part in key.split("."):
            if not isinstance(values, dict) or part not in values:
                there = f"; there are {', '.join(values)}" if isinstance(values, dict) else ""
                raise ValueError(f"--allow-change {key}: the config has no such key{there}")
            values = values[part]
    return keys
