"""The service's life: ports, drain, its own process, and no leaks."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

import aiohttp
import psutil
import pytest

from hexgen2.coordinator import Coordinator, kv_transfer_totals
from hexgen2.coordinator.kv_totals import KvTotals, parse_kv_totals
from hexgen2.emulator import EmulatorConfig, LinearTiming
from hexgen2.specs.errors import InputError
from tests.waiting import HUNG_S, until

from .conftest import QUICK, Stand, expected, running

SLOW = EmulatorConfig(timing=LinearTiming(step_base_s=0.01))


async def test_a_port_in_use_is_an_input_error(pair: Stand) -> None:
    port = int(pair.url.rsplit(":", 1)[1])
    with pytest.raises(InputError, match=f"port {port}"):
        async with Coordinator(pair.coordinator.config).running("127.0.0.1", port):
            pass


async def test_drain_lets_requests_finish_and_takes_no_new_ones() -> None:
    async with running({"c0": 1.0}, emulator=SLOW) as stand:
        task = asyncio.create_task(stand.stream("a", max_tokens=30))
        await until(lambda: stand.engines["c0"].core.generation_tokens_total > 2)
        stand.engines["c0"].freeze()  # until all is asked
        async with stand.http.get(stand.url + "/health"):
            pass  # a kept connection: the listening socket closes, this one stays
        url = stand.url
        draining = asyncio.create_task(stand.coordinator.drain())
        await asyncio.sleep(0.05)
        async with stand.http.post(url + "/v1/completions", json={"prompt": "a"}) as response:
            assert response.status == 503
            assert (await response.json())["error"]["code"] == "shutting_down"
        stand.engines["c0"].thaw()
        assert (await task)[-1] == "[DONE]"
        assert await draining


async def test_drain_is_bounded() -> None:
    timeouts = QUICK.model_copy(update={"drain_s": 0.1})
    async with running({"c0": 1.0}, emulator=SLOW, timeouts=timeouts) as stand:
        task = asyncio.create_task(stand.stream("a", max_tokens=100_000))
        await until(lambda: stand.engines["c0"].core.running)
        assert not await stand.coordinator.drain()
        task.cancel()


async def test_own_process_serves_and_ends_on_sigterm(pair: Stand, tmp_path: Path) -> None:
    pair.coordinator.config.save(tmp_path / "config.json")
    (tmp_path / "keys").write_text("secret\n")
    command = [sys.executable, "-m", "hexgen2.coordinator", "--config", str(tmp_path / "config.json")]
    command += ["--port", "0", "--api-key-file", str(tmp_path / "keys")]
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    assert process.stderr is not None
    url = ""
    while "coordinator on " not in url:
        url = (await process.stderr.readline()).decode()
        assert url, "the process ended"
    url = url.split()[-1]
    async with aiohttp.ClientSession(headers={"Authorization": "Bearer secret"}) as session:
        body = {"prompt": "a", "max_tokens": 3}
        async with session.post(url + "/v1/completions", json=body) as response:
            assert (await response.json())["choices"][0]["text"] == expected("a", 3)
    process.send_signal(signal.SIGTERM)
    async with asyncio.timeout(HUNG_S):
        assert await process.wait() == 0


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(["--config", "none.json"], "none.json"), (["--config", "{config}", "--api-key-file", "none"], "none")],
)
async def test_own_process_tells_bad_input_in_one_line(
    pair: Stand, tmp_path: Path, arguments: list[str], word: str
) -> None:
    pair.coordinator.config.save(tmp_path / "c.json")
    given = [argument.format(config=tmp_path / "c.json") for argument in arguments]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "hexgen2.coordinator", *given, stderr=asyncio.subprocess.PIPE, cwd=tmp_path
    )
    _, text = await process.communicate()
    assert process.returncode == 2
    assert word in text.decode()
    assert text.decode().count("\n") == 1


async def test_a_thousand_requests_leave_nothing_behind() -> None:
    """Connections, descriptors and tasks are back to where they were; the shares were kept meanwhile."""
    async with running({"p0>d0": 0.45, "p0>d1": 0.3, "c0": 0.25}) as stand:
        await stand.complete("a", max_tokens=1)
        gate = asyncio.Semaphore(100)

        async def one(number: int) -> bool:
            async with gate:
                prompt = f"request {number}"
                if number % 2:
                    events = await stand.stream(prompt, max_tokens=4)
                    text = "".join(event["choices"][0]["text"] for event in events[:-1])
                else:
                    text = (await stand.complete(prompt, max_tokens=4))["choices"][0]["text"]
                return bool(text == expected(prompt, 4))

        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            stand.http, kept = session, stand.http
            process = psutil.Process()
            tasks_before, files_before = len(asyncio.all_tasks()), process.num_fds()
            assert all(await asyncio.gather(*map(one, range(1000))))
            stand.http = kept
        fleet = stand.coordinator.fleet
        assert {engine.in_flight for engine in fleet.engines.values()} == {0}
        assert not any(engine.calls for engine in fleet.engines.values())
        # Idle connections to the engines are closed after some seconds.
        await until(lambda: process.num_fds() <= files_before + 10)
        await until(lambda: len(asyncio.all_tasks()) <= tasks_before + 10)
        for target, share in (("d0", 0.45), ("d1", 0.3), ("c0", 0.25)):
            assert await stand.metric("hexgen2:route_requests_total", target=target) == pytest.approx(
                1000 * share, abs=90
            )


async def test_kv_totals_from_live_engines(pair: Stand) -> None:
    await pair.complete("a b c d")
    urls = {group: engine.url for group, engine in pair.engines.items()} | {"gone": "http://127.0.0.1:9"}
    totals = await kv_transfer_totals(urls)
    assert totals["d0"].bytes == pair.engines["d0"].kv_bytes > 0
    assert totals["d0"].transfers == 1
    assert totals["p0"] == KvTotals()
    assert "gone" not in totals
    assert sum((await kv_transfer_totals([pair.engines["d0"].url])).values(), KvTotals()).bytes > 0


def test_kv_totals_are_summed_over_ranks() -> None:
    text = (
        "# HELP vllm:nixl_bytes_transferred bytes\n"
        'vllm:nixl_bytes_transferred_bucket{engine="0",le="2048.0"} 1.0\n'
        'vllm:nixl_bytes_transferred_sum{engine="0",model_name="a}b"} 1.5e+06\n'
        'vllm:nixl_bytes_transferred_sum{engine="1",model_name="m"} 500000.0\n'
        'vllm:nixl_bytes_transferred_count{engine="0",model_name="m"} 3.0\n'
        'vllm:nixl_xfer_time_seconds_sum{engine="0",model_name="m"} 0.25\n'
        'vllm:nixl_num_failed_transfers_total{engine="0",model_name="m"} 1.0\n'
        'vllm:nixl_num_kv_expired_reqs_total{engine="0",model_name="m"} 2.0\n'
    )
    assert parse_kv_totals(text) == KvTotals(2e6, 3, 0.25, 1, 2)


def test_kv_totals_of_our_connector_are_summed_over_peers() -> None:
    text = (
        'vllm:hexgen_kv_transfer_bytes_sum{engine="0",peer="p0"} 1000.0\n'
        'vllm:hexgen_kv_transfer_bytes_sum{engine="0",peer="p1"} 500.0\n'
        'vllm:hexgen_kv_transfer_bytes_count{engine="0",peer="p0"} 4.0\n'
        'vllm:hexgen_kv_transfer_seconds_sum{engine="0",peer="p0"} 0.5\n'
        'vllm:hexgen_kv_failed_transfers_total{engine="0",peer="p1"} 1.0\n'
        'vllm:hexgen_kv_expired_leases_total{engine="0"} 2.0\n'
    )
    assert parse_kv_totals(text) == KvTotals(1500, 4, 0.5, 1, 2)
