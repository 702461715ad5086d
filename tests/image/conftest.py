from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import tests.disk.conftest  # noqa: F401 (it knows where relay_disk is)
from image.common import CACHE

PROJECT = Path(__file__).resolve().parents[2]


def pytest_addoption(parser):
    parser.addoption("--stick", type=Path, help="folder of `image/build --fast` to be tested, instead of a new one")
    parser.addoption("--cached", action="store_true", help="no stick where the ZFS module has to be compiled first")


def build(output, *words, project=PROJECT, cache=CACHE):
    """Build a stick; the folder it is in. Skips where that cannot be: as a user, or from a mirror that went on."""
    if os.geteuid():
        pytest.skip("an image is built by root, or by root of a user namespace: see docs/image.md")
    if not shutil.which("mmdebstrap"):
        pytest.skip("what images are built with is not installed; as root, image/install test installs it")
    if subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True).returncode:
        pytest.skip("this machine allows no mount namespaces, as in a chroot, and images are built in one")
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
def fast(request, tmp_path_factory):
    """A stick for tests: throw-away keys, compressed little."""
    if given := request.config.getoption("--stick"):
        return given / "relay-any-test.img"
    if not shutil.which("qemu-system-x86_64"):
        pytest.skip("QEMU, which sticks are started in, is not installed; as root, image/install test installs it")
    if request.config.getoption("--cached") and not [*CACHE.glob("modules/*.deb")]:
        pytest.skip("the first stick takes some twenty minutes, for it compiles ZFS; run make image once")
    return build(tmp_path_factory.mktemp("fast"), "--fast") / "relay-any-test.img"


@pytest.fixture(scope="session")
def keys(fast):
    """The throw-away keys that it was made with."""
    return CACHE / "throw-away"
