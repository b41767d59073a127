"""The states that a power loss may leave of a folder, given the operations of a program.

:class:`Disk` watches the calls that change names or make something durable (``os.fsync``,
``os.replace``, ``os.rename``, ``os.unlink``, ``os.remove``, ``os.mkdir``, ``os.rmdir``), from any
module and thread, and looks at the whole folder before each, so that it sees files of any writer.
Each such call is a *moment*. :func:`after_power_loss` builds a tree that may be there
if the machine stops right before that call.

The model is POSIX at its worst, weaker than ext4 or xfs are:

- A file's bytes and size are durable from an fsync of it on. What was written since may be there in
  full, up to any byte, as zeros or garbage of the full length, or not at all.
- A name is durable from an fsync of its directory on, not of the file. Of what was created,
  renamed or removed since, each name by itself is as it was then, or as it was at any time since:
  after a rename both names may be there, or neither.
- Nothing that was durable is damaged, and one name never leads to half of a rename.

Locks are left out, because the lock of a dead process never blocks another process.

A failing fsync of a file (:meth:`Disk.fail`) leaves zeros where its bytes were not durable yet, as
where the kernel gives up what it could not write, so that a program that goes on as if nothing were
reads what a power loss would leave. A failing fsync of a directory makes nothing durable.

Example::

    with Disk(folder) as disk:
        store.save(state)
    for moment in disk.moments:
        write_tree(after_power_loss(moment, random.Random(0)), elsewhere)
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import stat
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from msft_store.storage.lock_files import LOCKS
from msft_store.testing import SimulatedKill

CALLS = ("fsync", "replace", "rename", "unlink", "remove", "mkdir", "rmdir")

Tree = dict[str, bytes | None]
"""Content by relative path; ``None`` for directories."""

_Name = tuple[int, str]
"""A directory's node, and a name in it."""
_ROOT = 0


@dataclass(frozen=True, kw_only=True)
class Moment:
    """The durable and the visible state, right before a call."""

    call: str
    """Name of the call and of what it is about; ``end`` after the last."""
    names: Mapping[_Name, tuple[int | None, ...]]
    """The nodes that each name may lead to: what is durable first, what a program sees last."""
    files: Mapping[int, tuple[bytes, bytes]]
    """Durable and visible bytes by node; nodes that are not here are directories."""


class Disk:
    """Watches a folder, all of which counts as durable in the beginning."""

    def __init__(self, root: Path) -> None:
        self.moments: list[Moment] = []
        self._root = root
        self._real = {name: getattr(os, name) for name in CALLS}
        self._lock = threading.RLock()
        self._inodes: dict[int, int] = {}
        self._names: dict[_Name, tuple[int | None, ...]] = {}
        self._files: dict[int, tuple[bytes, bytes]] = {}
        self._stamps: dict[int, tuple[int, int]] = {}
        self._fail_at: int | None = None
        self._failing: frozenset[str] = frozenset()
        self._stop_at: int | None = None
        self.failed: str | None = None
        """The call that failed, if one has."""
        self._inodes[_ROOT] = root.stat().st_ino
        self._look()
        self._settle()

    def fail(self, n: int, calls: frozenset[str] = frozenset(CALLS)) -> None:
        """Let the n-th (from 0) of some calls from here on fail with an input/output error."""
        self._fail_at, self._failing, self.failed = n, calls, None

    def stop(self, n: int) -> None:
        """Let the n-th call and all after it raise :class:`SimulatedKill`, as if killed there."""
        self._stop_at, self.failed = n, None

    def stop_faults(self) -> None:
        """Stop the injection of faults."""
        self._fail_at = self._stop_at = None

    def __enter__(self) -> Disk:
        for name in CALLS:
            setattr(os, name, self._watched(name))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for name, call in self._real.items():
            setattr(os, name, call)
        self._look()
        self._note("end")

    def _watched(self, call: str) -> Callable[..., Any]:
        def watched(*arguments: Any, **keywords: Any) -> Any:
            with self._lock:
                paths = self._paths(call, arguments, keywords)
                if not any(
                    path.is_relative_to(self._root) and LOCKS not in path.parts for path in paths
                ):
                    return self._real[call](*arguments, **keywords)
                self._look()
                self._note(f"{call} {paths[0].relative_to(self._root)}")
                self._strike(call, paths[0])
                result = self._real[call](*arguments, **keywords)
                self._done(call, paths)
                return result

        return watched

    def _paths(self, call: str, arguments: Any, keywords: Any) -> list[Path]:
        if call == "fsync":
            return [Path(os.readlink(f"/proc/self/fd/{arguments[0]}"))]
        count = 2 if call in ("replace", "rename") else 1
        folder = keywords.get("dir_fd")
        start = Path(os.readlink(f"/proc/self/fd/{folder}")) if folder is not None else Path.cwd()
        return [start / os.fspath(path) for path in arguments[:count]]

    def _strike(self, call: str, path: Path) -> None:
        if self._stop_at is not None:
            self._stop_at -= 1
            if self._stop_at < 0:
                self.failed = call
                raise SimulatedKill
        if self._fail_at is not None and call in self._failing:
            self._fail_at -= 1
            if self._fail_at == -1:
                self.failed = call
                if call == "fsync" and path.is_file():
                    self._lose(path)
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    def _lose(self, path: Path) -> None:
        durable, visible = self._files[self._node_of(path)]
        kept = durable if visible.startswith(durable) else b""
        path.write_bytes(kept + bytes(len(visible) - len(kept)))

    def _done(self, call: str, paths: list[Path]) -> None:
        if call in ("replace", "rename"):
            source, target = map(self._name_of, paths)
            node = self._names[source][-1]
            self._lead(source, None)
            self._lead(target, node)
        elif call == "fsync":
            node = self._node_of(paths[0])
            if node in self._files:
                visible = self._files[node][1]
                self._files[node] = (visible, visible)
            else:
                self._settle(node)
        self._look()

    def _node_of(self, path: Path) -> int:
        node = _ROOT
        for part in path.relative_to(self._root).parts:
            found = self._names[node, part][-1]
            assert found is not None
            node = found
        return node

    def _name_of(self, path: Path) -> _Name:
        return self._node_of(path.parent), path.name

    def _lead(self, name: _Name, node: int | None) -> None:
        """Let a name lead to another node, which is not durable yet."""
        values = self._names.get(name, (None,))
        if values[-1] != node:
            self._names[name] = (*values, node)

    def _settle(self, folder: int | None = None) -> None:
        """Make the names in a directory, or all names and files, durable."""
        for name, values in list(self._names.items()):
            if folder in (None, name[0]):
                self._names[name] = values[-1:]
        if folder is None:
            self._files = {node: (seen, seen) for node, (_, seen) in self._files.items()}

    def _look(self) -> None:
        """Read the folder as it is now, including files of other processes."""
        with self._lock:
            seen: set[_Name] = set()
            self._look_into(_ROOT, self._root, seen)
            for name, values in list(self._names.items()):
                if name not in seen and values[-1] is not None and self._is_visible(name[0], seen):
                    self._lead(name, None)

    def _is_visible(self, folder: int, seen: set[_Name]) -> bool:
        return folder == _ROOT or any(self._names[name][-1] == folder for name in seen)

    def _look_into(self, folder: int, path: Path, seen: set[_Name]) -> None:
        try:
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except FileNotFoundError:
            return
        for entry in entries:
            if entry.name == LOCKS:
                continue
            try:
                info = entry.stat(follow_symlinks=False)
                name = (folder, entry.name)
                node = self._names.get(name, (None,))[-1]
                if node is None or self._inodes[node] != info.st_ino:
                    node = len(self._inodes)
                    self._inodes[node] = info.st_ino
                    self._lead(name, node)
                if stat.S_ISDIR(info.st_mode):
                    seen.add(name)
                    self._look_into(node, path / entry.name, seen)
                elif self._stamps.get(node) != (info.st_size, info.st_mtime_ns):
                    durable = self._files.get(node, (b"", b""))[0]
                    self._files[node] = (durable, Path(entry.path).read_bytes())
                    self._stamps[node] = (info.st_size, info.st_mtime_ns)
                seen.add(name)
            except FileNotFoundError:
                continue  # another thread removes it

    def _note(self, call: str) -> None:
        self.moments.append(Moment(call=call, names=dict(self._names), files=dict(self._files)))


def after_power_loss(moment: Moment, rng: random.Random | None) -> Tree:
    """Return a state that may be on the disk; without a generator, only the durable state."""
    content = {node: _survivor(*both, rng) for node, both in moment.files.items()}
    choice = {
        n: values[0] if rng is None else rng.choice(values) for n, values in moment.names.items()
    }
    return _tree(choice, content)


def after_kill(moment: Moment) -> Tree:
    """Return the state after a stop of the program alone: all that it did."""
    content = {node: visible for node, (_, visible) in moment.files.items()}
    return _tree({name: values[-1] for name, values in moment.names.items()}, content)


def write_tree(tree: Tree, root: Path) -> None:
    """Write the state to ``root`` and delete everything else there."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    for path, content in sorted(tree.items()):
        if content is None:
            (root / path).mkdir()
        else:
            (root / path).write_bytes(content)


def _tree(choice: Mapping[_Name, int | None], content: Mapping[int, bytes]) -> Tree:
    inside: dict[int, list[tuple[str, int]]] = {}
    for (folder, name), node in choice.items():
        if node is not None:
            inside.setdefault(folder, []).append((name, node))
    tree: Tree = {}

    def add(folder: int, prefix: str) -> None:
        for name, node in inside.get(folder, []):
            tree[prefix + name] = content.get(node)
            if node not in content:
                add(node, f"{prefix}{name}/")

    add(_ROOT, "")
    return tree


def _survivor(durable: bytes, visible: bytes, rng: random.Random | None) -> bytes:
    if rng is None or durable == visible:
        return durable
    kept = len(durable) if visible.startswith(durable) else 0
    cut = rng.randint(kept, len(visible))
    rest = len(visible) - cut
    return rng.choice(
        [
            durable,
            visible,
            visible[:cut],
            visible[:cut] + bytes(rest),
            visible[:cut] + rng.randbytes(rest),
        ]
    )
