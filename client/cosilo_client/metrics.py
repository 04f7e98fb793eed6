"""What a site measures of itself. These figures stay at the site: nothing here is ever sent to the coordinator.

Owns the names, as DESIGN.md lists them. No label depends on a run, so nothing grows.
"""

from __future__ import annotations

from datetime import datetime
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, PlatformCollector, ProcessCollector

PREFIX: Final = "cosilo"


class SiteMetrics:
    """The site's metrics in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self._training_loss = self._gauge("training_loss", "Mean training loss, as last reported by the trainer.")
        self._images = Counter("images", "Images trained on.", namespace=PREFIX, registry=self.registry)
        self._images_per_second = self._gauge("images_per_second", "Images trained on a second, as last reported.")
        self._gpu_memory = self._gauge("gpu_memory_bytes", "Most GPU memory the last training took.")
        self._restarts = Counter(
            "trainer_restarts",
            "Times that the trainer process had to be started again.",
            namespace=PREFIX,
            registry=self.registry,
        )
        self._audit_failures = Counter(
            "audit_failures", "Entries that could not be written to the audit log.", namespace=PREFIX, registry=self.registry
        )
        self._connected = self._gauge("connected", "1 while the coordinator is connected, else 0.")
        self._ca_expiry = self._gauge("ca_expiry_timestamp_seconds", "When the federation's root certificate ends, in UTC seconds.")
        self._expiry = self._gauge("certificate_expiry_timestamp_seconds", "When this site's TLS certificate ends, in UTC seconds.")

    def trained(self, loss: float, images: int, images_per_second: float) -> None:
        """The trainer went on. images: since the last call."""
        self._training_loss.set(loss)
        self._images.inc(max(0, images))
        self._images_per_second.set(images_per_second)

    def gpu_memory(self, used_bytes: int) -> None:
        """What a finished training took."""
        self._gpu_memory.set(used_bytes)

    def trainer_restarted(self, times: int) -> None:
        """The trainer process died, or ran out of memory, and was started again so many times."""
        self._restarts.inc(times)

    def audit_failed(self) -> None:
        """An entry is missing from the audit log."""
        self._audit_failures.inc()

    def connected(self, is_connected: bool) -> None:
        """Whether the coordinator answers on the stream."""
        self._connected.set(1 if is_connected else 0)

    def certificate_expires(self, at: datetime) -> None:
        """at: aware."""
        self._expiry.set(at.timestamp())

    def ca_expires(self, at: datetime) -> None:
        """at: aware; of the newest root that this site trusts."""
        self._ca_expiry.set(at.timestamp())

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, namespace=PREFIX, registry=self.registry)
