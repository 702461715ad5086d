"""What the XNAT destination makes of a session that moves while it looks, and of conflicts that are none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import pytest

from relay_agent.config_destinations import XNAT
from relay_agent.destinations import Retry, Stopped
from relay_agent.destinations.tokens import Tokens
from relay_agent.destinations.xnat import XNATDestination
from relay_agent.package import Manifest
from tests import data
from tests.central import Central
from tests.central.archive import Overwrite
from tests.central.commit import destination
from tests.central.prearchive import Key
from tests.destinations import UNLIMITED, images

REQUESTS = 9  # more than one look takes at a session of one series


@pytest.fixture
def central(tmp_path: Path) -> Iterator[Central]:
    with Central(tmp_path / "central", projects=["P1"], users={"relay": "secret"}) as there:
        yield there


@pytest.fixture
def there(tmp_path: Path, central: Central) -> XNATDestination:
    secret = tmp_path / "secret"
    secret.write_text("relay:secret", encoding="utf-8")
    secret.chmod(0o600)
    config = XNAT(name="central", url=central.url, credential=str(secret))
    return XNATDestination(config, UNLIMITED, Tokens(config, tmp_path / "tokens"), tmp_path)


def labelled(folder: Path, session: str) -> Manifest:
    """A shipment of one series of two."""
    return replace(images(folder / session, data.study(1, 2)), project="P1", subject="S1", session=session,
                   auto_archive=True)


def before_requests(there: XNATDestination, monkeypatch: pytest.MonkeyPatch, *events: tuple[int, Callable[[], Any]]
                    ) -> list[str]:
    """Have things happen at the central before its nth request from now; the requests."""
    seen: list[str] = []
    ask = there._web.ask

    def asked(method: str, path: str, **request: Any) -> Any:
        for number, event in events:
            if number == len(seen):
                event()
        seen.append(f"{method} {path}")
        return ask(method, path, **request)

    monkeypatch.setattr(there._web, "ask", asked)
    return seen


@pytest.mark.parametrize(("begins", "ends"), list(combinations_with_replacement(range(REQUESTS), 2)))
def test_a_session_is_never_nowhere(tmp_path: Path, central: Central, there: XNATDestination,
                                    monkeypatch: pytest.MonkeyPatch, begins: int, ends: int) -> None:
    """A commit that goes on after its time-out starts and ends at any point of a look: nothing counts as missing.

    It may be too early to say, and the next look then sees all of it in the archive.
    """
    manifest = labelled(tmp_path, "S1_MR1")
    there.send(manifest, manifest.items)
    [row] = central.prearchive_rows()
    key = Key.from_url(row["url"])

    def begin() -> None:
        central.prearchive.lock(key, "BUILDING")

    def end() -> None:
        central.prearchive.update(key, status="READY", built=1)
        central.archive.archive(key, destination(central, key), Overwrite())

    with monkeypatch.context() as patch:
        seen = before_requests(there, patch, (begins, begin), (ends, end))
        try:
            assert there.missing(manifest, None) == []
        except Retry:
            assert begins < len(seen), "it was put off, and nothing happened"
        assert len(seen) < REQUESTS
        if begins >= len(seen):
            begin()
        if ends >= len(seen):
            end()
    assert there.missing(manifest, None) == []
    assert central.prearchive_rows() == []
    assert len(there.prove(manifest, there.finish(manifest))) == 2


def test_what_came_twice_is_no_conflict(tmp_path: Path, central: Central, there: XNATDestination) -> None:
    """An import that a proxy cut off and that ends after the commit leaves copies behind: merged, not a person's."""
    manifest = labelled(tmp_path, "S1_MR1")
    there.send(manifest, manifest.items)
    there.finish(manifest)
    there.send(manifest, manifest.items)
    assert [row["name"] for row in central.prearchive_rows()] == ["S1_MR1"]
    assert len(there.prove(manifest, there.finish(manifest))) == 2
    assert central.prearchive_rows() == []


def test_what_is_another_there_is_a_conflict(tmp_path: Path, central: Central, there: XNATDestination) -> None:
    """A file of the same name with other bytes in the archive is not overwritten unasked."""
    manifest = labelled(tmp_path, "S1_MR1")
    there.send(manifest, manifest.items)
    there.finish(manifest)
    there.send(manifest, manifest.items)
    central.store.run("UPDATE file SET md5 = ? WHERE rowid = (SELECT max(rowid) FROM file)", "0" * 32)
    with pytest.raises(Stopped, match="was answered 409"):
        there.finish(manifest)
    assert len(central.prearchive_rows()) == 1


def test_a_conflict_that_somebody_else_settled(tmp_path: Path, central: Central, there: XNATDestination,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """Told 409 while staff archive it by hand: it lies in the archive, and that is all that was wanted."""
    manifest = labelled(tmp_path, "S1_MR1")
    there.send(manifest, manifest.items)
    [row] = central.prearchive_rows()
    key = Key.from_url(row["url"])
    central.misbehave("commit-conflict", times=2)

    def settle() -> None:
        central.archive.archive(key, destination(central, key), Overwrite())

    # rows, experiment, commit, rows, archive
    seen = before_requests(there, monkeypatch, (5, settle))
    location = there.finish(manifest)
    assert [request.split()[0] for request in seen[:5]] == ["GET", "GET", "POST", "GET", "POST"]
    assert len(there.prove(manifest, location)) == 2
