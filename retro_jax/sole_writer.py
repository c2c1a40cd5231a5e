"""One process at a time writes a folder."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from retro_jax.errors import UserError

LOCK = "writer.lock"
# What file systems that have no locks answer: Lustre without flock, NFS without its daemon, FUSE.
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """While it lasts no other process enters it for the same folder, on other machines neither where the file system shares its
    locks. However a process ends, the folder is free then. Where a file system has no locks, that is said, and nothing is held.

    Raises:
        UserError: another process writes there, or has just renamed the folder.
    """
    path = folder / LOCK
    # NFS locks only what is open for writing, so a file and not the folder itself.
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            writer = file.read() or "another process"
            raise UserError(f"{folder} is being written by {writer}; wait until it has ended, or use another --workdir") from None
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise
            print(f"{folder}: its file system has no locks ({error.strerror}); let no other process write there", file=sys.stderr)
            yield
            return
        if not path.exists():
            raise UserError(f"{folder} has just been finished by another process; run the same command again")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
