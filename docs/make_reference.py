"""Writes docs/rawfuse/reference.md from the docstrings of rawfuse and its tables, to the standard output.

make docs
"""

from __future__ import annotations

import ast
import errno
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

from rawfuse import filesystem, mount, negotiate, notify, ops, replies
from rawfuse.abi import OLDEST_MINOR, InitFlag, Opcode
from rawfuse.table import MEMOISED, TABLE

LEFT_OUT = {
    Opcode.OPEN: "the kernel opens files by itself, and never asks nor releases; contents stay cached over opens",
    Opcode.OPENDIR: "the kernel opens directories by itself, and never asks nor releases; listings are cached",
    Opcode.CREATE: "the kernel uses MKNOD and OPEN",
    Opcode.TMPFILE: "O_TMPFILE fails with EOPNOTSUPP",
    Opcode.STATX: "the kernel uses GETATTR; there is no birth time",
    Opcode.ACCESS: "access(2) is allowed everything",
    Opcode.FSYNC: "success",
    Opcode.FSYNCDIR: "success",
    Opcode.FLUSH: "success",
    Opcode.BMAP: "block 0",
    Opcode.LSEEK: "the file is all data, with one hole at its end",
    Opcode.POLL: "always ready",
    Opcode.FALLOCATE: "EOPNOTSUPP",
    Opcode.COPY_FILE_RANGE: "the kernel copies by reading and writing",
    Opcode.COPY_FILE_RANGE_64: "the kernel uses COPY_FILE_RANGE",
    Opcode.SETXATTR: "EOPNOTSUPP",
    Opcode.GETXATTR: "EOPNOTSUPP",
    Opcode.LISTXATTR: "EOPNOTSUPP",
    Opcode.REMOVEXATTR: "EOPNOTSUPP",
    Opcode.SYNCFS: "success",
}
"""What the kernel makes of ENOSYS where it remembers it (fs/fuse/dir.c, file.c, xattr.c of Linux 6.18)."""

HEAD = """\
# Reference of rawfuse

Generated from the docstrings by `make docs`; do not edit.

* [The class](#the-class) `FileSystem`
* [Operations](#operations): what it may implement
* [Replies](#replies): what its methods return
* [Errors](#errors)
* [Notifications](#notifications): what it may tell the kernel
* [Features](#features): the flags of INIT
* [Settings](#settings) and [mount options](#mount-options)
"""

ERRORS = """\
A method fails by raising `FuseError(errno)`, or any other `OSError` with an errno; the caller sees that errno.

| raised or returned | the caller sees |
|---|---|
| an `OSError` with an errno from 1 to 511 | that errno |
| ENOSYS | EOPNOTSUPP: the kernel would remember ENOSYS and never ask again |
| `TimeoutError` without an errno | ETIMEDOUT |
| `asyncio.CancelledError` after an INTERRUPT | EINTR |
| any other exception | EIO; it is logged with its traceback |
| a result that is no reply to the operation, or longer than what was asked for | EIO; it is logged |
| a method that is left out | what stands beside it above |
"""


@dataclass
class Documented:
    """A class or function as its source has it."""

    text: str
    fields: list[tuple[str, str, str, str]]
    """Name, type, default, meaning."""


def classes(module: ModuleType) -> dict[str, Documented]:
    """The classes of a module, their fields with the strings that stand behind them."""
    tree = ast.parse(inspect.getsource(module))
    found: dict[str, Documented] = {}
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        inherited = [field for base in node.bases for field in found.get(ast.unparse(base), Documented("", [])).fields]
        found[node.name] = Documented(ast.get_docstring(node) or "", [*inherited, *fields_of(node)])
    return found


def fields_of(node: ast.ClassDef) -> list[tuple[str, str, str, str]]:
    fields = []
    for at, statement in enumerate(node.body):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            behind = node.body[at + 1] if at + 1 < len(node.body) else None
            meaning = ""
            if isinstance(behind, ast.Expr) and isinstance(behind.value, ast.Constant):
                meaning = inspect.cleandoc(str(behind.value.value))
            default = ast.unparse(statement.value) if statement.value is not None else ""
            fields.append((statement.target.id, ast.unparse(statement.annotation), default, meaning))
    return fields


def prose(text: str) -> str:
    """A docstring as Markdown."""
    return "\n\n".join(" ".join(part.replace("``", "`").split()) for part in text.split("\n\n"))


def cell(text: str) -> str:
    return prose(text).replace("\n\n", " ").replace("|", "\\|")


def behaviour(opcode: Opcode) -> str:
    """What is answered when the method is left out, and whether a signal to the caller ends it."""
    operation = TABLE[opcode]
    if operation.method == "batch_forget":
        left_out = "`forget_inode` for each"
    elif opcode in MEMOISED:
        left_out = f"{LEFT_OUT[opcode]} (the kernel asks once and remembers it)"
    elif operation.encode is None:
        left_out = "nothing happens"
    elif operation.method == "stat_fs":
        left_out = "all zeros"
    elif operation.default == errno.EOPNOTSUPP:
        left_out = "EOPNOTSUPP"
    else:
        left_out = errno.errorcode[operation.default] if operation.default else "success"
    return f"Left out: {left_out}. An interrupt {'cancels it' if operation.interruptible else 'lets it finish'}."


def signature(function: Callable[..., object]) -> str:
    """Of a method, without ``self``."""
    whole = inspect.signature(function)
    shown = whole.replace(parameters=[one for one in whole.parameters.values() if one.name != "self"])
    return str(shown).replace("'", "")


def row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def described(documented: Documented) -> list[str]:
    """A class: its docstring, and a table of its fields."""
    parts = [prose(documented.text), ""]
    if documented.fields:
        meanings = any(meaning for *_, meaning in documented.fields)
        head = ["field", "type", "default", *(["meaning"] if meanings else [])]
        parts += [row(head), row(["---"] * len(head))]
        for field, kind, default, meaning in documented.fields:
            cells = [f"`{field}`", f"`{cell(kind)}`", f"`{cell(default)}`" if default else ""]
            parts.append(row([*cells, cell(meaning)] if meanings else cells))
        parts.append("")
    return parts


def the_class() -> str:
    """The life of a file system: what is not an operation."""
    parts = described(classes(filesystem)["FileSystem"])
    for name in ("start", "end_of_burst", "destroy"):
        function = getattr(filesystem.FileSystem, name)
        head = "async def" if inspect.iscoroutinefunction(function) else "def"
        parts += [f"* `{head} {name}{signature(function)}`: {prose(function.__doc__)}"]
    parts += ["", "`rawfuse.run` serves it for the life of a program, `rawfuse.Session` within one.", ""]
    return "\n".join(parts)


def operations() -> str:
    """One section a method, in the order of the interface."""
    documented = classes(ops)
    common = {name for name, *_ in documented["Op"].fields}
    served: dict[str, list[Opcode]] = {}
    for opcode, operation in TABLE.items():
        served.setdefault(operation.method, []).append(Opcode(opcode))
    parts = [prose(ops.__doc__ or "").removeprefix("One typed operation per opcode. "), ""]
    for method, function in vars(filesystem.FileSystem).items():
        if method not in served or method == "destroy":
            continue
        opcodes = served[method]
        op = documented[TABLE[opcodes[-1]].op_type.__name__]
        parts += [f"### `{method}`", "", f"`async def {method}{signature(function)}`", "", prose(op.text), ""]
        if function.__doc__:
            parts += [prose(function.__doc__), ""]
        own = [f"`{name}: {kind}`" for name, kind, *_ in op.fields if name not in common]
        if own:
            parts += [f"Fields: {', '.join(own)}.", ""]
        parts += [f"* {opcode.name} ({opcode.value}). {behaviour(opcode)}" for opcode in opcodes]
        parts.append("")
    return "\n".join(parts)


def reply_section() -> str:
    parts = [prose(replies.__doc__ or ""), ""]
    for name, documented in classes(replies).items():
        parts += [f"### `{name}`", "", *described(documented)]
        add = getattr(getattr(replies, name), "add", None)
        if add is not None:
            parts += [f"`add{signature(add)}`" + (f": {prose(add.__doc__)}" if add.__doc__ else ""), ""]
    return "\n".join(parts)


def notifications() -> str:
    parts = ["W" + prose(notify.__doc__ or "").removeprefix("Notifications: w"), ""]
    parts += [prose(notify.Notifier.__doc__ or ""), "", row(["method of `session.notifier`", ""]), row(["---", "---"])]
    for name, function in vars(notify.Notifier).items():
        if inspect.iscoroutinefunction(function) and not name.startswith("_") and name != "close":
            parts.append(row([f"`{name}{cell(signature(function))}`", cell(function.__doc__ or "")]))
    parts += ["", "[Deadlocks](deadlocks.md) tells which of them may be sent when.", ""]
    return "\n".join(parts)


def features() -> str:
    parts = [
        prose(negotiate.__doc__ or "").removeprefix("INIT: "),
        "",
        "A file system asks for more with `FileSystem.features`, and for less with `unwanted`. What was agreed, and why"
        " something was not, is in `session.agreement`.",
        "",
        row(["flag", "", "needs", "what the file system promises by asking for it"]),
        row(["---"] * 4),
    ]
    for flag, feature in negotiate.FEATURES.items():
        default = "by default" if flag & negotiate.DEFAULT else "on request" if feature.served else "never"
        needs = [f"`{TABLE[opcode].method}`" for opcode in feature.needs]
        needs += [str(one.name) for one in InitFlag if one & feature.requires]
        needs += [f"not {one.name}" for one in InitFlag if one & feature.excludes]
        needs += [f"protocol 7.{feature.minor}"] if feature.minor > OLDEST_MINOR else []
        needs += ["CAP_SYS_ADMIN"] if feature.privileged else []
        needs += ["default_permissions"] if feature.default_permissions else []
        parts.append(row([str(flag.name), default, ", ".join(dict.fromkeys(needs)), cell(feature.promise)]))
    parts.append("")
    return "\n".join(parts)


def main() -> None:
    sections = {
        "The class": the_class(),
        "Operations": operations(),
        "Replies": reply_section(),
        "Errors": ERRORS,
        "Notifications": notifications(),
        "Features": features(),
        "Settings": "\n".join(described(classes(negotiate)["Settings"])),
        "Mount options": "\n".join(described(classes(mount)["MountOptions"])),
    }
    print(HEAD)
    print("\n".join(f"## {title}\n\n{text}" for title, text in sections.items()).rstrip())


if __name__ == "__main__":
    main()
