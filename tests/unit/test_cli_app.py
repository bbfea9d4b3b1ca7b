"""The command line as users see it: help, errors in one line, exit statuses, start-up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from polefs import __version__
from polefs.cli import helper
from polefs.cli.app import run

COMMANDS = ("mount", "umount", "format", "status", "fsck", "flush", "log-level")


def polefs(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "polefs", *arguments], capture_output=True, text=True, check=False, timeout=60
    )


def fails(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> tuple[int, str]:
    """Exit status and the one line on stderr, without its prefix."""
    code = run(arguments)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("polefs: ")
    assert err.count("\n") == 1
    assert code != 0
    return code, err.removeprefix("polefs: ").rstrip("\n")


def test_version_and_module() -> None:
    for flag in ("--version", "-V"):
        done = polefs(flag)
        assert (done.returncode, done.stdout, done.stderr) == (0, f"polefs {__version__}\n", "")


def test_its_reader_is_gone() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as output:
        command = [sys.executable, "-m", "polefs", "status", "--json"]
        done = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert run([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert "Example" in out
    assert f"polefs {command}" in out


def test_help_names_all_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(command in out for command in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["dance"], 2, "No such command"),
        (["mount"], 2, "Missing argument"),
        (["mount", "--bogus", "/x"], 2, "No such option"),
        (["mount", "a", "b", "c"], 2, "too many arguments"),
        (["mount", ""], 2, "empty string"),
        (["mount", "-o", "bogus", "/x"], 1, "unknown mount option 'bogus'"),
        (["mount", "-o", "volume=/a", "/b", "/x"], 2, "given twice"),
        (["mount", "--log-level", "loud", "/x"], 2, "unknown log level"),
        (["umount"], 2, "Missing argument"),
        (["umount", "/proc"], 1, "no polefs mount but proc"),
        (["format", "--capacity", "lots", "/x"], 2, "is no size"),
        (["format", "--inodes", "-1", "/x"], 2, "--inodes"),
    ],
)
def test_wrong_arguments(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, says: str) -> None:
    got, line = fails(capsys, arguments)
    assert says in line
    assert got == code


def test_nothing_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = str(tmp_path)
    for arguments, says in (
        (["umount", path], "nothing is mounted"),
        (["status", path], "no polefs volume"),
        (["status", f"{path}/nowhere"], "there is no volume"),
        (["flush", path], "is not mounted"),
        (["log-level", path, "debug"], "is not mounted"),
    ):
        assert says in fails(capsys, arguments)[1]


def test_format_and_status(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    volume = str(tmp_path / "v")
    assert run(["format", "--capacity", "10G", "--inodes", "1000", "--name", "films", volume]) == 0
    assert "volume 'films'" in capsys.readouterr().out
    assert "volume already" in fails(capsys, ["format", volume])[1]
    assert run(["status", volume]) == 0
    shown = capsys.readouterr().out
    assert "mounted on:  nothing" in shown
    assert "0 B of 10.0 GiB" in shown
    assert "1 of 1000" in shown
    assert run(["status", "--json", volume]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status["name"] == "films"
    assert status["bytes_limit"] == 10 << 30
    assert status["mounted"] is False
    assert status["pid"] is None


def test_status_of_all_is_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["status", "--json"]) == 0
    assert isinstance(json.loads(capsys.readouterr().out), list)


def test_background_errors_come_from_the_daemon(tmp_path: Path) -> None:
    done = polefs("mount", str(tmp_path / "v"), str(tmp_path / "nowhere"))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"polefs: mount point {tmp_path}/nowhere does not exist")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "v").exists()


def test_foreground_errors_are_the_same(tmp_path: Path) -> None:
    done = polefs("mount", "-f", str(tmp_path / "v"), str(tmp_path / "nowhere"))
    assert done.returncode == 1
    assert done.stderr.startswith(f"polefs: mount point {tmp_path}/nowhere does not exist")
    assert done.stderr.count("\n") == 1


def test_modules_of_the_current_directory_are_not_run(tmp_path: Path) -> None:
    """The daemon is started from anywhere, as root too: a file there must not become part of it."""
    for name in ("msgspec", "uvloop", "logging", "sqlite3"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('hijacked')\n")
    program = (
        "import sys\n"
        "from polefs.node.background import start\n"
        "from polefs.node.options import MountRequest\n"
        "from polefs.node.errors import Refusal\n"
        "import os; os.chdir(sys.argv[1])\n"
        "try:\n"
        "    start(MountRequest(volume=sys.argv[1] + '/v', mountpoint=sys.argv[1] + '/nowhere'))\n"
        "except Refusal as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False, timeout=60
    )
    assert "does not exist" in done.stdout
    assert done.stderr == ""


def test_light_start() -> None:
    """Commands that only look do not load what only the daemon or the progress bar needs."""
    program = (
        "import sys\n"
        "from polefs.cli.app import run\n"
        "run(['umount', '/proc'])\n"
        "print(sorted({'rich', 'uvloop', 'rawfuse', 'sqlite3', 'asyncio'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert "rich" not in done.stdout
    assert "uvloop" not in done.stdout
    assert "rawfuse" not in done.stdout
    assert "sqlite3" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ([], helper.USAGE, "needs a volume and a mount point"),
        (["/v"], helper.USAGE, "needs a volume and a mount point"),
        (["/v", "/m", "-z"], helper.USAGE, "option -z not recognized"),
        (["/v", "/m", "-o", "bogus"], helper.USAGE, "unknown mount option"),
        (["/v", "/m", "-N", "/proc/1/ns/mnt"], helper.USAGE, "nsenter"),
        (["/v", "/nowhere/at/all", "-o", "ro,user=ann", "-t", "polefs", "-v"], helper.FAILED, "does not exist"),
        (["/v", "/nowhere/at/all", "-s", "-o", "rw,bogus"], helper.FAILED, "does not exist"),
    ],
)
def test_mount_helper(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, says: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["mount.polefs", *arguments])
    assert helper.main() == code
    line = capfd.readouterr().err
    assert line.startswith("polefs: ")
    assert says in line
    assert line.count("\n") == 1


def test_mount_helper_fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["mount.polefs", "/v", "/nowhere/at/all", "-f", "-o", "ro"])
    assert helper.main() == 0
