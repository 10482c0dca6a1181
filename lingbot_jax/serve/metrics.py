"""What a server counts, for Prometheus."""

import prometheus_client as prometheus

SECONDS = (0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)


class Metrics:
    """In a registry of its own, so that several servers in a process do not meet."""

    def __init__(self):
        self.registry = registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=registry)
        counter = lambda name, text, *labels: prometheus.Counter(
            f"lingbot_{name}", text, labels, registry=registry
        )
        gauge = lambda name, text: prometheus.Gauge(f"lingbot_{name}", text, registry=registry)
        histogram = lambda name, text: prometheus.Histogram(
            f"lingbot_{name}", text, registry=registry, buckets=SECONDS
        )
        self.sessions = gauge("sessions", "Worlds that are being played")
        self.capacity = gauge("sessions_max", "Worlds that may be played at once")
        self.ready = gauge("ready", "1: warm and taking sessions, 0: warming or draining")
        self.turned_away = counter("busy", "Clients told that all places are taken")
        self.ended = counter("sessions_ended", "Sessions by why they ended", "reason")
        self.frames = counter("frames", "Frames made")
        self.dropped = counter("frames_dropped", "Frames that a slow client did not get")
        self.invalid = counter("messages_invalid", "Messages of clients that were refused")
        self.late = counter("chunks_late", "Chunks begun later than their time by half a chunk or more")
        self.device_seconds = counter(
            "device_busy_seconds", "Time that the device worked; its rate is the load"
        )
        self.chunk = histogram("chunk_seconds", "Time to generate and decode a chunk")
        self.wait = histogram("queue_seconds", "Time that a chunk waited for its turn on the device")
        self.answer = histogram(
            "key_to_send_seconds", "Time from a change of keys to the first frame that saw it"
        )

    def text(self) -> bytes:
        return prometheus.generate_latest(self.registry)
