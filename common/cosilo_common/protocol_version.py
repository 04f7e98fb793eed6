"""The version of the wire between sites and coordinator, and what is said where two do not match.

Raised with a change that an older side would misunderstand; a new field or call that it may ignore is no such change. Owns the number and the
words; who says them when is the session's and the service's.
"""

from __future__ import annotations

from typing import Final

PROTOCOL_VERSION: Final = 1


def version_gap(site: int, coordinator: int) -> str:
    """Which side is to be upgraded, in words; empty where both speak the same."""
    if site == coordinator:
        return ""
    older = "cosilo-site at this site" if site < coordinator else "the coordinator"
    return f"the site speaks protocol version {site} and the coordinator {coordinator}: upgrade {older}"
