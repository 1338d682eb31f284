"""The queue of scripted replies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from .ledger import Entry
from .replies import AnyReply

When = Callable[[Entry], bool]
INFERENCE = ("/responses", "/chat/completions")


@dataclass
class Rule:
    """A reply, for whom, and how often yet."""

    reply: AnyReply
    when: When | None
    path: str | None
    left: int

    def fits(self, entry: Entry) -> bool:
        """Tell whether this rule answers an entry."""
        paths = INFERENCE if self.path is None else (self.path,)
        if not any(entry.path == path for path in paths):
            return False
        return self.when is None or bool(self.when(entry))


@dataclass
class Script:
    """Rules in order; the first that fits answers."""

    rules: list[Rule] = field(default_factory=list)

    def add(
        self, *replies: AnyReply, when: When | None = None, path: str | None = None
    ) -> None:
        """Queue replies."""
        self.rules += [Rule(reply, when, path, reply.uses) for reply in replies]

    def take(self, entry: Entry) -> AnyReply | None:
        """Take the reply for an entry off the queue."""
        for rule in self.rules:
            if rule.fits(entry):
                rule.left -= 1
                if rule.left <= 0:
                    self.rules.remove(rule)
                return rule.reply
        return None

    def clear(self) -> None:
        """Forget all rules."""
        self.rules.clear()
