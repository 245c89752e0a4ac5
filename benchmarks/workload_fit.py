"""Fit the shipped workloads on Azure's 2023 traces, and say how good the fit is.

    python benchmarks/workload_fit.py [--conv CSV] [--code CSV] [--check]

Writes src/hexgen2/specs/catalog/workloads.yaml and prints, per workload, the errors of 200,000 requests drawn
from the fit against the trace: of the mean lengths, of the distributions (mean distance of equal quantiles, as
a part of the mean length), of the rank correlation, and of the mean of prompt x answer, which no marginal
decides. Without ``--code`` the entry azure-code stays as it is (its trace is published, but is not among the
data that the tests read); ``--check`` prints the errors and writes nothing. The traces, CC-BY-4.0:
https://github.com/Azure/AzurePublicDataset (AzureLLMInferenceDataset2023.md).
"""

from __future__ import annotations

import argparse
import datetime
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from scipy.stats import spearmanr, wasserstein_distance
from typing_extensions import override

from hexgen2.specs.catalog.traces import read_csv
from hexgen2.specs.catalog.workloads import WorkloadTable
from hexgen2.specs.workload import Lengths, Marginals, Workload

ROOT = Path(__file__).parent.parent
CONV = ROOT.parent / "shared" / "data" / "azure_conv_2023.csv"
TABLE = ROOT / "src" / "hexgen2" / "specs" / "catalog" / "workloads.yaml"

LEVELS = (0, 0.01, 0.02, *(percent / 100 for percent in range(5, 96, 5)), 0.98, 0.99, 0.995, 0.999, 1)
HEAVY_PROMPT, HEAVY_ANSWER = 512, 128
DRAWS = 200_000

SOURCES = {
    "conversation": {
        "title": "Azure LLM inference trace 2023, conversation",
        "url": "https://github.com/Azure/AzurePublicDataset/blob/master/data/AzureLLMInferenceTrace_conv.csv",
    },
    "code": {
        "title": "Azure LLM inference trace 2023, code",
        "url": "https://github.com/Azure/AzurePublicDataset/blob/master/data/AzureLLMInferenceTrace_code.csv",
    },
}
HEADER = """\
# Written by benchmarks/workload_fit.py; docs/workloads.md has the errors of the fit. Do not edit.
# inputs and outputs: prompt and answer lengths in tokens at each of `levels`. rank_correlation: Spearman's.
# mean_rps: mean arrivals per second of these requests in their trace.
"""


def class_mask(lengths: Lengths, name: str) -> NDArray[np.bool_]:
    """Which requests are in a class: hpld is heavy prompt (over 512 tokens), light decode (at most 128)."""
    heavy_prompt = lengths.inputs > HEAVY_PROMPT
    heavy_answer = lengths.outputs > HEAVY_ANSWER
    chosen: NDArray[np.bool_] = (heavy_prompt == (name[0] == "h")) & (heavy_answer == (name[2] == "h"))
    return chosen


def describe(name: str) -> str:
    prompt = "over" if name[0] == "h" else "up to"
    answer = "over" if name[2] == "h" else "up to"
    return f"conversation, prompts {prompt} {HEAVY_PROMPT} tokens, answers {answer} {HEAVY_ANSWER}"


def fit(lengths: Lengths, duration_s: float, trace: str, description: str) -> dict[str, Any]:
    """The entry of a workload: quantiles at LEVELS and the rank correlation."""
    correlation = spearmanr(lengths.inputs, lengths.outputs).statistic
    return {
        "description": description,
        "trace": trace,
        "requests": len(lengths),
        "mean_rps": round(len(lengths) / duration_s, 4),
        "rank_correlation": round(float(correlation), 4),
        "inputs": [round(float(value), 1) for value in np.quantile(lengths.inputs, LEVELS)],
        "outputs": [round(float(value), 1) for value in np.quantile(lengths.outputs, LEVELS)],
    }


def errors(entry: dict[str, Any], lengths: Lengths) -> dict[str, float]:
    """Errors of the fit: of the rank correlation absolute, the others relative to the mean."""
    marginals = Marginals(
        np.array(LEVELS), np.array(entry["inputs"]), np.array(entry["outputs"]), entry["rank_correlation"]
    )
    drawn = Workload(name="fit", marginals=marginals).sample(DRAWS, np.random.default_rng(0))
    found: dict[str, float] = {}
    for side in ("inputs", "outputs"):
        real, ours = getattr(lengths, side), getattr(drawn, side)
        found[f"{side} mean"] = ours.mean() / real.mean() - 1
        found[f"{side} distance"] = wasserstein_distance(real, ours) / real.mean()
    real_rank = spearmanr(lengths.inputs, lengths.outputs).statistic
    found["rank correlation"] = spearmanr(drawn.inputs, drawn.outputs).statistic - real_rank
    work = float((lengths.inputs * lengths.outputs).mean())
    found["prompt x answer"] = float((drawn.inputs * drawn.outputs).mean()) / work - 1
    return found


def select(lengths: Lengths, mask: NDArray[np.bool_]) -> Lengths:
    return Lengths(lengths.inputs[mask], lengths.outputs[mask])


def trace_parts(conv: Path, code: Path | None) -> dict[str, tuple[Lengths, float, str, str]]:
    """The requests of each workload with the duration of their trace, its key, and a description."""
    parts: dict[str, tuple[Lengths, float, str, str]] = {}
    whole = read_csv(conv)
    assert whole.trace is not None
    assert whole.arrivals_s is not None
    duration = float(whole.arrivals_s[-1])
    for name in ("hpld", "hphd", "lphd", "lpld"):
        chosen = select(whole.trace, class_mask(whole.trace, name))
        parts[name] = (chosen, duration, "conversation", describe(name))
    parts["azure-conv"] = (whole.trace, duration, "conversation", "conversation, the whole hour")
    if code is not None:
        coding = read_csv(code)
        assert coding.trace is not None
        assert coding.arrivals_s is not None
        span = float(coding.arrivals_s[-1])
        parts["azure-code"] = (coding.trace, span, "code", "code completion, the whole hour")
    return parts


def print_errors(entries: dict[str, dict[str, Any]], parts: dict[str, tuple[Lengths, float, str, str]]) -> None:
    """A Markdown table, as docs/workloads.md has it."""
    columns = ["workload", "requests", "rate", "mean prompt", "mean answer", "rank correlation"]
    columns += [
        "error: mean prompt",
        "mean answer",
        "prompts",
        "answers",
        "rank correlation",
        "prompt x answer",
    ]
    print("|", " | ".join(columns), "|")
    print("|" + "---|" * len(columns))
    for name, (lengths, *_) in parts.items():
        entry, found = entries[name], errors(entries[name], lengths)
        cells = (
            name,
            f"{len(lengths):,}",
            f"{entry['mean_rps']:.2f}/s",
            f"{lengths.inputs.mean():,.0f}",
            f"{lengths.outputs.mean():,.0f}",
            f"{entry['rank_correlation']:+.2f}",
            f"{found['inputs mean']:+.1%}",
            f"{found['outputs mean']:+.1%}",
            f"{found['inputs distance']:.1%}",
            f"{found['outputs distance']:.1%}",
            f"{found['rank correlation']:+.3f}",
            f"{found['prompt x answer']:+.1%}",
        )
        print("|", " | ".join(cells), "|")


class _Dumper(yaml.SafeDumper):
    """Writes a value out each time: two traces read on one day do not share an anchor."""

    @override
    def ignore_aliases(self, data: Any) -> bool:
        return True


def dump(document: dict[str, Any]) -> str:
    """YAML with the tables of numbers on one line each."""
    return HEADER + yaml.dump(document, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=10_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conv", type=Path, default=CONV, help="the conversation trace")
    parser.add_argument("--code", type=Path, help="the code trace")
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    if not args.conv.exists():
        sys.exit(f"no such file: {args.conv}")
    parts = trace_parts(args.conv, args.code)
    entries = {name: fit(*part) for name, part in parts.items()}
    print_errors(entries, parts)
    if args.check:
        return
    old: dict[str, Any] = {"traces": {}, "workloads": {}}
    if TABLE.exists():
        old = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    today = datetime.date.today()
    read = {key: {**SOURCES[key], "licence": "CC-BY-4.0", "read": today} for _, _, key, _ in parts.values()}
    document = {
        "levels": list(LEVELS),
        "traces": {**old["traces"], **read},
        "workloads": {**old["workloads"], **entries},
    }
    WorkloadTable.model_validate(document)
    TABLE.write_text(dump(document), encoding="utf-8")


if __name__ == "__main__":
    main()
