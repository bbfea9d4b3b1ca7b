"""Random operations on names against a simple model in memory, with the checker after each run."""

from __future__ import annotations

import errno
import stat
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from polefs.meta.api import RENAME_EXCHANGE, RENAME_NOREPLACE, RENAME_WHITEOUT
from polefs.meta.model import ROOT_INO
from tests.postgres.server import PostgresServer
from tests.unit.meta_helpers import ROOT, Meta, PostgresMeta, change_and_fail, examples, fails

NAMES = st.sampled_from([b"a", b"b", b"c", b"d"])
FLAGS = st.sampled_from([0, 0, 0, RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT])


class Node:
    def __init__(self, kind: int, parent: Node | None) -> None:
        self.kind = kind
        self.parent = parent
        self.names: dict[bytes, Node] = {}
        self.nlink = 0
        self.ino = 0

    @property
    def is_dir(self) -> bool:
        return self.kind == stat.S_IFDIR

    def links(self) -> int:
        if not self.is_dir:
            return self.nlink
        return 2 + sum(child.is_dir for child in self.names.values()) if self.nlink else 0

    def below(self, other: Node) -> bool:
        node: Node | None = self
        while node is not None:
            if node is other:
                return True
            node = node.parent
        return False


def refuse(code: int) -> None:
    raise OSError(code, "model")


class Model:
    """What POSIX and Linux say, in the shortest words."""

    def __init__(self) -> None:
        self.root = Node(stat.S_IFDIR, None)
        self.root.ino = ROOT_INO
        self.root.nlink = 1

    def make(self, parent: Node, name: bytes, kind: int) -> Node:
        if not parent.nlink:
            refuse(errno.ENOENT)
        if name in parent.names:
            refuse(errno.EEXIST)
        node = Node(kind, parent)
        node.nlink = 1
        parent.names[name] = node
        return node

    def link(self, node: Node, parent: Node, name: bytes) -> None:
        if not parent.nlink:
            refuse(errno.ENOENT)
        if name in parent.names:
            refuse(errno.EEXIST)
        if node.is_dir:
            refuse(errno.EPERM)
        if not node.nlink:
            refuse(errno.ENOENT)
        node.nlink += 1
        parent.names[name] = node

    def remove(self, parent: Node, name: bytes, directory: bool) -> None:
        if name not in parent.names:
            refuse(errno.ENOENT)
        node = parent.names[name]
        if node.is_dir != directory:
            refuse(errno.ENOTDIR if directory else errno.EISDIR)
        if node.names:
            refuse(errno.ENOTEMPTY)
        del parent.names[name]
        node.nlink -= 1

    def rename(self, parent: Node, name: bytes, new_parent: Node, new_name: bytes, flags: int) -> None:
        if not new_parent.nlink and parent is not new_parent:
            refuse(errno.ENOENT)
        if name not in parent.names:
            refuse(errno.ENOENT)
        node = parent.names[name]
        target = new_parent.names.get(new_name)
        if flags == RENAME_EXCHANGE and target is None:
            refuse(errno.ENOENT)
        if flags == RENAME_NOREPLACE and target is not None:
            refuse(errno.EEXIST)
        if new_parent.below(node):
            refuse(errno.EINVAL)
        if target is not None and parent.below(target):
            refuse(errno.EINVAL if flags == RENAME_EXCHANGE else errno.ENOTEMPTY)
        if node is target:
            return
        if flags == RENAME_EXCHANGE:
            assert target is not None
            parent.names[name], new_parent.names[new_name] = target, node
            if target.is_dir:
                target.parent = parent
        else:
            if target is not None:
                if node.is_dir and not target.is_dir:
                    refuse(errno.ENOTDIR)
                if target.is_dir and not node.is_dir:
                    refuse(errno.EISDIR)
                if target.names:
                    refuse(errno.ENOTEMPTY)
                target.nlink -= 1
            del parent.names[name]
            new_parent.names[new_name] = node
            if flags == RENAME_WHITEOUT:
                device = Node(stat.S_IFCHR, parent)
                device.nlink = 1
                parent.names[name] = device
        if node.is_dir:
            node.parent = new_parent


class Names(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.scratch = tempfile.TemporaryDirectory()
        self.meta = self.new_meta(Path(self.scratch.name))
        self.model = Model()
        self.folders = [self.model.root]
        self.nodes = [self.model.root]

    def new_meta(self, path: Path) -> Meta:
        return Meta(path)

    def both(self, model: object, real: object) -> object:
        """Do it in both; the outcome must be the same. Returns what the service returned, None when it refused."""
        try:
            model()  # type: ignore[operator]
            expected = 0
        except OSError as error:
            expected = error.errno or 0
        try:
            result = real()  # type: ignore[operator]
            got = 0
        except OSError as error:
            got = error.errno or 0
            result = None
        assert errno.errorcode.get(got, got) == errno.errorcode.get(expected, expected)
        return result

    def folder(self, index: int) -> Node:
        return self.folders[index % len(self.folders)]

    @rule(where=st.integers(0, 50), name=NAMES, kind=st.sampled_from([stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK]))
    def make(self, where: int, name: bytes, kind: int) -> None:
        parent = self.folder(where)
        target = b"target" if kind == stat.S_IFLNK else None
        made = self.both(
            lambda: self.model.make(parent, name, kind),
            lambda: self.meta.run(self.meta.service.make_node(ROOT, parent.ino, name, kind | 0o755, 0, 0, target)),
        )
        if made is not None:
            node = parent.names[name]
            node.ino = made.ino  # type: ignore[attr-defined]
            self.nodes.append(node)
            if node.is_dir:
                self.folders.append(node)

    @rule(which=st.integers(0, 50), where=st.integers(0, 50), name=NAMES)
    def link(self, which: int, where: int, name: bytes) -> None:
        node = self.nodes[which % len(self.nodes)]
        parent = self.folder(where)
        self.both(lambda: self.model.link(node, parent, name), lambda: self.meta.link(node.ino, name, parent.ino))

    @rule(where=st.integers(0, 50), name=NAMES, directory=st.booleans())
    def remove(self, where: int, name: bytes, directory: bool) -> None:
        parent = self.folder(where)
        call = self.meta.rmdir if directory else self.meta.unlink
        self.both(lambda: self.model.remove(parent, name, directory), lambda: call(name, parent.ino))

    @rule(where=st.integers(0, 50), name=NAMES, to=st.integers(0, 50), new_name=NAMES, flags=FLAGS)
    def rename(self, where: int, name: bytes, to: int, new_name: bytes, flags: int) -> None:
        parent, new_parent = self.folder(where), self.folder(to)
        self.both(
            lambda: self.model.rename(parent, name, new_parent, new_name, flags),
            lambda: self.meta.rename(name, new_name, parent.ino, new_parent.ino, flags),
        )
        if flags == RENAME_WHITEOUT and name in parent.names and not parent.names[name].ino:
            device = parent.names[name]
            device.ino = self.meta.lookup(name, parent.ino).ino
            self.nodes.append(device)

    @rule()
    def forget_caches(self) -> None:
        self.meta.forget_caches()

    @rule()
    def abort(self) -> None:
        with fails(errno.EIO):
            self.meta.run(self.meta.store.write(change_and_fail))

    @rule()
    def crash(self) -> None:
        self.meta.crash()
        # What had no name went with its session.
        self.nodes = [node for node in self.nodes if node.nlink]
        self.folders = [node for node in self.folders if node.nlink]

    @rule()
    def sync(self) -> None:
        self.meta.run(self.meta.service.sync())

    @invariant()
    def same_tree(self) -> None:
        for folder in self.folders:
            found = {each.name: each.ino for each in self.meta.run(self.meta.service.list_dir(folder.ino, 0, 100))}
            assert found == {name: node.ino for name, node in folder.names.items()}
            if folder.nlink:
                expected = ROOT_INO if folder.parent is None else folder.parent.ino
                assert self.meta.get(folder.ino).parent == expected
        for node in self.nodes:
            inode = self.meta.get(node.ino)
            assert (inode.nlink, stat.S_IFMT(inode.mode)) == (node.links(), node.kind)

    def teardown(self) -> None:
        try:
            self.meta.assert_clean()
            self.meta.release(*(node.ino for node in self.nodes if not node.nlink))
            self.meta.assert_clean()
            assert self.meta.run(self.meta.service.usage()).inodes == 1 + len(self._reachable(self.model.root))
        finally:
            self.meta.close()
            self.scratch.cleanup()

    def _reachable(self, node: Node) -> set[int]:
        found = set()
        for child in node.names.values():
            found |= {child.ino} | self._reachable(child)
        return found


def test_names_against_a_model() -> None:
    run_state_machine_as_test(
        Names, settings=settings(max_examples=examples(20), stateful_step_count=40, deadline=None)
    )


def test_names_in_postgresql_against_a_model(postgres_server: PostgresServer) -> None:
    class PostgresNames(Names):
        def new_meta(self, path: Path) -> Meta:
            # Too small for what one operation reads, so that each asks the database.
            return PostgresMeta(path, postgres_server.dsn(), cache=(3, 1, 3))

    run_state_machine_as_test(
        PostgresNames, settings=settings(max_examples=examples(4), stateful_step_count=40, deadline=None)
    )


@pytest.mark.parametrize("flags", [0, RENAME_EXCHANGE])
def test_the_model_refuses_rings(flags: int) -> None:
    model = Model()
    upper = model.make(model.root, b"a", stat.S_IFDIR)
    model.make(upper, b"b", stat.S_IFDIR)
    with pytest.raises(OSError):
        model.rename(model.root, b"a", upper, b"b", flags)
