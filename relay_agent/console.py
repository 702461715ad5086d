"""What all commands of the console script share."""

from __future__ import annotations

import argparse
import json
import os
import pwd
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from relay_agent import config
from relay_agent.config import Config
from relay_agent.ledger import Ledger

DONE, FINDINGS, USAGE = 0, 1, 2


class Command(Protocol):
    """Adds a command to a parser; ``prints`` gives it ``--json``."""

    def __call__(self, name: str, action: Callable[[argparse.Namespace], int], text: str, example: str, *,
                 prints: bool = False) -> argparse.ArgumentParser:
        """The command's parser, for its own arguments."""


def commands_of(commands: Any, group: str = "", *, configured: bool = True) -> Command:
    """What adds commands to a parser, or to the sub-parser of a ``group``; all with help and an example."""
    def command(name: str, action: Callable[[argparse.Namespace], int], text: str, example: str, *,
                prints: bool = False) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = commands.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".",
            epilog=f"example:\n  relay-agent {group}{example}", formatter_class=argparse.RawDescriptionHelpFormatter)
        if configured:
            sub.add_argument("--config", type=Path, metavar="FILE",
                             default=Path(os.environ.get("RELAY_AGENT_CONFIG", config.DEFAULT_PATH)),
                             help="configuration file (default: $RELAY_AGENT_CONFIG or %(default)s)")
        if prints:
            sub.add_argument("--json", action="store_true", help="print JSON")
        sub.set_defaults(action=action)
        return sub
    return command


def load(options: argparse.Namespace) -> Config:
    """The configuration that the command was given."""
    return config.load(options.config)


def open_ledger(options: argparse.Namespace) -> tuple[Config, Ledger]:
    """The configuration and its ledger."""
    settings = load(options)
    return settings, Ledger(settings.ledger)


def actor() -> str:
    """Who decides, for the audit trail: the person behind sudo, where there is one."""
    return os.environ.get("SUDO_USER") or pwd.getpwuid(os.getuid()).pw_name


def print_json(value: Any) -> None:
    """What ``--json`` prints."""
    print(json.dumps(value, indent=2))


def said(text: str) -> int:
    """Tell that it is done."""
    print(text)
    return DONE
