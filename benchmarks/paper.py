"""The paper's evaluation (HexGen-2, arXiv 2502.07903, section 5) on our simulator; docs/paper.md explains it.

    python benchmarks/paper.py [--quick] [--parts main,worlds,...] [--processes 2] [-o DIR]
                               [--images DIR] [--page docs/paper.md]

Plans every case (paper_cases.py) with every system, runs the plans on the simulator, and writes into DIR
(build/benchmarks/paper):

    rows.jsonl      every case's row with its plan; an interrupted run goes on from here
    results.json    all figures, without plans
    paper.md        tables, the paper's claims beside ours

and the plots (SVG) into --images (DIR by default). --page: put the tables into that page. --quick: one model,
two loads, two settings.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from paper_budget import rented
from paper_cases import (
    CHEAPER,
    CLASSES,
    HOMOGENEOUS,
    LOADS,
    MIXED,
    MODELS,
    TRACE,
    WORLDS,
    Case,
    ablation_cases,
    link_cases,
    main_cases,
    stored_world,
    target_cases,
    targets_at,
    world_cases,
)
from paper_measure import measured, online
from paper_plots import plot_all
from paper_store import Store, fingerprint, sources
from paper_summary import online_key
from paper_tables import refreshed, report

Row = dict[str, Any]
Job = tuple[str, Callable[..., Row], tuple[Any, ...]]
PARTS = ("main", "online", "worlds", "targets", "ablation", "links", "budget")
LOAD = 0.75
"""Part of the peak at which latencies are taken, the paper's."""
QUICK_LOADS = ("hphd", "lphd", TRACE)
QUICK_CLUSTERS = (HOMOGENEOUS, MIXED[0], CHEAPER)


def planned_cases(parts: Sequence[str], quick: bool, clusters: Sequence[str] = ()) -> list[Case]:
    """Every case of these parts, each once; on these clusters where any are named."""
    found: list[Case] = []
    if "main" in parts or "online" in parts:
        found += main_cases()
    if "worlds" in parts:
        found += [case for world in WORLDS for case in world_cases(world)]
    if "targets" in parts:
        found += target_cases()
    if "ablation" in parts:
        found += ablation_cases()
    if "links" in parts:
        found += link_cases()
    found = [stored_world(case) for case in found]
    if quick:
        found = [case for case in found if in_quick(case)]
    if clusters:
        found = [case for case in found if case.cluster in clusters]
    return list(dict.fromkeys(found))


def in_quick(case: Case) -> bool:
    """Whether a quick run has the case."""
    small = case.model == MODELS[0] and case.load in QUICK_LOADS and case.cluster in QUICK_CLUSTERS
    return small and case.targets in (None, targets_at(0.5))


def online_jobs(cases: Iterable[Case], rows: Store) -> Iterator[Job]:
    """Runs at `LOAD` of a peak: DistServe-like's on 8 H100 for all alike; the trace at each one's own too."""
    for case in cases:
        row = rows[case.key]
        other_part = case.links != 1.0 or case.limit_s is not None
        if other_part or case.world not in ("base", "all") or "plan" not in row:
            continue
        reference = stored_world(
            Case(WORLDS[case.world].baseline, HOMOGENEOUS, case.model, case.load, case.world)
        )
        peak = rows[reference.key].get("rps") if reference.key in rows else None
        if peak and (case.world == "base" or case.load == TRACE):
            yield online_key(case, "common"), online, (case, row["plan"], LOAD * peak)
        if row.get("rps") and case.load == TRACE:
            yield online_key(case, "own"), online, (case, row["plan"], LOAD * row["rps"])


def run(jobs: Iterable[Job], store: Store, processes: int) -> None:
    """Do the jobs whose keys have no row yet; progress on stderr."""
    waiting = [job for job in jobs if job[0] not in store]
    if not waiting:
        return
    begun = time.monotonic()
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        futures: dict[Future[Row], str] = {pool.submit(work, *given): key for key, work, given in waiting}
        try:
            for done, future in enumerate(as_completed(futures), 1):
                key = futures[future]
                store.put(key, future.result())
                spent = time.monotonic() - begun
                print(f"{done}/{len(waiting)}  {spent:5.0f} s  {key}", file=sys.stderr, flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a subset that takes a minute or two")
    parser.add_argument("--parts", default=",".join(PARTS), help="of %(default)s")
    parser.add_argument("--clusters", default="", help="only on these, of examples/clusters")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path, default=Path("build/benchmarks/paper"), help="a folder")
    parser.add_argument("--images", type=Path, default=None, help="a folder for the plots")
    parser.add_argument("--page", type=Path, default=None, help="a page whose tables to make anew")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"unknown parts {', '.join(sorted(unknown))}; use some of {', '.join(PARTS)}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    begun = time.monotonic()
    store = Store(arguments.output, fingerprint(sources()))
    clusters = arguments.clusters.split(",") if arguments.clusters else ()
    cases = planned_cases(parts, arguments.quick, clusters)
    run(((case.key, measured, (case,)) for case in cases), store, arguments.processes)
    if "online" in parts:
        jobs = online_jobs((case for case in cases if case.load in LOADS), store)
        run(list(jobs), store, arguments.processes)
    if "budget" in parts:
        chosen = [(MODELS[0], "hphd")] if arguments.quick else product(MODELS, CLASSES)
        run(((f"budget/{m}/{w}", rented, (m, w)) for m, w in chosen), store, arguments.processes)
    rows = {key: store[key] for key in store}
    machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
    shown = {key: {name: value for name, value in row.items() if name != "plan"} for key, row in rows.items()}
    results = {"machine": machine, "wall_s": time.monotonic() - begun, "rows": shown}
    (arguments.output / "results.json").write_text(json.dumps(results), encoding="utf-8")
    text = report(rows)
    (arguments.output / "paper.md").write_text(text + "\n", encoding="utf-8")
    plot_all(rows, arguments.images or arguments.output)
    if arguments.page:
        page = arguments.page.read_text(encoding="utf-8")
        arguments.page.write_text(refreshed(page, rows), encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
