"""PostgreSQL for the tests: a server of its own in a temporary directory, which dies with pytest."""

from __future__ import annotations

import itertools
import os
import pwd
import queue
import shutil
import signal
import subprocess
import tempfile
import threading
from pathlib import Path

START_SECONDS = 60.0

_SETTINGS = {
    "listen_addresses": "",
    "fsync": "off",
    "full_page_writes": "off",
    "max_connections": "80",
    "shared_buffers": "64MB",
    "autovacuum_naptime": "1min",
    "log_min_messages": "warning",
}
_READY = "database system is ready to accept connections"


class ServerError(Exception):
    """The server did not start; the text has its log."""


def _programs() -> Path:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    if found:
        return found[-1].parent
    if program := shutil.which("postgres"):
        return Path(program).resolve().parent
    raise ServerError("there is no PostgreSQL here: apt-get install postgresql")


class PostgresServer:
    """A server on a Unix socket, for the user that may not be root. It can be stopped, killed and started again with
    what was stored. ``wrapper``: a command that runs it."""

    def __init__(self, *, wrapper: tuple[str, ...] = (), settings: dict[str, str] | None = None) -> None:
        # Short, for the sake of the socket's path; and where an unprivileged user may go.
        self.path = Path(tempfile.mkdtemp(prefix="polefs-pg-", dir="/tmp"))
        self._programs = _programs()
        self._wrapper = wrapper
        self._settings = _SETTINGS | (settings or {})
        self._process: subprocess.Popen[str] | None = None
        self._log: list[str] = []
        self._numbers = itertools.count(1)
        self._as_user: list[str] = []
        self.user = os.geteuid()
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            self.user = nobody.pw_uid
            os.chown(self.path, nobody.pw_uid, nobody.pw_gid)
            self._as_user = [f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}", "--clear-groups"]

    @property
    def socket(self) -> Path:
        return self.path / ".s.PGSQL.5432"

    def dsn(self, database: str = "postgres") -> str:
        return f"postgresql://test@/{database}?host={self.path}"

    def new_database(self) -> str:
        """The DSN of an empty database."""
        name = f"test{next(self._numbers)}"
        self.sql(f"CREATE DATABASE {name}")
        return self.dsn(name)

    def sql(self, statement: str, database: str = "postgres") -> str:
        """Run a statement as the administrator; what it prints, a row a line."""
        done = subprocess.run(
            [self._programs / "psql", "-h", self.path, "-U", "test", "-d", database, "-AtXqc", statement],
            capture_output=True,
            text=True,
            check=False,
            cwd="/",
        )
        if done.returncode:
            raise ServerError(done.stderr)
        return done.stdout.strip()

    def start(self) -> None:
        """Start it and return when it serves. ServerError with its log when it does not."""
        data = self.path / "data"
        if not data.exists():
            self._run("initdb", "-D", str(data), "-U", "test", "--auth=trust", "--no-sync", "--encoding=UTF8")
        settings = [argument for item in self._settings.items() for argument in ("-c", "=".join(item))]
        unprivileged = ["setpriv", "--pdeathsig", "KILL", *self._as_user]
        process = subprocess.Popen(
            [*self._wrapper, *unprivileged, self._programs / "postgres", "-D", data, "-k", self.path, *settings],
            cwd=self.path,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | {"LC_ALL": "C"},
        )
        self._process = process
        ready: queue.SimpleQueue[bool] = queue.SimpleQueue()
        threading.Thread(target=self._copy_log, args=(process, ready), daemon=True).start()
        try:
            serves = ready.get(timeout=START_SECONDS)
        except queue.Empty:
            serves = False
        if not serves:
            self.kill()
            raise ServerError("PostgreSQL did not start:\n" + "".join(self._log[-40:]))

    def _copy_log(self, process: subprocess.Popen[str], ready: queue.SimpleQueue[bool]) -> None:
        assert process.stderr is not None
        with process.stderr:
            for line in process.stderr:
                self._log.append(line)
                del self._log[:-1000]
                if _READY in line:
                    ready.put(True)
        ready.put(False)

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            ["setpriv", *self._as_user, self._programs / program, *arguments],
            cwd=self.path,
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"LC_ALL": "C"},
        )
        if done.returncode:
            raise ServerError(f"{program} failed:\n{done.stdout}{done.stderr}")

    def pause(self) -> None:
        """Stop the processes that serve, as a machine that hangs does: connections stay open, and nothing answers."""
        self._signal_all(signal.SIGSTOP)

    def go_on(self) -> None:
        self._signal_all(signal.SIGCONT)

    def _signal_all(self, number: int) -> None:
        assert self._process is not None
        done = subprocess.run(["ps", "-o", "pid=", "--ppid", str(self._process.pid)], capture_output=True, text=True)
        for pid in (self._process.pid, *map(int, done.stdout.split())):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                pass

    def stop(self) -> None:
        """End it in an orderly way; sessions are cut off."""
        self._end(signal.SIGINT)

    def kill(self) -> None:
        """As the loss of its machine's power, but for the disk: all its processes end without another step."""
        self._end(signal.SIGQUIT)

    def _end(self, number: int) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def discard(self) -> None:
        """Kill it and remove all that it has stored."""
        self.kill()
        shutil.rmtree(self.path, ignore_errors=True)
