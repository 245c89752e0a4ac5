"""The shipped profile `splitwise-2023` against the table it was fitted on (../shared/data).

Rows of TP 2 with batch 64 are left out: they are faster than a batch of 8, which is impossible.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from hexgen2.calibrate import measured_table
from hexgen2.calibrate.fit import Measured, errors_of
from hexgen2.cost import default_efficiency
from hexgen2.cost.profile_files import load_profile
from hexgen2.specs.catalog import gpu_type
from hexgen2.specs.errors import InputError

TABLE = Path(__file__).parents[3] / "shared" / "data" / "measured_llama2_70b_a100_h100.csv"
TYPES = tuple(measured_table.GPUS.values())
Points = dict[str, list[Measured]]


@pytest.fixture(scope="module")
def points() -> Points:
    if not TABLE.exists():
        pytest.skip(f"needs {TABLE.name} in ../shared/data")
    return measured_table.read(TABLE)


@pytest.mark.parametrize("gpu", TYPES)
def test_every_possible_point_is_read(points: Points, gpu: str) -> None:
    by_phase = {phase: [one for one in points[gpu] if one.phase == phase] for phase in ("prefill", "decode")}
    # 13 (prompt, batch) points of prefill and 6 more answer lengths of decode by TP, without (TP 2, batch 64).
    assert len(by_phase["prefill"]) == 3 * 13 - 1
    assert len(by_phase["decode"]) == 3 * 19 - 1
    assert not any((one.layout[0].tp, one.batch) in measured_table.IMPOSSIBLE for one in points[gpu])


@pytest.mark.parametrize("gpu", TYPES)
def test_the_shipped_profile_is_within_8_percent(points: Points, gpu: str) -> None:
    shipped = load_profile("splitwise-2023").gpus[gpu]
    errors = measured_table.median_errors(points[gpu], errors_of(gpu, points[gpu], shipped))
    assert set(errors) == {(phase, tp) for phase in ("prefill", "decode") for tp in (2, 4, 8)}
    assert max(errors.values()) <= 0.08, errors


@pytest.mark.parametrize("gpu", TYPES)
def test_two_tps_predict_the_third_within_15_percent(points: Points, gpu: str) -> None:
    errors = measured_table.cross_validated(gpu, points[gpu])
    assert max(errors.values()) <= 0.15, errors


@pytest.mark.parametrize("gpu", TYPES)
def test_a_current_engine_is_faster_but_not_by_an_order(points: Points, gpu: str) -> None:
    """The defaults are for a current engine: this holds the direction and the order of the difference."""
    errors = errors_of(gpu, points[gpu], default_efficiency(gpu_type(gpu)))
    assert -0.7 < statistics.median(errors) < 0


def test_another_file_is_refused(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.csv"
    wrong.write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match=r"wrong\.csv.* is not the table"):
        measured_table.read(wrong)
    with pytest.raises(InputError, match="cannot be read"):
        measured_table.read(tmp_path / "none.csv")
