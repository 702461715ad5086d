"""The configuration in words: findings about a file, and the commented example, both made from the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

Model = type[BaseModel]

# What the validator says in terms of this program, in terms of the file.
_WORDS = {"tuple_type": "write a list, [...]", "model_type": "write a table, [...] with settings below it",
          "too_short": "there must be at least one"}


def finding(item: Any, root: Model, kinds: Mapping[Any, Model]) -> str:
    """One of pydantic's validation errors as `key = value: what is wrong. Remedy`.

    ``kinds`` maps the discriminators that pydantic puts into the path to the classes that they stand for.
    """
    steps = [step for step in item["loc"] if step not in kinds]
    key = "".join(f"[{step + 1}]" if isinstance(step, int) else f".{step}" for step in steps).lstrip(".")
    field = _field(item["loc"], root, kinds)
    remedy = f" {field.description}" if field is not None and field.description else ""
    if field is not None and field.examples:
        remedy += f" Example: {toml(field.examples[0])}"
    if item["type"] == "missing":
        return f"{key} is missing.{remedy}"
    if item["type"] == "extra_forbidden":
        return f"{key} is not a setting; remove it or correct its name (relay-agent example-config lists all)."
    if item["type"] == "union_tag_invalid":
        return f"{key}.kind = {toml(item['ctx']['tag'])}: use one of {', '.join(map(toml, kinds))}."
    what = _WORDS.get(item["type"]) or item["msg"].removeprefix("Value error, ").rstrip(".")
    secret = "credential" in steps or (steps and steps[-1] in ("url", "proxy") and "@" in str(item["input"]))
    hidden = isinstance(item["input"], (dict, BaseModel)) or secret
    value = "" if hidden else f" = {toml(item['input'])}"
    return f"{key}{value}: {what}.{remedy}" if key else f"{what}."


def _field(steps: tuple[str | int, ...], root: Model, kinds: Mapping[Any, Model]) -> Any:
    """The setting to which such a path leads; of destinations, in the class of its kind."""
    models: list[Any] = [root]
    field = None
    for step in steps:
        if isinstance(step, int):
            continue
        if step in kinds and len(models) > 1:
            models = [kinds[step]]
            continue
        field = next((m.model_fields[step] for m in models if step in m.model_fields), None)
        models = _models(field.annotation) if field is not None else []
    return field


def _models(annotation: Any) -> list[Model]:
    """The table classes inside an annotation such as ``tuple[Receiver, ...]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    found: list[Model] = []
    for part in getattr(annotation, "__args__", ()):
        found += [model for model in _models(part) if model not in found]
    return found


def toml(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(toml(part) for part in value) + "]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f'"{key}" = {toml(part)}' for key, part in value.items()) + " }"
    if isinstance(value, (int, float)):
        return str(value)
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def example(root: Model) -> str:
    """A commented configuration with every setting."""
    lines = ["# Configuration of the relay agent. Settings behind '#' show the default, or an example where",
             "# there is none. Check it with: relay-agent check --config FILE", ""]
    tables = [(name, field) for name, field in root.model_fields.items() if _models(field.annotation)]
    lines += _settings(root, skip={name for name, _ in tables})
    for name, field in tables:
        repeated = "tuple" in str(field.annotation)
        for number, model in enumerate(_models(field.annotation)):
            optional = number > 0 or name == "alert"
            lines += _table(name, model, repeated, "# " if optional else "")
    return "\n".join(lines) + "\n"


def _table(name: str, model: Model, repeated: bool, off: str) -> list[str]:
    doc = " ".join((model.__doc__ or "").split())
    lines = [f"# {doc}", off + (f"[[{name}]]" if repeated else f"[{name}]")]
    inner = {key: _models(field.annotation) for key, field in model.model_fields.items()}
    lines += [off + line if off and line and not line.startswith("#") else line
              for line in _settings(model, skip={key for key, models in inner.items() if models})]
    for key, models in inner.items():
        for part in models:
            field = model.model_fields[key]
            many = "tuple" in str(field.annotation)
            lines += [f"# {field.description}"] if field.description else []
            lines += _table(f"{name}.{key}", part, many, "# ")
    return lines


def _settings(model: Model, skip: set[str]) -> list[str]:
    lines: list[str] = []
    for key, field in model.model_fields.items():
        if key in skip:
            continue
        default = field.get_default(call_default_factory=True)
        required = field.is_required()
        shown = field.examples[0] if field.examples and (required or not isinstance(default, bool)) else default
        if shown is PydanticUndefined:
            shown = ""
        lines += [f"# {field.description}", f"{'' if required else '# '}{key} = {toml(shown)}"]
    return [*lines, ""]
