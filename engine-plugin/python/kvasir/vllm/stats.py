"""What the connector counts, for vLLM's log and its `/metrics`."""

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

COUNTERS = {
    "blocks_loaded": "Blocks that came whole",
    "blocks_failed": "Blocks that were found, did not come, and were computed",
    "stored": "Blocks that the daemon took",
    "stores_failed": "Blocks that it did not take",
    "stores_dropped": "Blocks that were not stored because too many waited",
    "calls_failed": "Lookups and loads that the daemon failed",
    "calls_skipped": "Lookups and loads not begun because the daemon had failed before",
    "loads_late": "Loads given up because they took too long",
}


class KvasirStats(KVConnectorStats):
    """Counts since the last time they were asked for."""

    def reset(self) -> None:
        self.data = {}

    def is_empty(self) -> bool:
        return not any(self.data.values())

    def aggregate(self, other: KVConnectorStats) -> "KvasirStats":
        for name, count in other.data.items():
            self.data[name] = self.data.get(name, 0) + count
        return self

    def reduce(self) -> dict[str, int | float]:
        return dict(self.data)


class Counts:
    """What was counted when that was asked last."""

    def __init__(self) -> None:
        self._last: dict[str, int] = {}

    def since(self, now: dict[str, int]) -> KvasirStats | None:
        stats = KvasirStats({it: now.get(it, 0) - self._last.get(it, 0) for it in COUNTERS})
        self._last = now
        return None if stats.is_empty() else stats


class KvasirMetrics(KVConnectorPromMetrics):
    """Counters `vllm:kvasir_…`, by engine."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._counters = {}
        for name, documentation in COUNTERS.items():
            counter = self._counter_cls(
                name=f"vllm:kvasir_{name}",
                documentation=documentation,
                labelnames=self._labelnames,
            )
            for engine, values in self.per_engine_labelvalues.items():
                self._counters[engine, name] = counter.labels(*values)

    def observe(
        self, transfer_stats_data: dict[str, Any], engine_idx: int = 0
    ) -> None:
        for name, count in transfer_stats_data.items():
            counter = self._counters.get((engine_idx, name))
            if counter is not None and count > 0:
                counter.inc(count)
