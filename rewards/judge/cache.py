"""Verdicts on disk: one SQLite file that any number of processes of a machine read and write."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

_BUSY_TIMEOUT_S = 30.0
"""Longest wait for another writer; a write takes about a millisecond."""


def default_path() -> Path:
    """`keel/judge.sqlite` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "keel" / "judge.sqlite"


def cache_key(parts: Mapping[str, Any]) -> str:
    """A digest of everything that a verdict depends on.

    Args:
        parts: JSON values; the order of keys does not matter.
    """
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class VerdictCache:
    """Replies by key. Safe for concurrent readers and writers: every call is one transaction on its own connection.

    Lives on a local disk: SQLite's write-ahead log does not work over network file systems. Delete the file to forget.
    """

    def __init__(self, path: Path) -> None:
        """Creates file and folders where they are missing."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(self._connect()) as connection, connection:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("CREATE TABLE IF NOT EXISTS verdicts (key TEXT PRIMARY KEY, reply TEXT NOT NULL)")

    def get(self, key: str) -> str | None:
        """The reply kept under `key`, if any."""
        with closing(self._connect()) as connection:
            row = connection.execute("SELECT reply FROM verdicts WHERE key = ?", (key,)).fetchone()
        return None if row is None else row[0]

    def put(self, key: str, reply: str) -> None:
        """Keeps a reply; the first one stays where two writers judged the same."""
        with closing(self._connect()) as connection, connection:
            connection.execute("INSERT OR IGNORE INTO verdicts VALUES (?, ?)", (key, reply))

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=_BUSY_TIMEOUT_S)
        connection.execute("PRAGMA synchronous=NORMAL")
        return connection
