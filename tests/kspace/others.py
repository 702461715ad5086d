"""What the readers of others make of a file."""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path


def by_twixtools(path: Path) -> list[int]:
    """Blocks of each measurement without the last, as twixtools counts them."""
    import twixtools
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [len(one["mdb"]) for one in twixtools.read_twix(str(path), verbose=False, parse_geometry=False,
                                                               parse_pmu=False)]


def by_mapvbvd(path: Path) -> tuple[int, ...]:
    """Shape of the imaging scan's readouts: samples, channels, readouts."""
    import mapvbvd
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), \
            warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = mapvbvd.mapVBVD(str(path), quiet=True)
        image = (found[-1] if isinstance(found, list) else found).image
        image.flagRemoveOS = False
        return tuple(image.unsorted().shape)
