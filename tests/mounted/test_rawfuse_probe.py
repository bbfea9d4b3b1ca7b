"""``python -m rawfuse probe``: what it tells is what this kernel does, and where FUSE cannot be used it says why."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rawfuse import InitFlag
from rawfuse.negotiate import DEFAULT, FEATURES, page_limit
from rawfuse.testing.mounts import MOUNTINFO
from tests.mounted.test_rawfuse_session import as_nobody

PROBE = [sys.executable, "-m", "rawfuse", "probe"]
pytestmark = pytest.mark.usefixtures("fuse_watchdog")


def run(*command: str | Path, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=50, env=environment, check=False)


def report(*before: str) -> dict[str, Any]:
    done = run(*before, *PROBE, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_what_it_tells() -> None:
    mounts = Path(MOUNTINFO).read_text()
    found = report()
    assert Path(MOUNTINFO).read_text() == mounts, "nobody sees its mount"
    assert found["kernel"] == os.uname().release
    assert found["user_namespace"] is False
    assert found["limits"]["max_request"] == min(1 << 20, page_limit() * os.sysconf("SC_PAGE_SIZE"))
    assert found["limits"]["read_ahead"] == 4 << 20
    assert (found["limits"]["max_background"], found["limits"]["congestion_threshold"]) == (64, 48)
    assert found["transports"]["device"] == found["transports"]["clones"] == ""
    features = {InitFlag[feature["name"]]: feature for feature in found["features"]}
    assert set(features) == set(FEATURES)
    for flag, feature in features.items():
        if feature["state"] == "agreed":
            assert flag & DEFAULT and feature["offered"]
        elif feature["state"] == "possible":
            assert FEATURES[flag].served and feature["offered"]
        assert (feature["state"] == "off") == bool(feature["why"])
        if not FEATURES[flag].served:
            assert feature["why"] == "rawfuse does not serve it"
    assert (features[InitFlag.OVER_IO_URING]["state"] == "possible") == (found["transports"]["uring"] == "")
    assert features[InitFlag.EXPLICIT_INVAL_DATA]["state"] == "possible", "what excludes it is not asked for then"


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_its_reader_is_gone(options: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as output:
        done = subprocess.run([*PROBE, *options], stdout=output, stderr=subprocess.PIPE, timeout=50, check=False)
    assert (done.returncode, done.stderr) == (1, b"")


def test_for_people() -> None:
    done = run(*PROBE)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"Linux {os.uname().release} speaks FUSE 7." in done.stdout
    assert "  transport device             works\n" in done.stdout
    for flag in FEATURES:
        assert f" {flag.name} " in done.stdout


def test_without_privilege() -> None:
    """In a user namespace; passthrough is for the initial one. (Another user could not read what root runs from.)"""
    found = report("setpriv", "--inh-caps=-sys_admin", "--bounding-set=-sys_admin")
    assert found["user_namespace"] is True
    assert found["transports"]["device"] == ""
    assert "CAP_SYS_ADMIN" in found["passthrough"]


def in_namespace(setup: str) -> list[str]:
    """A shell command that prepares a mount namespace, then the probe in it."""
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", f'{setup} && exec "$@"', "sh", *PROBE]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (in_namespace("mount -t tmpfs none /dev"), "/dev/fuse does not exist: load the kernel module"),
        (
            in_namespace("mount -t tmpfs none /mnt && touch /mnt/fuse && mount --bind /mnt/fuse /dev/fuse"),
            "cannot mount on",
        ),
    ],
    ids=["none", "another file"],
)
def test_no_device(command: list[str], said: str) -> None:
    fails_clearly(command, said)


def test_no_permission() -> None:
    setup = "mount -t tmpfs none /mnt && mknod -m 600 /mnt/fuse c 10 229 && mount --bind /mnt/fuse /dev/fuse"
    command = in_namespace(setup)
    position = command.index(PROBE[0])
    fails_clearly([*command[:position], *as_nobody(), *PROBE], "no permission to open /dev/fuse")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("import rawfuse.negotiate as module; module.OLDEST_MINOR = 200", "the kernel speaks FUSE 7."),
        (
            "import types, rawfuse.probe\nrawfuse.probe.lib = types.SimpleNamespace(rawfuse_unshare=lambda flags: -1)",
            "cannot make a mount namespace (Operation not permitted): run as root",
        ),
    ],
    ids=["old kernel", "no namespace"],
)
def test_what_this_machine_is_not(change: str, said: str) -> None:
    code = f"{change}\nfrom rawfuse.__main__ import main\nmain(['probe'])"
    fails_clearly([sys.executable, "-c", code], said)


def fails_clearly(command: list[str], said: str) -> None:
    before = Path(MOUNTINFO).read_text()
    done = run(*command)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("rawfuse: ") and said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert Path(MOUNTINFO).read_text() == before
