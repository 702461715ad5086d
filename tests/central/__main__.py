"""`python -m tests.central`: the stand-in as a process of its own."""

from __future__ import annotations

import argparse
import signal
import threading
from pathlib import Path
from typing import Any

from .central import Central


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.central", description="A stand-in for the central XNAT."
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder for everything it keeps")
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=0, help="0 takes a free one")
    add("--port-file", type=Path, help="write the port here once listening")
    add("--project", action="append", default=[], help="project to offer (repeat for more; default P1)")
    add("--user", action="append", default=[], metavar="NAME:PASSWORD")
    add("--read-only", action="append", default=[], metavar="NAME", help="user without the right to edit")
    add("--admin", action="append", default=[], metavar="NAME", help="user with access to all data")
    add("--tls-cert", type=Path)
    add("--tls-key", type=Path)
    add("--idle", type=float, default=300.0, help="seconds of quiet before the auto-builder acts")
    add("--no-checksums", action="store_true")
    add("--site-anon", action="store_true", help="behave as with XNAT's default site script")
    add("--token-lifetime", type=float, default=2 * 24 * 3600.0)
    add("--misbehave", action="append", default=[], metavar="NAME[,OPTION=VALUE…]")
    return parser.parse_args()


def fault(text: str) -> tuple[str, dict[str, Any]]:
    """`cut-at,bytes=5000,times=1` as a name and options."""
    name, *options = text.split(",")
    return name, {key: number(value) for key, _, value in (option.partition("=") for option in options)}


def number(value: str) -> Any:
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            pass
    return {"true": True, "false": False}.get(value, value)


def main() -> None:
    args = arguments()
    users = dict(user.partition(":")[::2] for user in args.user)
    tls = (args.tls_cert, args.tls_key or args.tls_cert) if args.tls_cert else None
    central = Central(
        args.data,
        projects=args.project or ["P1"],
        users=users or None,
        read_only=args.read_only,
        admins=args.admin,
        tls=tls,
        host=args.host,
        port=args.port,
        idle=args.idle,
        checksums=not args.no_checksums,
        site_anon=args.site_anon,
        token_lifetime=args.token_lifetime,
    )
    for name, options in map(fault, args.misbehave):
        central.misbehave(name, **options)
    done = threading.Event()
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, lambda *_: done.set())
    with central:
        if args.port_file:
            args.port_file.write_text(str(central.port))
        print(f"listening on {central.url}", flush=True)
        done.wait()


if __name__ == "__main__":
    main()
