"""Figures for Prometheus: requests and their times, the run's stages, memory, scans."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.server.served import Served

BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


@dataclass
class Seen:
    """What is known of a request when it ends."""

    status: int = 500


class Metrics:
    """One registry per server."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

        self.registry = CollectorRegistry()
        ProcessCollector(namespace="curate", registry=self.registry)
        self.requests = Counter(
            "curate_requests", "requests answered", ["route", "method", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "curate_request_seconds",
            "seconds to the end of the answer",
            ["route"],
            buckets=BUCKETS,
            registry=self.registry,
        )
        gauges = {
            "images": ("images in the index", []),
            "hidden_images": ("images forgotten or dropped by a decision", []),
            "scan_running": ("1 while a scan is under way", []),
            "driver_running": ("1 while a process works on the run", []),
            "stage_done_parts": ("parts done", ["stage"]),
            "stage_total_parts": ("parts in all", ["stage"]),
            "stage_rows": ("rows written", ["stage"]),
            "stage_rows_per_second": ("rate of the last minutes", ["stage"]),
            "stage_remaining_seconds": ("time until the stage is done at this rate", ["stage"]),
            "stage_complete": ("1 where the stage is complete", ["stage"]),
            "stage_failures": ("rows that are not usable", ["stage", "reason"]),
        }
        self.gauges = {
            name: Gauge(f"curate_{name}", words, labels, registry=self.registry)
            for name, (words, labels) in gauges.items()
        }

    @contextmanager
    def request(self, scope: Any) -> Iterator[Seen]:
        """Counts a request and its time."""
        seen, started = Seen(), time.monotonic()
        try:
            yield seen
        finally:
            route = getattr(scope.get("route"), "path", "other")
            method = scope["method"] if scope["method"] in ("GET", "HEAD", "POST", "DELETE") else "other"
            self.requests.labels(route, method, str(seen.status)).inc()
            self.seconds.labels(route).observe(time.monotonic() - started)

    def text(self, served: "Served") -> tuple[bytes, str]:
        """(the figures now, their content type)."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        live = served.live()
        self.gauges["images"].set(len(served.opened.ids) if served.opened else 0)
        self.gauges["hidden_images"].set(len(served.hidden))
        self.gauges["scan_running"].set(served.scans.running)
        self.gauges["driver_running"].set(live["driver"] is not None)
        for stage in live["stages"]:
            self._stage(stage)
        return generate_latest(self.registry), CONTENT_TYPE_LATEST

    def _stage(self, stage: dict[str, Any]) -> None:
        name = stage["stage"]
        self.gauges["stage_complete"].labels(name).set(stage["state"] != "running")
        self.gauges["stage_rows"].labels(name).set(stage["rows"])
        self.gauges["stage_done_parts"].labels(name).set(stage["done"])
        self.gauges["stage_total_parts"].labels(name).set(stage["total"] or 0)
        self.gauges["stage_rows_per_second"].labels(name).set(stage["rows_per_second"])
        self.gauges["stage_remaining_seconds"].labels(name).set(stage["remaining_seconds"] or 0)
        for reason, count in stage["failures"].items():
            self.gauges["stage_failures"].labels(name, reason).set(count)
