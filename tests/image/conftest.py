from __future__ import annotations

import fcntl
import os
import pickle
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest

import tests.disk.conftest  # noqa: F401 (it knows where relay_disk is)
from image.common import CACHE

PROJECT = Path(__file__).resolve().parents[2]


def pytest_addoption(parser):
    parser.addoption("--stick", type=Path, help="folder of `image/build --fast` to be tested, instead of a new one")
    parser.addoption("--cached", action="store_true", help="no stick where the ZFS module has to be compiled first")


@contextmanager
def one_at_a_time(file):
    """Wait for other processes that are in here with the same file."""
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build(output, *words, project=PROJECT, cache=CACHE):
    """Build a stick; the folder it is in. Skips where that cannot be: as a user, or from a mirror that went on."""
    if os.geteuid():
        pytest.skip("an image is built by root, or by root of a user namespace: see docs/image.md")
    if not shutil.which("mmdebstrap"):
        pytest.skip("what images are built with is not installed; as root, image/install test installs it")
    if subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True).returncode:
        pytest.skip("this machine allows no mount namespaces, as in a chroot, and images are built in one")
    CACHE.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(CACHE / ".building"):
        done = subprocess.run([project / "image/build", "--output", output, *words], check=False, text=True,
                              capture_output=True, env=os.environ | {"XDG_CACHE_HOME": str(cache.parent)})
    if "the mirror does not have" in done.stderr:
        pytest.skip(done.stderr[done.stderr.index("the mirror does not have"):].strip())
    assert done.returncode == 0, done.stderr
    return output


def pytest_collection_modifyitems(items):
    """Whichever comes first waits for the stick."""
    for item in items:
        if item.path.parent == Path(__file__).parent and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(3600))


@pytest.fixture(scope="session")
def once(tmp_path_factory, worker_id):
    """``once(name, make)``: make, in a folder that is given, what takes minutes, once for all processes of ``-n``."""
    root = tmp_path_factory.getbasetemp()

    def made(name, make):
        folder = (root if worker_id == "master" else root.parent) / f"once-{name}"
        folder.mkdir(exist_ok=True)
        with one_at_a_time(folder / ".lock"):
            done = folder / ".made"
            if not done.exists():
                done.write_bytes(pickle.dumps(make(folder)))
            return pickle.loads(done.read_bytes())
    return made


@pytest.fixture(scope="session")
def fast(request, once):
    """A stick for tests: throw-away keys, compressed little."""
    if given := request.config.getoption("--stick"):
        return given / "relay-any-test.img"
    if not shutil.which("qemu-system-x86_64"):
        pytest.skip("QEMU, which sticks are started in, is not installed; as root, image/install test installs it")
    if request.config.getoption("--cached") and not [*CACHE.glob("modules/*.deb")]:
        pytest.skip("the first stick takes some twenty minutes, for it compiles ZFS; run make image once")
    return once("stick", lambda folder: build(folder, "--fast")) / "relay-any-test.img"


@pytest.fixture(scope="session")
def keys(fast):
    """The throw-away keys that it was made with."""
    return CACHE / "throw-away"
