"""This site's audit log: where it is, and who a person at a terminal is in it.

Owns those words. Must not know what is done; whoever does something says so.
"""

from __future__ import annotations

import os
import pwd

from cosilo_client.config import SiteConfig
from cosilo_common.audit import AUDIT_FILE, AuditLog

DAEMON = "daemon"  # what the site's daemon does by itself


def site_log(config: SiteConfig) -> AuditLog:
    """The log in the state folder."""
    return AuditLog(config.state / AUDIT_FILE)


def by_person(config: SiteConfig, what: str, /, **detail: object) -> None:
    """Writes what a person at this site is about to do. Raises CosiloError where it cannot be written: then it is not done."""
    site_log(config).append(f"person {_login()}", what, **detail)


def _login() -> str:
    """Who typed it: the login that sudo remembers, else the process's own."""
    given = os.environ.get("SUDO_USER", "")
    if given.isascii() and given.replace("-", "").replace("_", "").replace(".", "").isalnum():
        return given[:64]
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return f"uid {os.geteuid()}"
