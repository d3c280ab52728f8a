"""What /metrics tells Prometheus."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector
from starlette.responses import Response

from unique_asr.application.queue import JobQueue

SECONDS = (0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)  # bounds of the histograms


class Metrics:
    """Counters of one server; the gauges include the jobs of a page that shares the queue."""

    def __init__(self, queue: JobQueue) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self.answers = self._make(Counter, "requests", "Requests for transcriptions, by HTTP status", ["status"])
        self.audio = self._make(Counter, "audio_seconds", "Seconds of audio transcribed")
        self.waiting = self._make(Histogram, "waiting_seconds", "Time that a job waited", buckets=SECONDS)
        self.working = self._make(Histogram, "transcription_seconds", "Time that a job was worked on", buckets=SECONDS)
        self._make(Gauge, "jobs_waiting", "Jobs that wait").set_function(lambda: queue.waiting)
        self._make(Gauge, "jobs_running", "Jobs at work").set_function(lambda: int(queue.running is not None))

    def _make(self, kind: type, name: str, description: str, *labels: list[str], **settings: object) -> object:
        return kind(f"unique_asr_{name}", description, *labels, registry=self._registry, **settings)

    def to_response(self) -> Response:
        """Return all of them as text."""
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)
