"""Who may open which page."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Access:
    """Who may: with a ``token`` the summary is for whoever has it, and each page for whoever has its person's, which is
    derived from it; without, anybody on this machine. ``names`` are the people, anybody where there are none."""

    token: str | None = None
    names: Sequence[str] = ()

    def token_of(self, name: str) -> str | None:
        """The token of a person's link; of the summary's that of no name."""
        if self.token is None:
            return None
        return hmac.new(self.token.encode(), f"annotate {name}".encode(), hashlib.sha256).hexdigest()[:32]

    def allows(self, name: str, given: str | None) -> bool:
        expected = self.token_of(name)
        return expected is None or hmac.compare_digest((given or "").encode(), expected.encode())

    def link(self, path: str, name: str = "") -> str:
        token = self.token_of(name)
        return f"{path}?token={token}" if token else path
