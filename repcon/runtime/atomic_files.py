"""Atomic and durable writes of local files, and locks on them."""

import contextlib
import errno
import fcntl
import os
import re
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import BinaryIO

_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK, errno.EBADF)
"""Errors of `flock` on file systems without locks: Lustre without its option, some NFS and FUSE mounts."""
_NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.EACCES, errno.EPERM)
"""Errors of syncing a folder where that is not supported: VirtualBox shares, some SMB and FUSE mounts."""


def fsync_folder(folder: str | os.PathLike[str]) -> None:
    """Syncs a folder to disk, without which a file that was renamed there may be lost in a power cut.

    Does nothing on file systems that cannot sync folders.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            error.filename = os.fspath(folder)
            raise


def lock(descriptor: int, *, shared: bool = False, wait: bool = False) -> bool | None:
    """Locks an open file until its descriptor is closed, or changes its lock, which is lost where that fails.

    True if it is locked now, False if another process holds a lock, None on a file system without locks.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(descriptor, kind if wait else kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        if error.errno not in _NO_LOCKS:
            raise
        return None
    return True


class WriteCancelledError(FileNotFoundError):
    """The temporary file of an `AtomicFile` was deleted by another process's `cancel_writes`."""


class AtomicFile:
    """A file that is written next to `path` and replaces it, durably, once it is complete.

    A reader, also after a power cut, sees the old file or the new one. As a context manager it gives the open binary
    file, commits at the end of the block, and aborts where the block raises. Raises OSError that names `path`. The
    temporary file is locked while it is written, so that `remove_abandoned` knows that its writer lives.

    check: called by `commit` once the temporary file is complete; an error that it raises cancels the write.
    durable: False where the file may be lost in a power cut, and must not wait for the disk.
    """

    def __init__(
        self, path: str | os.PathLike[str], check: Callable[[], object] = lambda: None, *, durable: bool = True
    ) -> None:
        self.path, self._check, self._durable = Path(path), check, durable
        try:
            while not self._create():
                pass
        except OSError as error:
            error.filename = str(self.path)
            raise

    def _create(self) -> bool:
        """Opens and locks a new file; False where `remove_abandoned` took it in the instant before it was locked."""
        self._temporary = temporary_path(self.path)
        self.file: BinaryIO = self._temporary.open("xb")
        try:
            locked = lock(self.file.fileno()) is not False and self._temporary.exists()
        except BaseException:
            self.abort()
            raise
        if not locked:
            self.file.close()
        return locked

    def commit(self) -> None:
        """Syncs the file, calls `check`, renames the file, and syncs the folder.

        Raises WriteCancelledError where another process cancelled the write. An error before the rename leaves the old
        file in place and no temporary one.
        """
        try:
            self.file.flush()
            if self._durable:
                os.fsync(self.file.fileno())
            self._check()
            try:
                os.replace(self._temporary, self.path)
            except FileNotFoundError as error:
                raise WriteCancelledError(errno.ENOENT, "another process cancelled the write", self.path) from error
            self.file.close()
        except BaseException as error:
            self.abort()
            if isinstance(error, OSError):
                error.filename, error.filename2 = str(self.path), None
            raise
        if self._durable:
            fsync_folder(self.path.parent)

    def abort(self) -> None:
        """Deletes what was written; no effect after `commit`."""
        with contextlib.suppress(OSError):  # closing flushes, to a disk that may be full
            self.file.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> BinaryIO:
        return self.file

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.commit()
            return
        self.abort()
        if isinstance(error, OSError) and error.filename is None:  # a write to a full disk does not name the file
            error.filename = str(self.path)


def write_atomic(
    path: str | os.PathLike[str], data: bytes, check: Callable[[], object] = lambda: None, *, durable: bool = True
) -> None:
    """Writes a whole file as `AtomicFile`; writes it again, after `check`, where another process cancelled it.

    Raises OSError that names `path`, and what `check` raises.
    """
    while True:
        try:
            with AtomicFile(path, check, durable=durable) as file:
                file.write(data)
            return
        except WriteCancelledError:
            continue


def create_exclusive(path: Path, data: bytes, mode: int = 0o666) -> bool:
    """Makes a file, whole at once and not synced; False where it exists. Raises OSError.

    Without hard links, a reader may meet the file before its content.
    """
    temporary = temporary_path(path)
    try:
        temporary.touch(mode, exist_ok=False)
        temporary.write_bytes(data)
        try:
            os.link(temporary, path)
        except (FileExistsError, FileNotFoundError):
            raise
        except OSError:
            path.touch(mode, exist_ok=False)
            path.write_bytes(data)
        return True
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)


def move_into_place(made: Path, path: Path) -> None:
    """Renames what another library wrote next to `path`: a file, durably, or a folder, whose files are not synced.

    A folder takes the place of none, or of an empty one. Raises OSError.
    """
    if made.is_file():
        with made.open("rb") as file:
            os.fsync(file.fileno())
    os.replace(made, path)
    fsync_folder(path.parent)


_TEMPORARY = re.compile(r"\.[A-Za-z0-9_][A-Za-z0-9_.\-]*\.[0-9a-f]{32}\.repcon\.tmp")
"""Names of files that are being written: `remove_abandoned` deletes no other."""
_DAY_SECONDS = 86_400.0


def temporary_path(path: Path) -> Path:
    """A name next to `path` for a file that is being written."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.repcon.tmp")


def remove_abandoned(folder: str | os.PathLike[str]) -> None:
    """Deletes the temporary files below the folder whose writers were killed, and no other file."""
    for path in _temporary_files(folder):
        with contextlib.suppress(OSError):
            _remove_unlocked(path)


def is_temporary(name: str) -> bool:
    """Whether a file of this name is a `temporary_path`."""
    return bool(_TEMPORARY.fullmatch(name))


def cancel_writes(folder: str | os.PathLike[str], names: Collection[str]) -> None:
    """Deletes the temporary files of all processes, below the folder, of files of these names."""
    for path in _temporary_files(folder):
        if path.name[1:].rsplit(".", 3)[0] in names:
            path.unlink(missing_ok=True)


def _temporary_files(folder: str | os.PathLike[str]) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        yield from (Path(parent, name) for name in filter(_TEMPORARY.fullmatch, names))


def _remove_unlocked(temporary: Path) -> None:
    """Deletes the file unless it is locked; on a file system without locks, once it has not changed for a day."""
    descriptor = os.open(temporary, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        free = lock(descriptor)
        if free or (free is None and time.time() - os.fstat(descriptor).st_mtime > _DAY_SECONDS):
            temporary.unlink()
    finally:
        os.close(descriptor)
