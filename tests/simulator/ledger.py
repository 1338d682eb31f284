"""What the simulator received: one entry per request."""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .scene import content_texts, items_of
from .validation import unknown_keys


@dataclass
class Entry:
    """One request, and how its answer went."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    raw: bytes
    body: Any
    at: float
    connection: int
    status: int | None = None
    cut_by_client: bool = False
    finished: bool = False
    ended: float | None = None

    @property
    def model(self) -> str | None:
        """Return the requested model."""
        return self.body.get("model") if isinstance(self.body, dict) else None

    @property
    def unknown_keys(self) -> list[str]:
        """List the top-level keys that /responses does not know."""
        return unknown_keys(self.body) if isinstance(self.body, dict) else []

    @property
    def items(self) -> list[dict[str, Any]]:
        """List the input items of the body."""
        return items_of(self.body) if isinstance(self.body, dict) else []

    @property
    def last_user_text(self) -> str:
        """Return the text of the last user message."""
        key = (
            "messages"
            if isinstance(self.body, dict) and "messages" in self.body
            else ""
        )
        entries = self.body[key] if key else self.items
        for item in reversed(entries):
            if item.get("role") == "user":
                return "".join(content_texts(item.get("content")))
        return ""

    def as_json(self) -> dict[str, Any]:
        """Describe the entry for another process."""
        plain = {
            k: v for k, v in vars(self).items() if k not in ("raw", "headers", "query")
        }
        return plain | {
            "raw": base64.b64encode(self.raw).decode(),
            "headers": dict(self.headers),
            "query": dict(self.query),
        }


@dataclass
class Ledger:
    """Entries in order of arrival, safe to read from any thread."""

    entries: list[Entry] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def __iter__(self) -> Iterator[Entry]:
        return iter(list(self.entries))

    def add(self, entry: Entry) -> Entry:
        """Record a request."""
        with self.changed:
            self.entries.append(entry)
            self.changed.notify_all()
        return entry

    def update(self, entry: Entry, **facts: Any) -> None:
        """Record how an answer goes."""
        with self.changed:
            for name, fact in facts.items():
                setattr(entry, name, fact)
            self.changed.notify_all()

    def clear(self) -> None:
        """Forget everything."""
        with self.changed:
            self.entries.clear()
            self.changed.notify_all()

    def wait_for(self, predicate: Callable[[list[Entry]], Any], timeout: float) -> Any:
        """Wait until a predicate of the entries holds, and return its value."""
        deadline = time.monotonic() + timeout
        with self.changed:
            while not (value := predicate(self.entries)):
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError(
                        f"not so after {timeout} s: {self.entries!r:.2000}"
                    )
                self.changed.wait(left)
            return value
