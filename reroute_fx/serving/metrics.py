"""What a server counts, as Prometheus reads it."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.waiting = self._gauge("requests_waiting", "requests that wait for rows")
        self.waiting_bytes = self._gauge(
            "requests_waiting_bytes", "bytes of the inputs of requests that wait"
        )
        self.rows = self._gauge("rows", "rows to decode in", "tier")
        self.rows_in_use = self._gauge("rows_in_use", "rows that hold an answer", "tier")
        self.cache_bytes = self._gauge("cache_bytes", "bytes of keys and values", "tier")
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "from when a request was prepared to its first token"
        )
        self.between_tokens = self._histogram(
            "time_between_tokens_seconds", "between two tokens of an answer"
        )
        self.prompt_tokens = self._counter("prompt_tokens", "tokens of prompts that ran")
        self.answer_tokens = self._counter("answer_tokens", "tokens of answers")
        self.visual_tokens = self._counter("visual_tokens", "visual tokens of prompts that ran", "tier")
        self.kept_visual_tokens = self._counter(
            "kept_visual_tokens", "visual tokens that a decision kept", "tier", "layer"
        )
        self.answered = self._counter("requests_answered", "requests by how they ended", "reason")
        self.refused = self._counter("requests_refused", "requests that were refused, by error", "reason")

    def _gauge(self, name: str, about: str, *labels: str) -> Gauge:
        return Gauge(f"reroute_fx_{name}", about, labels, registry=self.registry)

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(f"reroute_fx_{name}", about, labels, registry=self.registry)

    def _histogram(self, name: str, about: str) -> Histogram:
        return Histogram(f"reroute_fx_{name}", about, buckets=_SECONDS, registry=self.registry)
