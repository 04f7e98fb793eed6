"""An HTTP proxy on the way to the coordinator: where it is, and the file with its password.

The proxy carries a TLS connection that it cannot look into (RFC 9110, 9.3.6: CONNECT), and resolves the coordinator's
name. Its password is read when a connection is made, goes to gRPC and nowhere else, and stands in no repr. Must not know
sockets.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cosilo_common.errors import CosiloError
from cosilo_common.identity.documents import check_address
from cosilo_common.identity.secret_files import read_secret

CREDENTIALS_BYTES_MAX: Final = 1024  # a name and a password, of what people type
_SCHEME: Final = "http://"
_CREDENTIALS: Final = re.compile(r"[^:\x00-\x1f\x7f]+:[^\x00-\x1f\x7f]+")


@dataclass(frozen=True, slots=True)
class Proxy:
    """address: `host:port`, or "" for no proxy whatever the environment says; credentials: a file of mode 0600 with
    `user:password`, or none."""

    address: str
    credentials: Path | None = None

    def header(self) -> str:
        """The value of Proxy-Authorization, a secret; empty without credentials. Raises CosiloError where the file cannot be used."""
        if self.credentials is None:
            return ""
        try:
            text = read_secret(self.credentials, CREDENTIALS_BYTES_MAX).decode("utf-8").strip()
        except UnicodeDecodeError:
            text = ""
        if not _CREDENTIALS.fullmatch(text):
            raise CosiloError("read proxy credentials", f"{self.credentials} is not one line of user:password", "write it so, mode 0600")
        return "Basic " + base64.b64encode(text.encode()).decode("ascii")

    def channel_options(self) -> list[tuple[str, int | str]]:
        """What makes gRPC go through it, instead of what the environment says."""
        if not self.address:
            return [("grpc.enable_http_proxy", 0)]
        options: list[tuple[str, int | str]] = [("grpc.http_proxy", _SCHEME + self.address)]
        header = self.header()
        # gRPC would take the password from the URL too, where an @ in it ends the password and an error may show it.
        return [*options, ("grpc.http_connect_headers", f"Proxy-Authorization:{header}")] if header else options


def parse_proxy(text: str) -> str:
    """`host:port` of "http://host:port". Raises CosiloError for anything else, a password in it above all."""
    address = text.removeprefix(_SCHEME).removesuffix("/")
    if not text.startswith(_SCHEME) or "@" in address:
        raise CosiloError("read proxy", "it is not http://HOST:PORT", "a password goes into a file: proxy_credentials")
    return check_address("read proxy", address)
