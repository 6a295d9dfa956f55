"""One file of records, read past the page cache where its file system can do that.

Some refuse it when the file is opened (tmpfs of older kernels), some at the first read (network and
user-space file systems, devices of larger blocks): that file is then read through the page cache,
and the others go on as they were. A read that brings less than was asked for is continued, one that
was interrupted is asked for again; what fails in earnest is an `OSError`."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

BLOCK = 4096  # bytes on whose multiples a read past the page cache begins and ends
REFUSED = (errno.EINVAL, errno.EOPNOTSUPP)
AGAIN = (errno.EAGAIN, errno.EINTR)
TRIES, PAUSE = 8, 0.002  # how often something is asked for again, after seconds that double

ADVICE = {
    errno.EIO: "the device or its connection may be failing: see the system's log, and copy the "
    "bundle to another place",
    errno.ESTALE: "the network file system gives another file there now: open the bundle again",
    errno.ENOTCONN: "its file system is gone: mount it, and open the bundle again",
    errno.ETIMEDOUT: "its file system does not answer: see to the connection, and try again",
    errno.EAGAIN: "its file system was busy every time: try again, or copy the bundle to a disk",
}


class ShardFile:
    """The file at `path`, open for reading; `direct` past the page cache, and if that cannot be had
    `refused` is called with the path and the reason, once. An `OSError` if it does not open.
    Threads may read at once."""

    def __init__(self, path: Path, direct: bool, refused: Callable[[Path, str], None]):
        self.path, self.direct = path, direct
        self._refused = refused
        self._changing, self._seeking = threading.Lock(), threading.Lock()
        self._opened: list[int] = []
        if direct and not hasattr(os, "O_DIRECT"):
            self._give_up("this system knows no such reads")
        elif direct:
            try:
                self._open(os.O_DIRECT)
            except OSError as error:
                if error.errno not in REFUSED:
                    raise
                self._give_up(str(error.strerror))
        else:
            self._open(0)

    def _open(self, flags: int) -> None:
        flags |= os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        self._opened.append(os.open(self.path, flags))

    def _give_up(self, reason: str) -> None:
        """From now on through the page cache. A thread that is reading otherwise may end."""
        with self._changing:
            if not self.direct:
                return
            self._open(0)
            self.direct = False
        self._refused(self.path, reason)

    def read(self, into: memoryview, at: int) -> int:
        """Fill `into` from the byte `at` of the file on; fewer bytes only where the file ends."""
        done = tries = 0
        while done < len(into):
            direct = self.direct
            try:
                got = self._read_once(into[done:], at + done)
            except OSError as error:
                if direct and error.errno in REFUSED:
                    self._give_up(str(error.strerror))
                elif error.errno in AGAIN and tries < TRIES:
                    time.sleep(PAUSE * 2**tries)
                    tries += 1
                else:
                    raise
                continue
            if not got:
                break
            if direct and got < len(into) - done:
                got -= (at + done + got) % BLOCK  # the next one begins on a block again
                if got <= 0:
                    self._give_up("reads end within a block")
                    continue
            done += got
        return done

    def _read_once(self, into: memoryview, at: int) -> int:
        """Bytes read at that place, 0 at the end; where the system lacks a way, the next best
        one."""
        file = self._opened[-1]
        if hasattr(os, "preadv"):
            return os.preadv(file, [into], at)
        if hasattr(os, "pread"):
            data = os.pread(file, len(into), at)
        else:
            with self._seeking:  # threads share the file's one position
                os.lseek(file, at, os.SEEK_SET)
                data = os.read(file, len(into))
        into[: len(data)] = data
        return len(data)

    def forget(self, at: int, nbytes: int) -> None:
        """Take these bytes out of the page cache, so that the next read is one of the device, where
        the system can."""
        if hasattr(os, "posix_fadvise"):  # macOS lacks it
            os.posix_fadvise(self._opened[-1], at, nbytes, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        for opened in self._opened:
            os.close(opened)
        self._opened = []
