"""A dead engine's log, told in a few lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from hexgen2.deploy import logs

VLLM_LOG = """\
(APIServer pid=7) INFO 11-22 09:00:00 [model.py:733] Resolved architecture: LlamaForCausalLM
(EngineCore pid=9) ERROR 11-22 09:00:01 [core.py:1300] EngineCore failed to start.
(EngineCore pid=9) ERROR 11-22 09:00:01 [core.py:1300] Traceback (most recent call last):
(EngineCore pid=9) ERROR 11-22 09:00:01 [core.py:1300]   File "core.py", line 1274, in run
(EngineCore pid=9) ERROR 11-22 09:00:01 [core.py:1300] ValueError: 0.02 GiB KV cache is needed.
(EngineCore pid=9) Process EngineCore:
(EngineCore pid=9) ValueError: 0.02 GiB KV cache is needed.
(APIServer pid=7) Traceback (most recent call last):
(APIServer pid=7) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}

"""


def test_the_root_cause_of_a_real_log(tmp_path: Path) -> None:
    log = tmp_path / "p0.log"
    log.write_text(VLLM_LOG)
    assert logs.cause(logs.tail(log)) == ["ValueError: 0.02 GiB KV cache is needed."]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (
            ["x.py: error: unrecognized arguments: --y"],
            ["x.py: error: unrecognized arguments: --y"],
        ),
        (["x", "python: No module named vllm"], ["python: No module named vllm"]),
        (
            ["RuntimeError: Engine core initialization failed."],
            ["RuntimeError: Engine core initialization failed."],
        ),
        (
            ["torch.OutOfMemoryError: CUDA out of memory.", "later"],
            ["torch.OutOfMemoryError: CUDA out of memory."],
        ),
        (["a", "b", "c", "d", "e"], ["b", "c", "d", "e"]),
        ([], []),
    ],
)
def test_cause(lines: list[str], expected: list[str]) -> None:
    assert logs.cause(lines) == expected


def test_the_tail_of_a_long_log_and_of_none(tmp_path: Path) -> None:
    log = tmp_path / "long.log"
    log.write_bytes(b"\xff" * 100 + b"\n" + b"x\n" * 1000 + b"last\n")
    assert logs.tail(log, limit=10) == ["x", "x", "last"]
    assert logs.tail(tmp_path / "missing.log") == []
