"""Judge replies on disk, found by the content of their request."""

import socket
import sqlite3
from collections.abc import Sequence
from pathlib import Path

from balcap_mega.errors import UserError


class ReplyCache:
    """Maps a request's digest to its reply; shared by the processes of one host, kept across runs.

    One SQLite file a host: its locking is sound between local processes and is not over a network file system, where
    `folder` often lies. Used from one thread.
    """

    def __init__(self, folder: str | Path):
        self._path = Path(folder) / f"replies-{socket.gethostname()}.sqlite"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(self._path, timeout=30, isolation_level=None, check_same_thread=False)
            self._database.text_factory = bytes  # whatever stands there: it is validated where it is read
            # A reply lost in a power cut is asked for again, so no write waits for the disk.
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=OFF")
            self._database.execute("CREATE TABLE IF NOT EXISTS replies (digest TEXT PRIMARY KEY, reply TEXT NOT NULL)")
        except (OSError, sqlite3.DatabaseError) as error:
            raise self._unusable(error) from error

    def get(self, digests: Sequence[str]) -> bytes | None:
        """The reply kept under the first of these digests that has one."""
        marks = ", ".join("?" * len(digests))
        found = dict(self._execute(f"SELECT digest, reply FROM replies WHERE digest IN ({marks})", *digests).fetchall())
        return next((found[digest.encode()] for digest in digests if digest.encode() in found), None)

    def put(self, digest: str, reply: str) -> None:
        self._execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", digest, reply)

    def _execute(self, statement: str, *values: str) -> sqlite3.Cursor:
        try:
            return self._database.execute(statement, values)
        except sqlite3.DatabaseError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: Exception) -> UserError:
        return UserError(
            f"rewards.cache_dir={self._path.parent}: cannot keep replies in {self._path.name} ({error})",
            remedy="name a writable folder, or delete that file if it is damaged",
        )

    def close(self) -> None:
        self._database.close()
