"""A load tool that no one here wrote, vLLM's `bench serve`, against the coordinator as it comes."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest

from hexgen2.specs.catalog import load_model
from tests.chaos.fleet import MODEL, door, emulated
from tests.waiting import HUNG_S

pytestmark = pytest.mark.engine

# `vllm bench serve` by its own entry point: the program `vllm` asks for its package's metadata, which the CPU
# wheel has under another name.
TOOL = """
import argparse
from vllm.benchmarks.serve import add_cli_args, main
parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


@pytest.mark.parametrize(
    ("backend", "endpoint"),
    [
        ("openai", "/v1/completions"),
        pytest.param("openai-chat", "/v1/chat/completions", marks=pytest.mark.slow),
    ],
)
async def test_vllm_bench_serve(tmp_path: Path, backend: str, endpoint: str) -> None:
    async with emulated(1, 2, 0, step_s=0.005) as (config, _), door(config, tmp_path) as front:
        await front.wait_whole(HUNG_S)
        tool = await asyncio.create_subprocess_exec(
            *(
                sys.executable,
                "-c",
                TOOL,
                "--backend",
                backend,
                "--base-url",
                front.url,
                "--endpoint",
                endpoint,
            ),
            *("--model", MODEL, "--tokenizer", str(load_model("tiny-llama").location)),
            *("--dataset-name", "random", "--random-input-len", "48", "--random-output-len", "12"),
            *("--num-prompts", "80", "--request-rate", "40", "--disable-tqdm"),
            *("--save-result", "--result-dir", str(tmp_path), "--result-filename", "found.json"),
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        said, _ = await asyncio.wait_for(tool.communicate(), 400)
        assert tool.returncode == 0, said.decode()[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["completed"], found["failed"]) == (80, 0)
    assert found["total_output_tokens"] >= 80 * 12 * 0.9  # it counts tokens by its own tokenizer
