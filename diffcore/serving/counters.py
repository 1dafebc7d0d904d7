"""What a service counts: requests by outcome, rows of the network, and latencies."""

import threading
from collections import Counter, deque
from collections.abc import Mapping
from typing import Literal, get_args

import numpy as np

__all__ = ["Outcome", "ServiceCounters"]

Outcome = Literal["completed", "failed", "cancelled", "timed_out", "refused"]

LATENCIES = 1000
"""Number of recent latencies of which quantiles are computed."""
QUANTILES = (0.5, 0.9, 0.99)
HELP = {
    "requests_total": "Requests by outcome.",
    "samples_total": "Samples of completed requests.",
    "batches_total": "Calls of the network, each of a fixed number of rows.",
    "rows_total": "Rows of these calls: those that a sample needed, and padding.",
    "unfinished_samples": "Samples of accepted requests that are not done.",
    "active_samples": "Samples whose sampler state is being advanced.",
    "latency_seconds": f"Seconds from submission to result, of the last {LATENCIES} requests.",
}


class ServiceCounters:
    """Thread-safe counters of a service, and their text for Prometheus."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[str] = Counter()
        self._rows: Counter[str] = Counter()
        self._samples, self._batches = 0, 0
        self._latencies: deque[float] = deque(maxlen=LATENCIES)
        self._latency_sum = 0.0

    def count_request(self, outcome: Outcome, samples: int = 0, seconds: float = 0.0) -> None:
        """Count a request that has ended.

        Args:
            outcome: how it ended.
            samples: number of its samples, if it is completed.
            seconds: seconds since it was submitted, if it is completed.
        """
        with self._lock:
            self._requests[outcome] += 1
            if outcome == "completed":
                self._samples += samples
                self._latencies.append(seconds)
                self._latency_sum += seconds

    def count_batch(self, used: int, size: int) -> None:
        """Count a call of the network.

        Args:
            used: number of rows that samples needed.
            size: number of rows of the call.
        """
        with self._lock:
            self._batches += 1
            self._rows["used"] += used
            self._rows["padding"] += size - used

    def values(self, gauges: Mapping[str, int]) -> dict[str, float]:
        """All values by their Prometheus name, labels included.

        Args:
            gauges: present number of `unfinished_samples` and `active_samples`.

        Returns:
            Values by name, such as `requests_total{outcome="completed"}`.
        """
        with self._lock:
            latencies = list(self._latencies)
            values: dict[str, float] = {
                f'requests_total{{outcome="{outcome}"}}': self._requests[outcome]
                for outcome in get_args(Outcome)
            }
            values |= {"samples_total": self._samples, "batches_total": self._batches}
            values |= {f'rows_total{{use="{use}"}}': self._rows[use] for use in ("used", "padding")}
            values |= gauges
            if latencies:
                for quantile, value in zip(
                    QUANTILES, np.quantile(latencies, QUANTILES), strict=True
                ):
                    values[f'latency_seconds{{quantile="{quantile}"}}'] = float(value)
            values["latency_seconds_sum"] = self._latency_sum
            values["latency_seconds_count"] = self._requests["completed"]
        return values

    def text(self, gauges: Mapping[str, int]) -> str:
        """The values in the text format of Prometheus.

        Args:
            gauges: present number of `unfinished_samples` and `active_samples`.

        Returns:
            Lines, of which comments name the type of each metric.
        """
        lines, seen = [], set()
        for name, value in self.values(gauges).items():
            metric = name.partition("{")[0].removesuffix("_sum").removesuffix("_count")
            if metric not in seen:
                seen.add(metric)
                lines += [
                    f"# HELP diffcore_{metric} {HELP[metric]}",
                    f"# TYPE diffcore_{metric} {_kind(metric)}",
                ]
            lines.append(f"diffcore_{name} {value:.10g}")
        return "\n".join(lines) + "\n"


def _kind(metric: str) -> str:
    if metric.endswith("_total"):
        return "counter"
    return "summary" if metric == "latency_seconds" else "gauge"
