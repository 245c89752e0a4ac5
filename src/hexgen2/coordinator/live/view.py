"""The document that the live page, `hexgen2 top` and scripts read: one JSON object, without any prompt."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from hexgen2.coordinator.config import EngineEndpoint
from hexgen2.coordinator.live.history import Sample
from hexgen2.coordinator.live.live import Live
from hexgen2.coordinator.live.reading import Ends, Reading
from hexgen2.report.live import flows_now, network_now
from hexgen2.report.page.flows import Measured, Station
from hexgen2.report.words import gpus_words, layout_words, nodes_words
from hexgen2.specs.plan import Plan

VERSION = 1


def document(live: Live, status: str, after: int | None = None, pictures: bool = False) -> dict[str, Any]:
    """The state of the service. ``after``: with the history, and only events, since that sample; ``pictures``:
    with the plan drawn as SVG."""
    last = live.history.last or live.sample()
    reading = live.history.reading
    assert reading is not None, "a sample was made from a reading"
    view = _View(live, reading)
    found: dict[str, Any] = {
        "version": VERSION,
        "began": live.began,
        "at": time.time(),
        "seq": last.seq,
        "status": status,
        "model": live.config.served_model_names[0],
        "now": _now(last),
        "totals": _totals(reading),
        "plan": _plan(view.plan, reading),
        "groups": view.groups(),
        "routes": view.routes(),
        "events": [asdict(event) for event in live.events.since(after or 0)],
    }
    if after is not None:
        found["history"] = live.history.columns(after)
    if pictures:
        found["pictures"] = view.pictures()
    return found


def _now(last: Sample) -> dict[str, Any]:
    return {name: value for name, value in asdict(last).items() if name not in ("seq", "at")}


def _totals(reading: Reading) -> dict[str, float]:
    return {
        "answered": reading.answered,
        "refused": reading.refused,
        "errors": reading.errors,
        "cancelled": reading.cancelled,
        "output_tokens": reading.tokens,
        "retries": reading.retries,
        "migrations": reading.migrations,
        "broken_off": sum(reading.broken.values()),
        "restarts": sum(reading.restarts.values()),
    }


def _plan(plan: Plan | None, reading: Reading) -> dict[str, Any] | None:
    if plan is None:
        return None
    return {
        "cluster": plan.cluster.name,
        "workload": plan.workload,
        "throughput_rps": plan.throughput_rps,
        "output_tokens_per_s": plan.output_tokens_per_s,
        "price_per_hour": plan.price_per_hour,
        "slo": {"ttft_s": plan.slo.ttft_s, "tpot_s": plan.slo.tpot_s},
        "bottleneck": plan.bottleneck.text,
        "best_rps": reading.best_rps,
        "changes": dict(reading.changes),
    }


class _View:
    """What one document needs of a moment, worked out once."""

    def __init__(self, live: Live, reading: Reading) -> None:
        self.plan = live.plan()
        self._config = live.config
        self._reading = reading
        self._reasons = {group: engine.reason for group, engine in live.fleet.engines.items()}
        self._rates = live.history.routed()
        self._shares = live.history.shares()
        self._kv = live.kv_bytes_per_s()

    def groups(self) -> list[dict[str, Any]]:
        return [self._group(engine) for engine in self._config.engines]

    def routes(self) -> list[dict[str, Any]]:
        planned: dict[Ends, float] = {(r.prefill, r.decode): r.share for r in self._config.routes}
        kv = self._kv_by_route()
        return [
            {
                "from": ends[0],
                "to": ends[1],
                "planned_share": share,
                "share": self._shares.get(ends, 0.0) if self._shares else None,
                "rps": self._rates.get(ends, 0.0),
                "kv_bytes_per_s": kv.get(ends),
            }
            for ends, share in (planned | {e: planned.get(e, 0.0) for e in self._rates if e[0]}).items()
        ]

    def pictures(self) -> dict[str, str | None]:
        known = self.plan.group_by_id if self.plan is not None else {}
        stations = []
        for engine in self._config.engines:
            group = known.get(engine.group_id)
            if self.plan is not None and group is not None:
                words = gpus_words(self.plan, group)
            else:
                words = f"batch {engine.max_batch}" if engine.max_batch else engine.role
            stations.append(Station((engine.group_id,), engine.role, engine.share, words))
        down = frozenset(group for group, up in self._reading.up.items() if not up)
        measured = Measured(
            {ends: share for ends, share in self._shares.items() if ends[0]},
            {ends[1]: share for ends, share in self._shares.items() if not ends[0]},
            down,
            not self._shares,
        )
        routes = {(route.prefill, route.decode): route.share for route in self._config.routes}
        network = None if self.plan is None else network_now(self.plan, self._kv_by_route(), down)
        return {"flows": flows_now(stations, routes, measured), "network": network}

    def _group(self, engine: EngineEndpoint) -> dict[str, Any]:
        id_, reading = engine.group_id, self._reading
        mine = [ends for ends in self._rates if id_ in ends]
        up = reading.up.get(id_, False)
        return {
            "id": id_,
            "role": engine.role,
            **self._where(id_),
            "up": up,
            "reason": "" if up else self._reasons.get(id_, ""),
            "tripped": reading.tripped.get(id_, False),
            "planned_share": engine.share,
            "share": sum(self._shares.get(ends, 0.0) for ends in mine) if self._shares else None,
            "rps": sum(self._rates[ends] for ends in mine),
            "in_flight": reading.busy.get(id_, 0.0),
            "max_batch": engine.max_batch,
            "load": reading.load.get(id_, 0.0),
            "kv_used": reading.kv_used.get(id_, 0.0),
            "waiting": reading.waiting.get(id_, 0.0),
            "restarts": reading.restarts.get(id_, 0.0),
            "kv_bytes_per_s": self._kv.get(id_),
        }

    def _where(self, id_: str) -> dict[str, Any]:
        """Layout, GPUs and rate of a group by the plan."""
        group = self.plan.group_by_id.get(id_) if self.plan is not None else None
        if self.plan is None or group is None:
            return {"layout": None, "gpus": None, "capacity_rps": None}
        words = {"layout": layout_words(self.plan, group), "gpus": nodes_words(group)}
        return {**words, "capacity_rps": group.capacity_rps}

    def _kv_by_route(self) -> Mapping[Ends, float]:
        """What a group received, by the routes that lead to it in proportion to their requests; nothing where
        that was not asked for yet."""
        if not self._kv:
            return {}
        into: dict[str, float] = {}
        for (prefill, target), rate in self._rates.items():
            if prefill:
                into[target] = into.get(target, 0.0) + rate
        return {
            (prefill, target): self._kv.get(target, 0.0) * rate / into[target]
            for (prefill, target), rate in self._rates.items()
            if prefill
        }
