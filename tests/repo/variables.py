"""`python -m tests.repo.variables`: the variables of all roles as a page, from their argument specs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

PROJECT = Path(__file__).resolve().parents[2]
ROLES = sorted(path for path in (PROJECT / "roles").iterdir() if path.is_dir())


def spec(role: Path) -> dict[str, Any]:
    """The role's argument spec."""
    return yaml.safe_load((role / "meta/argument_specs.yml").read_text())["argument_specs"]["main"]


def text(description: str | list[str]) -> str:
    """A description as Markdown: Ansible's C(...) is code."""
    words = description if isinstance(description, str) else " ".join(description)
    return re.sub(r"C\(([^)]*)\)", r"`\1`", words).replace("|", "\\|")


def rows(options: dict[str, Any], above: str = "") -> Iterator[str]:
    """A row for each variable, and for each key of those that have keys."""
    for name, option in options.items():
        kind = f"list of {option['elements']}" if option.get("elements") else option["type"]
        if option.get("choices"):
            kind = " or ".join(f"`{choice}`" for choice in option["choices"])
        default = "required" if option.get("required") else f"`{str(option['default']).strip()}`" if (
            option.get("default") not in (None, "", [], {})) else ""
        yield f"| `{above}{name}` | {kind} | {default} | {text(option['description'])} |"
        yield from rows(option.get("options", {}), f"{above}{name}.")


def page() -> str:
    """The whole page."""
    parts = ["# Variables of the roles", "Made from the roles' argument specs by `make docs`."]
    for role in ROLES:
        found = spec(role)
        words = f"{found['short_description']}. {text(found.get('description', ''))}".strip()
        table = ["| variable | type | default | meaning |", "|---|---|---|---|", *rows(found["options"])]
        parts += [f"## {role.name}", words, "\n".join(table)]
    return "\n\n".join(parts)


if __name__ == "__main__":
    print(page())
