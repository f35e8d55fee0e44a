"""Numbers for Prometheus: vLLM's names where it has them, ours for what only contrasts have."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Gauges:
    """The counters of one server, in a registry of their own."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        self.model = model
        self.running = self._gauge("vllm:num_requests_running", "Requests in the batch.")
        self.waiting = self._gauge("vllm:num_requests_waiting", "Requests that wait.")
        self.rows = self._gauge("trueline:rows_running", "Rows of the batch: branches of samples.")
        self.groups = self._gauge("trueline:groups_running", "Requests with several branches.")
        self.prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens, all branches.")
        self.tokens = self._counter("vllm:generation_tokens", "Tokens that were generated.")
        self.flipped = self._counter(
            "trueline:flipped_tokens",
            "Tokens that the first branch, decoding greedily, would not have taken; of the traced.",
        )
        self.traced = self._counter("trueline:traced_tokens", "Tokens whose contrast was measured.")
        self.kl = self._histogram(
            "trueline:contrast_kl_nats",
            "KL of the combined distribution from the first branch, of the traced tokens.",
            (0.001, 0.01, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16),
        )
        self.aborted = self._counter("trueline:groups_aborted", "Requests that ended early.")
        self.finished = Counter(
            "vllm:request_success",
            "Requests that were answered.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self.first_token = self._histogram(
            "vllm:time_to_first_token_seconds", "From the request to its first token.", SECONDS
        )
        self.between_tokens = self._histogram(
            "vllm:inter_token_latency_seconds", "From a token to the next.", SECONDS
        )
        self.whole = self._histogram(
            "vllm:e2e_request_latency_seconds", "From the request to its last token.", SECONDS
        )

    def page(self) -> bytes:
        """Return the text that Prometheus reads."""
        return generate_latest(self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, ["model_name"], registry=self.registry).labels(self.model)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, ["model_name"], registry=self.registry).labels(self.model)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        made = Histogram(name, text, ["model_name"], buckets=buckets, registry=self.registry)
        return made.labels(self.model)
