"""The figures of ``bench.s3compare``. *cold*: mounted anew with empty local caches. *warm*: the local cache is full,
the kernel's caches are empty. *hot*: a second time."""

from __future__ import annotations

from typing import Final

from bench.figures import KIB, MIB, Arguments, Group, Plan, Step

SMALL_KIB: Final = (4, 16)
"""Sizes of small files."""


class S3Plan(Plan):
    """Where contents are written in one group and read in the next, that is after a remount."""

    def groups(self) -> list[Group]:
        return [
            self._big_written(),
            self._big_read(),
            self._random(),
            *(group for size in SMALL_KIB for group in self._files(size)),
            self._tree_written(),
            self._tree_read(),
        ]

    def _big_written(self) -> Group:
        write = {**self._big(), "block": MIB}
        return Group("big file, written", [self._root(), Step("write_big", write, "seqwrite", "MiB/s", needed=True)])

    def _big_read(self) -> Group:
        big = self._big()
        return Group(
            "big file, read",
            [
                Step("read_big", big, "seqread_cold", "MiB/s", needed=True),
                Step("read_big", big, "seqread_warm", "MiB/s", cold=True),
                Step("read_big_hot", self._hot(big), "seqread_hot", "MiB/s"),
            ],
            remount=True,
            after=("big file, written",),
        )

    def _random(self) -> Group:
        reads: Arguments = {"path": self._at("big"), "count": self._scale.random_reads}
        return Group(
            "random reads",
            [
                Step("random_read", reads, "randread4k_cold", "IOPS", needed=True),
                Step("random_read", reads, "randread4k_warm", "IOPS", cold=True),
                Step("random_read_hot", self._hot(reads), "randread4k_hot", "IOPS"),
                self._remove("big"),
            ],
            remount=True,
            after=("big file, written",),
        )

    def _files(self, size: int) -> list[Group]:
        name = f"small{size}k"
        files: Arguments = {"directory": self._at(name), "count": self._scale.small_files, "size": size * KIB}
        synced = {**files, "directory": self._at(f"{name}-synced"), "fsync": True}
        return [
            Group(
                f"files of {size} KiB, written",
                [
                    self._remove(name, f"{name}-synced"),
                    Step("write_files", files, f"write{size}k_file", "files/s", needed=True),
                    Step("write_files", synced, f"write{size}k_fsync", "files/s"),
                ],
            ),
            Group(
                f"files of {size} KiB, read",
                [
                    Step("read_files", files, f"read{size}k_file_cold", "files/s", needed=True),
                    Step("read_files", files, f"read{size}k_file_warm", "files/s", cold=True),
                    Step("read_files_hot", self._hot(files), f"read{size}k_file_hot", "files/s"),
                    self._remove(name, f"{name}-synced"),
                ],
                remount=True,
                after=(f"files of {size} KiB, written",),
            ),
        ]

    def _tree_written(self) -> Group:
        root, tree = self._root_path, self._at("tree")
        untar = self._program("tar", "xf", self._sources.tar, within=tree, warm=self._sources.tar)
        return Group(
            "source tree, written",
            [
                self._remove("tree", "copy"),
                Step("make_directory", {"path": tree}, needed=True),
                Step("command", untar, "untar", "files/s", needed=True),
                Step("command", self._program("cp", "-r", "tree", "copy", within=root), "cp_r", "files/s", needed=True),
                Step("command", self._program("rm", "-rf", "copy", within=root), "rm_rf", "files/s"),
            ],
        )

    def _tree_read(self) -> Group:
        return Group(
            "source tree, read",
            [
                Step("command", self._grep(), "grep_r_cold", "files/s", needed=True),
                Step("command", self._grep(), "grep_r_warm", "files/s", cold=True),
                self._remove("tree"),
            ],
            remount=True,
            after=("source tree, written",),
        )
