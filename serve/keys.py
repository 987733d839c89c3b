"""Who may ask, and how often."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ip2p_ray.errors import ConfigError

KEYS_FILE = "IP2P_API_KEYS_FILE"
"""Environment variable with the path of a file of keys, one a line; a line or a word that begins
with `#` begins a comment."""
KEYS = "IP2P_API_KEYS"
"""Environment variable with keys, divided by commas."""


class Keys:
    """The keys that are let in; only their digests are held, and nothing shows them."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def __len__(self) -> int:
        return len(self._digests)

    def __repr__(self) -> str:
        return f"<{len(self)} keys>"

    @classmethod
    def from_environment(cls) -> Keys:
        """What KEYS_FILE and KEYS name; none where neither is set.

        Raises:
            ConfigError: the file cannot be read, holds no key, or a key is shorter than 16
                characters or not of printable ASCII without spaces.
        """
        keys = [key.strip() for key in os.environ.get(KEYS, "").split(",")]
        path = os.environ.get(KEYS_FILE)
        if path:
            try:
                lines = Path(path).read_text("utf-8-sig").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"{KEYS_FILE}: {path} cannot be read: {error}") from error
            # a `#` inside of a key is the key's
            found = [re.sub(r"(^|\s)#.*", "", line).strip() for line in lines]
            if not any(found):
                raise ConfigError(f"{KEYS_FILE}: {path} holds no key")
            keys += found
        keys = [key for key in keys if key]
        if any(len(key) < 16 for key in keys):
            raise ConfigError("an API key has at least 16 characters; one that is given has fewer")
        if not all(re.fullmatch(r"[!-~]+", key) for key in keys):
            raise ConfigError(
                "an API key is of ASCII letters, digits and signs, without spaces; one is not"
            )
        return cls(keys)

    def find(self, authorization: str | None) -> int | None:
        """The number of the key in an Authorization header, None where it is none of these.

        Takes as long for any text: every key is compared, in constant time.
        """
        scheme, _, given = (authorization or "").partition(" ")
        digest = _digest(given.strip())
        same = [hmac.compare_digest(digest, known) for known in self._digests]
        return same.index(True) if any(same) and scheme.lower() == "bearer" else None


@dataclass
class RateLimit:
    """A bucket of tokens a key: so many requests a minute, a quarter of them at once."""

    per_minute: float
    _buckets: dict[int, tuple[float, float]] = field(default_factory=dict, init=False)

    def wait_s(self, key: int, count: int = 1, now: float | None = None) -> float:
        """Seconds until a key may ask for `count` pictures; 0 takes the tokens."""
        now = time.monotonic() if now is None else now
        most = max(1.0, self.per_minute / 4)
        tokens, at = self._buckets.get(key, (most, now))
        tokens = min(most, tokens + (now - at) * self.per_minute / 60)
        # more than the bucket ever holds passes when it is full, and leaves a debt
        needed = min(float(count), most)
        if tokens < needed:
            self._buckets[key] = tokens, now
            return (needed - tokens) * 60 / self.per_minute
        self._buckets[key] = tokens - count, now
        return 0.0

    def give_back(self, key: int, count: int) -> None:
        """Tokens of pictures that were not made."""
        if key in self._buckets:
            tokens, at = self._buckets[key]
            self._buckets[key] = tokens + count, at


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
