"""The commands on real mounts: mount, status, umount, signals, refusals, fstab's helper, users without privilege."""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rawfuse import FOREVER
from rawfuse.testing.fixtures import make_scratch
from rawfuse.testing.mounts import find_mount, mounts, umount_syscall
from rawfuse.testing.watchdog import Watchdog
from tests.mounted.targets import REPOSITORY

DETACH = 2


def run(*arguments: str, module: str = "polefs", **options: Any) -> subprocess.CompletedProcess[str]:
    """A command from a directory that is not the repository."""
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd="/",
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **options.pop("env", {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **options,
    )


def polefs(*arguments: str, **options: Any) -> str:
    """A command that must succeed in silence on stderr; its output."""
    done = run(*arguments, **options)
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


def refused(*arguments: str, code: int = 1, **options: Any) -> str:
    """A command that must fail with one line; the line."""
    done = run(*arguments, **options)
    assert done.returncode == code, done
    assert done.stderr.startswith("polefs: "), done
    assert done.stderr.count("\n") == 1, done
    assert done.stdout == ""
    return done.stderr.removeprefix("polefs: ").rstrip("\n")


class Place:
    """A volume and a mount point for one test."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.volume = scratch / "volume"
        self.mountpoint = scratch / "mnt"
        self.mountpoint.mkdir()

    def mount(self, *options: str) -> None:
        assert polefs("mount", *options, str(self.volume), str(self.mountpoint)) == ""

    def umount(self, *options: str) -> None:
        assert polefs("umount", *options, str(self.mountpoint)) == ""

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = json.loads(polefs("status", "--json", str(self.volume)))
        return status

    @property
    def pid(self) -> int:
        pid: int = self.status()["pid"]
        return pid

    def clean(self) -> None:
        """Nothing of the test is left mounted or running."""
        for line in reversed(mounts()):
            if line.mountpoint.startswith(f"{self.scratch}/") and run("umount", "--lazy", line.mountpoint).returncode:
                umount_syscall(line.mountpoint, DETACH)


@pytest.fixture
def place(watchdog: Watchdog) -> Iterator[Place]:
    scratch = make_scratch("polefs-cli")
    scratch.chmod(0o755)
    place = Place(scratch)
    try:
        with watchdog.deadline(60):
            yield place
    finally:
        place.clean()
        shutil.rmtree(scratch)


def has_ended(pid: int) -> bool:
    """Whether the process is gone, or is a zombie that the init of this machine has not yet collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_for_end(pidfd: int) -> None:
    """Until the process has ended; the test's deadline is the limit."""
    import select

    select.select([pidfd], [], [])
    os.close(pidfd)


def test_mount_status_umount_and_mount_again(place: Place) -> None:
    place.mount()
    mount = find_mount(place.mountpoint)
    assert mount is not None
    assert (mount.kind, mount.source) == ("fuse.polefs", str(place.volume))
    assert "allow_other" in mount.super_options
    assert "default_permissions" in mount.super_options
    (place.mountpoint / "file").write_text("hello")
    by_volume = place.status()
    by_mountpoint = json.loads(polefs("status", "--json", str(place.mountpoint)))
    for status in (by_volume, by_mountpoint):
        assert status["mounted"] is True
        assert status["mountpoint"] == str(place.mountpoint)
        assert status["volume"] == str(place.volume)
        assert status["inodes_used"] == 2
        assert status["read_only"] is False
        assert status["log_file"] == str(place.volume / "log" / "polefs.log")
    text = run("status").stdout
    assert f"mounted on:  {place.mountpoint} (read-write" in text
    pid = by_volume["pid"]
    assert Path(by_volume["log_file"]).read_text().count("mounted") == 1
    place.umount()
    assert find_mount(place.mountpoint) is None
    assert has_ended(pid)
    assert place.status()["mounted"] is False
    place.mount()
    assert (place.mountpoint / "file").read_text() == "hello"
    place.umount()
    assert polefs("fsck", "--data", str(place.volume)).strip().endswith("clean")


def test_the_daemon_keeps_nothing_of_its_starter(place: Place) -> None:
    place.mount()
    pid = place.pid
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    for fd in (0, 1):
        assert os.readlink(f"/proc/{pid}/fd/{fd}") == "/dev/null"
    assert os.readlink(f"/proc/{pid}/fd/2") == str(place.volume / "log" / "polefs.log")
    assert os.getsid(pid) == pid
    os.kill(pid, signal.SIGHUP)
    (place.mountpoint / "still").touch()
    place.umount()


def test_default_volume_and_odd_names(place: Place) -> None:
    odd = place.scratch / "a b\\c,d#é"
    odd.mkdir()
    env = {"XDG_DATA_HOME": str(place.scratch / "data home")}
    polefs("mount", str(odd), env=env)
    try:
        (odd / "x").touch()
        status = json.loads(polefs("status", "--json", str(odd)))
        assert status["volume"] == str(place.scratch / "data home" / "polefs" / "default")
    finally:
        polefs("umount", str(odd))


def test_options_reach_the_kernel(place: Place) -> None:
    place.mount("-o", "noatime,nosuid,nodev", "-o", "noexec,noallow_other,_netdev,x-test=1")
    mount = find_mount(place.mountpoint)
    assert mount is not None
    assert {"rw", "noatime", "nosuid", "nodev", "noexec"} <= set(mount.options.split(","))
    assert "allow_other" not in mount.super_options
    (place.mountpoint / "file").write_text("x")
    place.umount()
    place.mount("-o", "ro")
    assert place.status()["read_only"] is True
    assert (place.mountpoint / "file").read_text() == "x"
    with pytest.raises(OSError, match="Read-only"):
        (place.mountpoint / "new").touch()
    place.umount()


def test_second_mounts_are_refused(place: Place) -> None:
    place.mount()
    other = place.scratch / "other"
    other.mkdir()
    line = refused("mount", str(place.volume), str(other))
    assert f"is mounted on {place.mountpoint} by process {place.pid}" in line
    line = refused("mount", str(place.scratch / "volume2"), str(place.mountpoint))
    assert f"is already mounted on {place.mountpoint}" in line
    line = refused("fsck", str(place.volume), code=8)
    assert "is mounted on" in line
    assert not (place.scratch / "volume2").exists()
    (place.mountpoint / "alive").touch()
    place.umount()


def test_busy_and_lazy(place: Place) -> None:
    place.mount()
    with open(place.mountpoint / "file", "w") as file:
        file.write("kept")
        file.flush()
        assert "is in use" in refused("umount", str(place.mountpoint))
        (place.mountpoint / "alive").touch()
        pid = place.pid
        place.umount("--lazy")
        assert find_mount(place.mountpoint) is None
        assert has_ended(pid)
        with pytest.raises(OSError):
            os.fstat(file.fileno())
            os.stat(f"/proc/self/fd/{file.fileno()}")
            os.write(file.fileno(), b"more")
    place.mount()
    assert (place.mountpoint / "file").read_text() == "kept"
    place.umount()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("busy", [False, True])
def test_signals_unmount(place: Place, number: signal.Signals, busy: bool) -> None:
    place.mount()
    pid = place.pid
    pidfd = os.pidfd_open(pid)
    (place.mountpoint / "file").write_text("x" * 100_000)
    user = subprocess.Popen(["sleep", "1000"], cwd=place.mountpoint) if busy else None
    try:
        os.kill(pid, number)
        wait_for_end(pidfd)
    finally:
        if user is not None:
            user.kill()
            user.wait()
    assert find_mount(place.mountpoint) is None
    place.mount()
    assert (place.mountpoint / "file").read_text() == "x" * 100_000
    place.umount()


def test_a_killed_daemon(place: Place) -> None:
    place.mount()
    (place.mountpoint / "file").write_text("acknowledged")
    pid = place.pid
    pidfd = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    wait_for_end(pidfd)
    line = refused("mount", str(place.volume), str(place.mountpoint))
    assert "is a dead mount" in line
    assert f"polefs umount {place.mountpoint}" in line
    assert "dead" in polefs("status", str(place.mountpoint))
    place.umount()
    assert find_mount(place.mountpoint) is None
    place.mount()
    assert (place.mountpoint / "file").read_text() == "acknowledged"
    place.umount()
    polefs("fsck", "--data", str(place.volume))


def test_unmounted_from_outside(place: Place) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "polefs", "mount", str(place.volume), str(place.mountpoint)], cwd=REPOSITORY
    )
    assert process.wait() == 0
    pidfd = os.pidfd_open(place.pid)
    (place.mountpoint / "file").write_text("x")
    umount_syscall(str(place.mountpoint))
    wait_for_end(pidfd)
    assert place.status()["dirty_bytes"] is None
    polefs("fsck", str(place.volume))


def test_bind_mounts(place: Place) -> None:
    """A bind mount of a polefs mount goes away alone."""
    bound = place.scratch / "bound"
    bound.mkdir()
    place.mount()
    subprocess.run(["mount", "--bind", str(place.mountpoint), str(bound)], check=True)
    polefs("umount", str(bound))
    assert find_mount(bound) is None
    assert place.status()["mounted"] is True
    place.umount()


def test_flush_and_log_level(place: Place) -> None:
    place.mount("--log-level", "error")
    assert place.status()["log_level"] == "error"
    (place.mountpoint / "file").write_bytes(os.urandom(300_000))
    polefs("flush", str(place.mountpoint))
    assert place.status()["dirty_bytes"] == 0
    assert any(path.is_file() for path in (place.volume / "objects").rglob("*"))
    polefs("log-level", str(place.volume), "debug")
    assert place.status()["log_level"] == "debug"
    assert "unknown log level" in refused("log-level", str(place.volume), "loud", code=2)
    place.umount()


def test_log_file_and_trace(place: Place) -> None:
    log, trace = place.scratch / "logs" / "mine.log", place.scratch / "wire"
    place.mount("--log-file", str(log), "--trace", str(trace))
    assert place.status()["log_file"] == str(log)
    (place.mountpoint / "directory").mkdir()
    place.umount()
    assert "mounted" in log.read_text()
    assert "MKDIR" in trace.read_text()
    assert "cannot write the trace" in refused(
        "mount", "--trace", "/nowhere/wire", str(place.volume), str(place.mountpoint)
    )
    assert find_mount(place.mountpoint) is None


def test_the_kernel_asks_once(place: Place) -> None:
    """Names, missing names, attributes and targets of links are the kernel's to know for good: nobody else changes
    them."""
    trace = place.scratch / "wire"
    place.mount("--trace", str(trace))
    for number in range(20):
        (place.mountpoint / f"file{number}").write_bytes(b"x" * number)
        (place.mountpoint / f"link{number}").symlink_to(f"target{number}")

    def look() -> None:
        for number in range(20):
            assert (place.mountpoint / f"file{number}").stat().st_size == number
            assert os.readlink(place.mountpoint / f"link{number}") == f"target{number}"
            assert not (place.mountpoint / f"target{number}").exists()

    look()
    told = trace.read_text()
    look()
    assert trace.read_text() == told
    for entry in (r"entry_ttl=(\d+)", r"attributes=Attributes.* attr_ttl=(\d+)"):
        times = re.findall(entry, told)
        assert len(times) >= 40
        assert set(times) == {str(FOREVER)}
    place.umount()


def test_newer_formats(place: Place) -> None:
    place.mount()
    place.umount()
    file = place.volume / "volume.json"
    info = json.loads(file.read_text())
    file.write_text(json.dumps(info | {"format": 99}))
    for command in (("mount", str(place.volume), str(place.mountpoint)), ("status", str(place.volume))):
        assert "upgrade polefs" in refused(*command)
    assert "upgrade polefs" in refused("fsck", str(place.volume), code=8)
    file.write_text(json.dumps(info))
    program = "import sqlite3, sys; sqlite3.connect(sys.argv[1]).execute('PRAGMA user_version=99')"
    subprocess.run(
        [sys.executable, "-c", program, str(place.volume / "meta.db")],
        check=True,
    )
    assert "upgrade polefs" in refused("mount", str(place.volume), str(place.mountpoint))


def test_damaged_metadata(place: Place) -> None:
    place.mount()
    place.umount()
    database = place.volume / "meta.db"
    database.write_bytes(b"SQLite format 3\0" + os.urandom(4096))
    refused("mount", str(place.volume), str(place.mountpoint))
    database.unlink()
    assert "lost its metadata" in refused("mount", str(place.volume), str(place.mountpoint))


def test_mount_helper(place: Place) -> None:
    done = run(
        str(place.volume), str(place.mountpoint), "-o", "rw,noatime,user=root", "-n", "-t", "polefs",
        module="polefs.cli.helper",
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    mount = find_mount(place.mountpoint)
    assert mount is not None
    assert "noatime" in mount.options
    done = run(str(place.volume), str(place.mountpoint), module="polefs.cli.helper")
    assert done.returncode == 32
    assert "already mounted" in done.stderr
    place.umount()


def test_mount_program_and_fstab(place: Place, tmp_path: Path) -> None:
    """mount(8) with the installed helper, which stands in /sbin of a namespace of our own."""
    helper_dir = tmp_path / "root"
    # The environment of the running tests as it is: make is not to install anything (-o).
    words = [f"DESTDIR={helper_dir}", f"python={sys.executable}"]
    installed = str(REPOSITORY / ".venv" / ".installed")
    subprocess.run(["make", "-s", "-o", installed, "install-helper", *words], cwd=REPOSITORY, check=True)
    helper = helper_dir / "sbin" / "mount.polefs"
    fstab = tmp_path / "fstab"
    fstab.write_text(f"{place.volume} {place.mountpoint} polefs noatime,nofail,noauto 0 0\n")
    target = Path("/sbin/mount.polefs")
    if target.exists():
        pytest.fail(f"{target} is installed on this machine: remove it for the test", pytrace=False)
    target.symlink_to(helper)
    try:
        subprocess.run(["mount", "-T", str(fstab), str(place.mountpoint)], check=True, timeout=60)
    finally:
        target.unlink()
    mount = find_mount(place.mountpoint)
    assert mount is not None
    assert (mount.kind, mount.source) == ("fuse.polefs", str(place.volume))
    (place.mountpoint / "file").touch()
    place.umount()


def test_users_without_privilege(place: Place) -> None:
    """An ordinary user mounts through fusermount3, alone sees the mount, and unmounts it."""
    if shutil.which("fusermount3") is None:
        pytest.fail("users mount through fusermount3: apt-get install fuse3", pytrace=False)
    nobody = pwd.getpwnam("nobody")
    home = place.scratch / "home"
    home.mkdir()
    os.chown(home, nobody.pw_uid, nobody.pw_gid)
    # The interpreter may stand where that user cannot read, so all modules are loaded first.
    program = (
        "import concurrent.futures.thread, encodings.unicode_escape, os, sys\n"
        "import polefs.data.files, polefs.meta.service, polefs.objects.directory\n"
        "from polefs.cli.mount import make_request, mount\n"
        "from polefs.node import daemon\n"
        "from polefs.node.options import parse_options\n"
        f"os.setgroups([]); os.setgid({nobody.pw_gid}); os.setuid({nobody.pw_uid})\n"
        "os.chdir(sys.argv[1])\n"
        "os.mkdir('mnt')\n"
        "request = make_request('volume', 'mnt', parse_options([]))\n"
        "request.foreground = True\n"
        "mount(request)\n"
    )
    device = os.stat("/dev/fuse")
    os.chmod("/dev/fuse", 0o666)
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(home)],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stderr=subprocess.PIPE,
            text=True,
        )
        mountpoint = home / "mnt"
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if " mounted " in line:
                break
        mount = find_mount(mountpoint)
        assert mount is not None, "".join(said)
        assert {"nosuid", "nodev"} <= set(mount.options.split(","))
        assert f"user_id={nobody.pw_uid}" in mount.super_options
        with pytest.raises(PermissionError):
            os.listdir(mountpoint)
        write = (
            "import os, sys; os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2])); open(sys.argv[1], 'w').close()"
        )
        subprocess.run([sys.executable, "-c", write, str(mountpoint / "file"), str(nobody.pw_uid)], check=True)
        process.send_signal(signal.SIGTERM)
        process.communicate()
        assert process.returncode == 0
        assert find_mount(mountpoint) is None
    finally:
        os.chmod("/dev/fuse", device.st_mode & 0o7777)


def test_no_device(place: Place) -> None:
    """/dev/fuse missing, in a mount namespace that hides it."""
    command = f"mount -t tmpfs none /dev && exec {sys.executable} -m polefs mount {place.volume} {place.mountpoint}"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", command], cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    assert "/dev/fuse does not exist" in done.stderr


def test_no_permission_to_mount(place: Place) -> None:
    """Root without CAP_SYS_ADMIN, as in a plain container, and without fusermount3."""
    command = [sys.executable, "-m", "polefs", "mount", str(place.volume), str(place.mountpoint)]
    done = subprocess.run(
        ["setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin", *command],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("polefs: ")
    assert done.stderr.count("\n") == 1
    assert find_mount(place.mountpoint) is None
