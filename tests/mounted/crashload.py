"""A load of random operations on one directory, with a model of what every acknowledged one has done.

Each operation is one system call that changes something. The load runs until one fails because the file system has
gone. Then the directory must hold exactly the model's state before that call, or the state after it; of a write that
was in the air any part may be there.
"""

from __future__ import annotations

import copy
import errno
import os
import random
import stat
from dataclasses import dataclass, field
from typing import Any

from rawfuse.testing.syscalls import KEEP_SIZE, PUNCH_HOLE, RENAME_EXCHANGE, fallocate, opened, rename2

GONE = (errno.ENOTCONN, errno.ECONNABORTED, errno.ENODEV, errno.ENOENT, errno.EIO)
"""What calls return on a file system whose server has ended; ENOENT after a lazy unmount."""


@dataclass
class File:
    """A regular file or symbolic link; hard links share one object."""

    content: bytearray = field(default_factory=bytearray)
    mode: int = 0o644
    mtime: int | None = None
    """Nanoseconds, when it was set and nothing was written since."""
    xattrs: dict[str, bytes] = field(default_factory=dict)
    target: str | None = None
    """Of a symbolic link."""
    synced: bytes | None = None
    """The contents when fsync returned, unless they were changed since."""


State = dict[str, dict[str, File]]
"""The directories by name, one level deep ("." is the top), and the files in each."""

Operation = tuple[str, tuple[Any, ...]]


def empty_state() -> State:
    return {".": {}}


@dataclass
class Outcome:
    """``last`` was in the air when the file system went; ``count`` operations were acknowledged before."""

    before: State
    after: State
    last: Operation
    count: int
    error: str


def run_load(root: str, state: State, seed: int) -> Outcome:
    """Work on ``root``, which holds ``state``, until a call fails."""
    rng = random.Random(seed)
    count = 0
    while True:
        operation = choose(rng, state)
        if operation is None:
            continue
        try:
            execute(root, *operation)
        except OSError as error:
            if error.errno not in GONE:
                raise
            after = copy.deepcopy(state)
            apply(after, *operation)
            return Outcome(state, after, operation, count, str(error))
        apply(state, *operation)
        count += 1


WEIGHTS = {
    "create": 5,
    "write": 3,
    "append": 2,
    "rename": 2,
    "fsync": 2,
    **dict.fromkeys(("truncate", "unlink", "exchange", "link", "symlink", "chmod", "utime", "xattr"), 1),
    **dict.fromkeys(("mkdir", "rmdir", "syncdir", "punch", "copy"), 1),
}
"""How often each kind of operation is drawn."""
KINDS = [kind for kind, weight in WEIGHTS.items() for _ in range(weight)]


def choose(rng: random.Random, state: State) -> Operation | None:
    """The next operation, which must succeed on this state; None when there is none of the kind drawn."""
    kind = rng.choice(KINDS)
    names = [f"{directory}/{name}" for directory, files in state.items() for name in files]
    files = [path for path in names if _file(state, path).target is None]
    name = f"{rng.choice(list(state))}/f{rng.randrange(30)}"
    free = name not in names
    match kind:
        case "create":
            return ("create", (name,)) if free else None
        case "symlink":
            return ("symlink", (name, f"target{rng.randrange(1000)}")) if free else None
        case "mkdir":
            new = [f"d{number}" for number in range(4) if f"d{number}" not in state]
            return ("mkdir", (new[0],)) if new else None
        case "rmdir":
            empty = [directory for directory, files in state.items() if directory != "." and not files]
            return ("rmdir", (empty[0],)) if empty else None
        case "syncdir":
            return "syncdir", (rng.choice(list(state)),)
    if not files:
        return None
    path = rng.choice(files)
    size = len(_file(state, path).content)
    match kind:
        case "write":
            return "write", (path, rng.randrange(size + 5000), _data(rng))
        case "append":
            return "write", (path, size, _data(rng))
        case "truncate":
            return "truncate", (path, rng.choice([0, size // 2, size + 10_000]) if size < 500_000 else 0)
        case "rename":
            same = not free and _file(state, name) is _file(state, path)
            return None if same else ("rename", (path, name))
        case "exchange":
            return None if free or name == path else ("exchange", (path, name))
        case "link":
            return ("link", (path, name)) if free else None
        case "chmod":
            return "chmod", (path, rng.choice([0o600, 0o644, 0o755]))
        case "utime":
            return "utime", (path, rng.randrange(10**18))
        case "xattr":
            return "xattr", (path, f"user.{rng.randrange(3)}", rng.randbytes(20))
        case "punch":
            return "punch", (path, rng.randrange(size + 1), rng.randrange(1, 50_000))
        case "copy":
            source = rng.choice(files)
            data = bytes(_file(state, source).content)
            return None if _file(state, source) is _file(state, path) or not data else ("copy", (path, source, data))
    return kind, (path,)


def _data(rng: random.Random) -> bytes:
    return rng.randbytes(1_500_000 if rng.random() < 0.02 else rng.choice([1, 100, 4096, 5000, 40_000, 65_536]))


def _split(path: str) -> tuple[str, str]:
    directory, _, name = path.rpartition("/")
    return directory, name


def _file(state: State, path: str) -> File:
    directory, name = _split(path)
    return state[directory][name]


def execute(root: str, kind: str, arguments: tuple[Any, ...]) -> None:
    """Do the operation; OSError as the system call fails."""
    path = f"{root}/{arguments[0]}"
    match kind:
        case "create":
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        case "symlink":
            os.symlink(arguments[1], path)
        case "mkdir":
            os.mkdir(path)
        case "rmdir":
            os.rmdir(path)
        case "unlink":
            os.unlink(path)
        case "rename":
            os.rename(path, f"{root}/{arguments[1]}")
        case "exchange":
            rename2(path, f"{root}/{arguments[1]}", RENAME_EXCHANGE)
        case "link":
            os.link(path, f"{root}/{arguments[1]}")
        case "chmod":
            os.chmod(path, arguments[1])
        case "utime":
            os.utime(path, ns=(arguments[1], arguments[1]))
        case "xattr":
            os.setxattr(path, arguments[1], arguments[2])
        case "truncate":
            os.truncate(path, arguments[1])
        case _:
            with opened(path, os.O_RDONLY if kind in ("fsync", "syncdir") else os.O_RDWR) as fd:
                _execute_open(fd, root, kind, arguments)


def _execute_open(fd: int, root: str, kind: str, arguments: tuple[Any, ...]) -> None:
    match kind:
        case "fsync" | "syncdir":
            os.fsync(fd)
        case "write":
            _whole(os.pwrite(fd, arguments[2], arguments[1]), arguments[2])
        case "punch":
            fallocate(fd, PUNCH_HOLE | KEEP_SIZE, arguments[1], arguments[2])
        case "copy":
            with opened(f"{root}/{arguments[1]}") as source:
                _whole(os.copy_file_range(source, fd, len(arguments[2]), 0, 0), arguments[2])
        case _:
            raise AssertionError(kind)


def _whole(done: int, data: bytes) -> None:
    """A call that is cut off in its middle tells how far it came."""
    if done < len(data):
        raise OSError(errno.ECONNABORTED, f"{done} of {len(data)} bytes")


def apply(state: State, kind: str, arguments: tuple[Any, ...]) -> None:
    """Do the operation on the model."""
    if kind == "mkdir":
        state[arguments[0]] = {}
        return
    if kind == "rmdir":
        del state[arguments[0]]
        return
    if kind == "syncdir":
        return
    directory, name = _split(arguments[0])
    files = state[directory]
    match kind:
        case "create":
            files[name] = File()
        case "symlink":
            files[name] = File(target=arguments[1], mode=0o777)
        case "unlink":
            del files[name]
        case "rename":
            there, new = _split(arguments[1])
            state[there][new] = files.pop(name)
        case "exchange":
            there, new = _split(arguments[1])
            files[name], state[there][new] = state[there][new], files[name]
        case "link":
            there, new = _split(arguments[1])
            state[there][new] = files[name]
        case "fsync":
            files[name].synced = bytes(files[name].content)
        case _:
            _apply_to_file(files[name], kind, arguments)


def _apply_to_file(file: File, kind: str, arguments: tuple[Any, ...]) -> None:
    content = file.content
    match kind:
        case "chmod":
            file.mode = arguments[1]
        case "utime":
            file.mtime = arguments[1]
        case "xattr":
            file.xattrs[arguments[1]] = arguments[2]
        case "truncate":
            del content[arguments[1] :]
            content.extend(bytes(arguments[1] - len(content)))
            file.mtime = file.synced = None
        case "punch":
            end = min(arguments[1] + arguments[2], len(content))
            content[arguments[1] : end] = bytes(max(end - arguments[1], 0))
            file.mtime = file.synced = None
        case "write" | "copy":
            offset, data = (arguments[1], arguments[2]) if kind == "write" else (0, arguments[2])
            content.extend(bytes(max(offset - len(content), 0)))
            content[offset : offset + len(data)] = data
            file.mtime = file.synced = None
        case _:
            raise AssertionError(kind)


def read_state(root: str) -> State:
    """What a directory holds now, with every mtime."""
    state: State = {".": {}}
    inodes: dict[int, File] = {}
    for entry in os.scandir(root):
        if entry.is_dir(follow_symlinks=False):
            state[entry.name] = {}
    for directory, files in state.items():
        for entry in os.scandir(f"{root}/{directory}"):
            found = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(found.st_mode):
                continue
            if found.st_ino not in inodes:
                inodes[found.st_ino] = _read_file(entry.path, found)
            files[entry.name] = inodes[found.st_ino]
    return state


def _read_file(path: str, found: os.stat_result) -> File:
    if stat.S_ISLNK(found.st_mode):
        return File(target=os.readlink(path), mode=0o777)
    with open(path, "rb") as file:
        content = bytearray(file.read())
    xattrs = {name: os.getxattr(path, name) for name in os.listxattr(path)}
    assert len(content) == found.st_size
    return File(content, stat.S_IMODE(found.st_mode), found.st_mtime_ns, xattrs)


def differences(expected: State, found: State, torn: str | None = None) -> list[str]:
    """What ``found`` lacks of ``expected``; the contents of the file at ``torn`` are not compared."""
    wrong = [f"directory {name} is missing" for name in expected.keys() - found.keys()]
    wrong += [f"directory {name} should not be" for name in found.keys() - expected.keys()]
    for directory in expected.keys() & found.keys():
        wanted, there = expected[directory], found[directory]
        wrong += [f"{directory}/{name} is missing" for name in wanted.keys() - there.keys()]
        wrong += [f"{directory}/{name} should not be" for name in there.keys() - wanted.keys()]
        for name in wanted.keys() & there.keys():
            same_as_torn = torn is not None and wanted[name] is _find(expected, torn)
            wrong += [f"{directory}/{name}: {text}" for text in _compare(wanted[name], there[name], same_as_torn)]
    wrong += _compare_links(expected, found)
    return wrong


def _find(state: State, path: str) -> File | None:
    directory, name = _split(path)
    return state.get(directory, {}).get(name)


def _compare(wanted: File, found: File, torn: bool) -> list[str]:
    wrong = []
    if wanted.target != found.target:
        wrong.append(f"target {found.target} instead of {wanted.target}")
    if wanted.mode != found.mode:
        wrong.append(f"mode {found.mode:o} instead of {wanted.mode:o}")
    if wanted.xattrs != found.xattrs:
        wrong.append(f"xattrs {found.xattrs} instead of {wanted.xattrs}")
    if torn:
        return wrong
    if wanted.mtime is not None and wanted.mtime != found.mtime:
        wrong.append(f"mtime {found.mtime} instead of {wanted.mtime}")
    if wanted.content != found.content:
        pairs = zip(wanted.content, found.content, strict=False)
        at = next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(wanted.content), len(found.content)))
        wrong.append(f"{len(found.content)} bytes instead of {len(wanted.content)}, the first difference at {at}")
    return wrong


def _compare_links(expected: State, found: State) -> list[str]:
    def groups(state: State) -> set[frozenset[str]]:
        names: dict[int, set[str]] = {}
        for directory, files in state.items():
            for name, file in files.items():
                names.setdefault(id(file), set()).add(f"{directory}/{name}")
        return {frozenset(group) for group in names.values() if len(group) > 1}

    changed = groups(expected) ^ groups(found)
    return [f"hard links differ: {sorted(map(sorted, changed))}"] if changed else []


def is_mixture(found: bytearray, before: bytearray, after: bytearray) -> bool:
    """Whether every byte is the old or the new one, and the size lies between (a write in the air)."""
    low, high = sorted((len(before), len(after)))
    if not low <= len(found) <= high:
        return False
    old = before + bytes(high - len(before))
    new = after + bytes(high - len(after))
    return all(byte in (a, b) for byte, a, b in zip(found, old, new, strict=False))


def assert_survived(root: str, outcome: Outcome) -> State:
    """Fail unless the directory holds what the load's outcome demands; returns what it holds."""
    found = read_state(root)
    before = differences(outcome.before, found)
    if not before or not differences(outcome.after, found):
        return found
    kind, arguments = outcome.last
    if kind in ("write", "copy", "truncate", "punch"):
        path = arguments[0]
        torn = _find(found, path)
        old, new = _find(outcome.before, path), _find(outcome.after, path)
        if torn and old and new and is_mixture(torn.content, old.content, new.content):
            before = differences(outcome.before, found, torn=path)
            if not before:
                return found
    shown = [argument for argument in arguments if not isinstance(argument, bytes)]
    raise AssertionError(
        f"after {outcome.count} operations, with {kind} {shown} in the air ({outcome.error}):\n"
        + "\n".join(before[:30])
    )


def assert_synced_survived(root: str, outcome: Outcome) -> State:
    """Fail unless each file holds what was there when fsync returned, or was changed since. For a loss of all that had
    not been synced; returns what the directory holds."""
    found = read_state(root)
    wrong = []
    for directory, files in outcome.before.items():
        for name, file in files.items():
            after = _find(outcome.after, f"{directory}/{name}")
            if file.synced is None or after is None or after.synced != file.synced:
                continue
            there = _find(found, f"{directory}/{name}")
            if there is None:
                wrong.append(f"{directory}/{name} is missing")
            elif there.content != file.synced:
                wrong.append(f"{directory}/{name}: {len(there.content)} bytes instead of {len(file.synced)}, or others")
    assert not wrong, f"synced, and lost after {outcome.count} operations:\n" + "\n".join(wrong)
    return found
