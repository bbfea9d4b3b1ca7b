"""How each file system of the comparison is made, mounted and emptied of its local caches."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from bench import peers
from bench.runner import CLIENT, StepError
from bench.servers import Server, ServerError, Usage

REPOSITORY = Path(__file__).resolve().parent.parent


class System:
    """One file system, all of it below ``base``. A `Target` of the runner between ``mount`` and ``unmount``."""

    name = ""
    client: Sequence[str] = CLIENT
    figures: Collection[str] | None = None
    """Those that make sense for it; None: all."""

    def __init__(self, base: Path, environment: peers.PeersEnvironment) -> None:
        self.base = base / self.name
        self.base.mkdir()
        self.environment = environment
        self.mountpoint = self.base / "mnt"
        self.mountpoint.mkdir()
        self.root = str(self.mountpoint / "bench")
        self.unmount_seconds: list[float] = []
        self._server: Server | None = None
        self._ended = Usage(0.0, 0.0)

    def prepare(self) -> None:
        """Make the volume. `Missing` when it cannot be measured here."""

    def command(self) -> list[str]:
        """The server in the foreground."""
        raise NotImplementedError

    def environ(self) -> Mapping[str, str]:
        return {}

    def empty_caches(self) -> None:
        """Local caches, while unmounted."""

    def mount(self) -> None:
        """ServerError."""
        self._server = Server(self.command(), str(self.mountpoint), self.base / "log", self.environ())

    def unmount(self) -> None:
        """ServerError when the server did not end well."""
        if server := self._server:
            self._server = None
            try:
                self.unmount_seconds.append(server.stop())
            finally:
                self._add_usage(server)

    def _add_usage(self, server: Server) -> None:
        used = server.last
        self._ended = Usage(self._ended.cpu_seconds + used.cpu_seconds, max(self._ended.peak_mib, used.peak_mib))

    def trouble(self) -> str:
        """A server that is gone: what follows would measure the empty mount point."""
        return "" if self._server and self._server.serving() else "the server has ended"

    def usage(self) -> Usage | None:
        now = self._server.usage() if self._server else Usage(0.0, 0.0)
        return Usage(self._ended.cpu_seconds + now.cpu_seconds, max(self._ended.peak_mib, now.peak_mib))

    def server_pid(self) -> int | None:
        return self._server.pid if self._server else None

    def bind(self, cpus: set[int]) -> None:
        """Let the server run on these CPUs only."""
        if self._server:
            self._server.bind(cpus)

    def abort(self) -> None:
        """Kill the server; what follows in its group fails."""
        if self._server:
            self._add_usage(self._server)
            self._server.kill()
            self._server = None

    def revive(self) -> None:
        """Mount again what was aborted or has died. ServerError."""
        if self.trouble():
            self.abort()
            self.mount()

    def remount(self) -> bool:
        try:
            self.unmount()
            self.empty_caches()
            self.mount()
        except ServerError as error:
            raise StepError(str(error)) from None
        return True


class Ext4(System):
    """The plain directory that all the others keep their data on."""

    name = "plain"

    def mount(self) -> None:
        pass

    def trouble(self) -> str:
        return ""

    def usage(self) -> Usage | None:
        return None

    def remount(self) -> bool:
        return False


class Polefs(System):
    """Embedded: a volume directory, default options."""

    name = "polefs"

    def prepare(self) -> None:
        if not (REPOSITORY / "polefs" / "__main__.py").exists():
            raise peers.Missing("no polefs in this tree")

    def command(self) -> list[str]:
        return [sys.executable, "-m", "polefs", "mount", "-f", str(self.base / "volume"), str(self.mountpoint)]

    def environ(self) -> Mapping[str, str]:
        return {"PYTHONPATH": str(REPOSITORY)}


class JuiceFS(System):
    """SQLite metadata, file storage, default options but for a cache directory of its own and no usage reports."""

    name = "juicefs"

    def prepare(self) -> None:
        self._program = self.environment.program("juicefs")
        self._meta = self._metadata()
        self._cache = self.base / "cache"
        words = [self._program, "format", *self._storage(), self._meta, "bench"]
        peers.run("format a JuiceFS volume", words, {**os.environ, **self.environ()})

    def _metadata(self) -> str:
        return f"sqlite3://{self.base / 'meta.db'}"

    def _storage(self) -> list[str]:
        return ["--storage", "file", "--bucket", f"{self.base / 'objects'}/"]

    def command(self) -> list[str]:
        cache = ["--cache-dir", str(self._cache), "--no-usage-report"]
        return [self._program, "mount", *cache, self._meta, str(self.mountpoint)]

    def environ(self) -> Mapping[str, str]:
        return {"HOME": str(self.base)}

    def empty_caches(self) -> None:
        shutil.rmtree(self._cache, ignore_errors=True)


class Shown(System):
    """A server that shows an existing directory again."""

    def prepare(self) -> None:
        self.source = self.base / "source"
        self.source.mkdir()


class PassthroughLL(Shown):
    """libfuse's low-level example in C, its defaults: attributes cached for one second."""

    name = "passthrough_ll"

    def prepare(self) -> None:
        super().prepare()
        self._program = peers.passthrough_ll(self.base)

    def command(self) -> list[str]:
        options = f"source={self.source},allow_other,default_permissions"
        return [self._program, "-f", "-o", options, str(self.mountpoint)]


class Mirror(Shown):
    """rawfuse's example. As root the kernel reads and writes the files by itself."""

    name = "mirror"
    options: tuple[str, ...] = ()

    def prepare(self) -> None:
        super().prepare()
        if not (REPOSITORY / "examples" / "mirror.py").exists():
            raise peers.Missing("no examples/mirror.py in this tree")

    def command(self) -> list[str]:
        return [sys.executable, "-m", "examples.mirror", *self.options, str(self.source), str(self.mountpoint)]

    def environ(self) -> Mapping[str, str]:
        return {"PYTHONPATH": str(REPOSITORY)}


class MirrorServed(Mirror):
    """The same, which reads and writes the files itself."""

    name = "mirror-served"
    options = ("--no-passthrough",)


class Pyfuse3(Shown):
    """A pass-through on pyfuse3 that behaves as its passthroughfs example (bench/pyfuse3_mirror.py)."""

    name = "pyfuse3"

    def prepare(self) -> None:
        super().prepare()
        self._python = self.environment.program("pyfuse3")

    def command(self) -> list[str]:
        script = str(Path(__file__).with_name("pyfuse3_mirror.py"))
        return [self._python, script, str(self.source), str(self.mountpoint)]


SYSTEMS: dict[str, type[System]] = {
    system.name: system for system in (Polefs, JuiceFS, Ext4, PassthroughLL, Mirror, MirrorServed, Pyfuse3)
}
DEFAULT = ("polefs", "juicefs", "plain", "passthrough_ll")
