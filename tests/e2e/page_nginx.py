"""The status page behind a real nginx with the configuration that docs/operating/page.md gives, word for word but for paths and ports.

Owns the certificates, the proxy and what is asked through it. Must not know what the page shows.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import ssl
import time
from pathlib import Path

import trustme

from tests.e2e.checklist import Checklist, expect, wait_for
from tests.federation.local import COORDINATOR, LocalFederation
from tests.federation.processes import Daemon

PAGE = Path(__file__).resolve().parents[2] / "docs" / "operating" / "page.md"
NAME = "cosilo.example.org"  # as the page has it
STARTS_S, ANSWERS_S = 20.0, 20.0
ANSWER_BYTES_MAX = 1 << 20


def behind_nginx(checks: Checklist, federation: LocalFederation, folder: Path) -> None:
    """Puts nginx before the page as page.md says, and asks it as staff, as a stranger and under another name."""
    folder.mkdir()
    proxy = _Nginx(folder, federation.endpoints(COORDINATOR)["page"])
    try:
        proxy.daemon.start()
        wait_for(proxy.listens, "nginx listens", STARTS_S, lambda: proxy.daemon.log.read_text(encoding="utf-8"))
        with checks.check("behind nginx, before the coordinator is told its name: 421, in the words of page.md"):
            status, said = proxy.ask("/", staff=True)
            expect(status == 421 and "this page is not known by that name" in said, f"{status}: {said}")
        with checks.check("with page_hosts: staff see the page and its events as they come; no certificate 400; another name 421"):
            _tell_name(federation)
            status, said = proxy.ask("/", staff=True)
            expect(status == 200 and "<title>" in said, f"{status}: {said}")
            status, said = proxy.ask("/", staff=False)
            expect(status == 400 and "No required SSL certificate was sent" in said, f"{status}: {said}")
            status, said = proxy.ask("/", staff=True, host="other.example.org")
            expect(status == 421, f"{status}: {said}")
            status, said = proxy.ask("/events", staff=True, until="data:")  # after the pause that a browser is told
            expect(status == 200 and "data:" in said, f"{status}: {said}")
    finally:
        proxy.daemon.stop()


class _Nginx:
    """nginx on a loopback port of its own, with certificates of an organisation that is not the federation's."""

    def __init__(self, folder: Path, upstream: str) -> None:
        served, staff = trustme.CA(), trustme.CA()
        server, person = served.issue_cert(NAME), staff.issue_cert("ann@example.org")
        files = {name: folder / name for name in ("server.pem", "server.key", "staff-ca.pem", "ann.pem", "served-ca.pem")}
        files["server.pem"].write_bytes(b"".join(blob.bytes() for blob in server.cert_chain_pems))
        server.private_key_pem.write_to_path(str(files["server.key"]))
        staff.cert_pem.write_to_path(str(files["staff-ca.pem"]))
        served.cert_pem.write_to_path(str(files["served-ca.pem"]))
        person.private_key_and_cert_chain_pem.write_to_path(str(files["ann.pem"]))
        self._files = files
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = int(probe.getsockname()[1])
        here = {
            "listen 443 ssl;": f"listen 127.0.0.1:{self._port} ssl;",
            "/etc/ssl/cosilo.example.org.pem": str(files["server.pem"]),
            "/etc/ssl/private/cosilo.example.org.key": str(files["server.key"]),
            "/etc/ssl/staff-ca.pem": str(files["staff-ca.pem"]),
            "http://127.0.0.1:7480": f"http://{upstream}",
        }
        (block,) = re.findall(r"```nginx\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
        for example, real in here.items():
            expect(block.count(example) == 1, f"{PAGE.name}: '{example}' does not stand once in the nginx block")
            block = block.replace(example, real)
        configuration = folder / "nginx.conf"
        configuration.write_text(
            f"daemon off; pid {folder}/nginx.pid; error_log stderr;\nevents {{}}\nhttp {{ access_log off;\n{block}\n}}\n", encoding="utf-8"
        )
        program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
        expect(program is not None, "nginx is not installed: tests/e2e/prepare page")
        assert program is not None
        self.daemon = Daemon("nginx", [program, "-c", str(configuration)], folder / "nginx.log", dict(os.environ))

    def listens(self) -> bool:
        """Whether its port takes connections."""
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self._port)) == 0

    def ask(self, path: str, *, staff: bool, host: str = NAME, until: str | None = None) -> tuple[int, str]:
        """One GET, with or without a certificate of the staff's. Returns status and body: whole, or as far as `until` of a body that goes on."""
        context = ssl.create_default_context(cafile=str(self._files["served-ca.pem"]))
        if staff:
            context.load_cert_chain(str(self._files["ann.pem"]))
        got, ends_s = b"", time.monotonic() + ANSWERS_S
        with (
            socket.create_connection(("127.0.0.1", self._port), timeout=ANSWERS_S) as raw,
            context.wrap_socket(raw, server_hostname=NAME) as stream,
        ):
            stream.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode("ascii"))
            while len(got) < ANSWER_BYTES_MAX and time.monotonic() < ends_s:
                part = stream.recv(1 << 16)
                got += part
                head, _, body = got.partition(b"\r\n\r\n")
                if not part or (until is not None and until.encode() in body):
                    break
        expect(got.startswith(b"HTTP/1.1 "), f"no answer to GET {path}: {got[:200]!r}")
        return int(head.split(b" ", 2)[1]), body.decode("utf-8", "replace")


def _tell_name(federation: LocalFederation) -> None:
    """page_hosts as page.md has it, and a restart."""
    (line,) = re.findall(r"(?m)^page_hosts = .*$", PAGE.read_text(encoding="utf-8"))
    path = federation.config(COORDINATOR)
    text, count = re.subn(r"(?m)^page = .*$", lambda found: f"{found[0]}\n{line}", path.read_text(encoding="utf-8"))
    expect(count == 1, f"{path} has no line for the page")
    path.write_text(text, encoding="utf-8")
    federation.daemon(COORDINATOR).stop()
    federation.restart(COORDINATOR)
