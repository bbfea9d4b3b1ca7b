"""The figures: what each measures, in groups of steps that build on one another."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

KIB = 1024
MIB = 1024 * KIB
FSYNC_EVERY = 32
"""Random writes between two fsyncs."""
ABSENT = "no line of the tree has these words"

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """How much of each."""

    names: int = 3000
    directories: int = 2000
    small_files: int = 2000
    entries: int = 10_000
    big_mib: int = 256
    random_reads: int = 4000
    random_writes: int = 2000
    appends: int = 1000
    tree_files: int = 3000
    transactions_delete: int = 200
    transactions_wal: int = 500
    hot_seconds: float = 0.3
    settle_seconds: float = 0.2


FULL = Scale()
QUICK = Scale(
    names=600,
    directories=400,
    small_files=400,
    entries=2000,
    big_mib=64,
    random_reads=1500,
    random_writes=400,
    appends=300,
    tree_files=600,
    transactions_delete=50,
    transactions_wal=150,
    hot_seconds=0.1,
    settle_seconds=0.1,
)


@dataclass(frozen=True)
class Sources:
    """On the local disk: a tar archive of a tree of small files, and a git repository of the same tree."""

    tar: str
    repository: str


@dataclass(frozen=True)
class Step:
    """One run of a workload of ``bench.client``; a figure when it has a name."""

    workload: str
    arguments: Arguments
    name: str = ""
    unit: str = ""
    processes: int = 1
    cold: bool = False
    """After the kernel's caches were dropped."""
    needed: bool = False
    """Later steps need what it leaves: it runs even when its figure is not wanted."""


@dataclass(frozen=True)
class Group:
    name: str
    steps: Sequence[Step]
    remount: bool = False
    """Unmount, empty the local caches and mount again before it."""
    after: Sequence[str] = ()
    """Groups whose needed steps must have run before it."""

    def figures(self) -> list[str]:
        return [step.name for step in self.steps if step.name]


class Plan:
    """All groups in their order for one work directory in the measured file system (never touched here)."""

    def __init__(self, root: str, scale: Scale, sources: Sources) -> None:
        self._root_path = root
        self._scale = scale
        self._sources = sources

    def groups(self) -> list[Group]:
        return [
            self._names(),
            self._small_files(),
            self._listings(),
            self._big_file(),
            self._random_access(),
            self._tree(),
            self._sqlite(),
            self._remounted(),
        ]

    def chosen(self, wanted: Collection[str]) -> list[Group]:
        """The groups that these figures need."""
        groups = self.groups()
        needed = {group.name for group in groups if set(group.figures()) & set(wanted)}
        needed.update(name for group in groups if group.name in needed for name in group.after)
        return [group for group in groups if group.name in needed]

    def _at(self, name: str) -> str:
        return f"{self._root_path}/{name}"

    def _root(self) -> Step:
        return Step("make_directory", {"path": self._root_path}, needed=True)

    def _remove(self, *names: str) -> Step:
        return Step("remove", {"paths": [self._at(name) for name in names]}, needed=True)

    def _hot(self, arguments: Arguments) -> Arguments:
        return {**arguments, "seconds": self._scale.hot_seconds}

    def _names(self) -> Group:
        one: Arguments = {"directory": self._at("names"), "count": self._scale.names}
        four: Arguments = {"directory": self._at("names4"), "count": self._scale.names // 4}
        directories: Arguments = {"directory": self._at("directories"), "count": self._scale.directories}
        clear = self._remove("names", "names4", "directories")
        return Group(
            "names",
            [
                clear,
                Step("create", one, "create_1p", "files/s", needed=True),
                Step("create", four, "create_4p", "files/s", processes=4),
                Step("stat", one, "stat_cold", "ops/s", cold=True),
                Step("stat_hot", self._hot(one), "stat_hot", "ops/s"),
                Step("stat_enoent", one, "stat_enoent", "ops/s"),
                Step("chmod", one, "chmod", "ops/s"),
                Step("rename", one, "rename", "ops/s"),
                Step("unlink", one, "unlink", "ops/s"),
                Step("mkdir", directories, "mkdir", "ops/s", needed=True),
                Step("rmdir", directories, "rmdir", "ops/s"),
                clear,
            ],
        )

    def _small(self) -> Arguments:
        return {"directory": self._at("small"), "count": self._scale.small_files}

    def _small_files(self) -> Group:
        files: Arguments = {**self._small(), "size": 4 * KIB}
        return Group(
            "small files",
            [
                self._remove("small"),
                Step("write_files", files, "write4k_file", "files/s", needed=True),
                Step("read_files", files, "read4k_file_cold", "files/s", cold=True),
                Step("read_files_hot", self._hot(files), "read4k_file_hot", "files/s"),
            ],
        )

    def _entries(self) -> Arguments:
        return {"directory": self._at("entries"), "count": self._scale.entries}

    def _listings(self) -> Group:
        entries = self._entries()
        return Group(
            "listings",
            [
                Step("make_entries", entries, needed=True),
                Step("list_names", entries, "ls_f_cold", "entries/s", cold=True),
                Step("list_names_hot", self._hot(entries), "ls_f_hot", "entries/s"),
                Step("list_attributes", entries, "ls_l_cold", "entries/s", cold=True),
                Step("list_attributes_hot", self._hot(entries), "ls_l_hot", "entries/s"),
            ],
        )

    def _big(self) -> Arguments:
        return {"path": self._at("big"), "mib": self._scale.big_mib}

    def _big_file(self) -> Group:
        big = self._big()
        return Group(
            "one big file",
            [
                self._root(),
                Step("write_big", {**big, "block": 128 * KIB}, "seqwrite_128k", "MiB/s"),
                Step("write_big", {**big, "block": MIB}, "seqwrite_1m", "MiB/s", needed=True),
                Step("read_big", big, "seqread_cold", "MiB/s", cold=True),
                Step("read_big_hot", self._hot(big), "seqread_hot", "MiB/s"),
            ],
        )

    def _random_access(self) -> Group:
        path, appended = self._at("random"), self._at("appended")
        reads: Arguments = {"path": path, "count": self._scale.random_reads}
        writes: Arguments = {"path": path, "count": self._scale.random_writes, "fsync_every": FSYNC_EVERY}
        appends: Arguments = {"path": appended, "count": self._scale.appends}
        return Group(
            "random access",
            [
                self._root(),
                Step("write_big", {"path": path, "mib": self._scale.big_mib, "block": MIB}, needed=True),
                Step("random_read", reads, "randread4k_cold", "IOPS", cold=True),
                Step("random_read", reads, "randread4k_cold_4j", "IOPS", processes=4, cold=True),
                Step("random_read_hot", self._hot(reads), "randread4k_hot", "IOPS"),
                Step("random_write", writes, "randwrite4k_fsync", "IOPS"),
                Step("append", appends, "append4k_fsync", "ops/s"),
                self._remove("random", "appended"),
            ],
        )

    def _program(self, *words: str, within: str, status: int = 0, warm: str = "", seconds: float = 0.0) -> Arguments:
        return {
            "directory": within,
            "words": words,
            "files": self._scale.tree_files,
            "status": status,
            "warm": [warm] if warm else [],
            "seconds": seconds,
        }

    def _grep(self, seconds: float = 0.0) -> Arguments:
        return self._program("grep", "-r", ABSENT, ".", within=self._at("tree"), status=1, seconds=seconds)

    def _tree(self) -> Group:
        root, tree, clone = self._root_path, self._at("tree"), self._at("clone")
        tar, repository = self._sources.tar, self._sources.repository
        untar = self._program("tar", "xf", tar, within=tree, warm=tar)
        git_clone = self._program(
            "git", "clone", "-q", "--no-hardlinks", repository, clone, within=root, warm=repository
        )
        return Group(
            "programs on a tree",
            [
                self._remove("tree", "copy", "clone"),
                Step("make_directory", {"path": tree}, needed=True),
                Step("command", untar, "untar", "files/s", needed=True),
                Step("command", self._grep(), "grep_r_cold", "files/s", cold=True),
                Step("command", self._grep(self._scale.hot_seconds), "grep_r_hot", "files/s"),
                Step("command", self._program("cp", "-r", "tree", "copy", within=root), "cp_r", "files/s", needed=True),
                Step("command", self._program("rm", "-rf", "copy", within=root), "rm_rf", "files/s"),
                Step("command", git_clone, "git_clone", "files/s", needed=True),
                Step("command", self._program("git", "status", within=clone), "git_status_cold", "files/s", cold=True),
                self._remove("clone"),
            ],
        )

    def _sqlite(self) -> Group:
        delete = {"path": self._at("delete.db"), "journal": "delete", "count": self._scale.transactions_delete}
        wal = {"path": self._at("wal.db"), "journal": "wal", "count": self._scale.transactions_wal}
        return Group(
            "SQLite",
            [
                self._root(),
                Step("sqlite", delete, "sqlite_tx_delete", "tx/s"),
                Step("sqlite", wal, "sqlite_tx_wal", "tx/s"),
            ],
        )

    def _remounted(self) -> Group:
        files: Arguments = {**self._small(), "size": 4 * KIB}
        return Group(
            "after a remount",
            [
                Step("stat", self._small(), "stat_remount", "ops/s", cold=True),
                Step("read_files", files, "read4k_file_remount", "files/s"),
                Step("list_attributes", self._entries(), "ls_l_remount", "entries/s"),
                Step("read_big", self._big(), "seqread_remount", "MiB/s"),
                Step("command", self._grep(), "grep_r_remount", "files/s"),
            ],
            remount=True,
            after=("small files", "listings", "one big file", "programs on a tree"),
        )
