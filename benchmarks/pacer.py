"""A stand-in engine for measuring proxies: every stream keeps its own clock.

Real and emulated engines batch: a request waits for the next step, so that the time to its first token is
spread over a whole step and hides the millisecond that a proxy adds. Here each stream's tokens come at exact
times after its request: `--first-s`, then every `--step-s`. It answers leg 1 at once, with
`kv_transfer_params`, and takes anything for leg 2.

    python benchmarks/pacer.py --port 8100
"""

from __future__ import annotations

import argparse
import asyncio
import json
import uuid

import uvloop
from aiohttp import web

MODEL = "emulated"


class Pacer:
    def __init__(self, port: int, first_s: float, step_s: float) -> None:
        self._port = port
        self._first_s = first_s
        self._step_s = step_s

    def application(self) -> web.Application:
        app = web.Application(client_max_size=2**26, handler_args={"access_log": None})
        app.router.add_post("/v1/completions", self.complete)
        app.router.add_get("/health", self.health)
        app.router.add_get("/v1/models", self.models)
        return app

    async def health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def models(self, _: web.Request) -> web.Response:
        card = {"id": MODEL, "object": "model", "owned_by": "vllm", "max_model_len": 131072}
        return web.json_response({"object": "list", "data": [card]})

    async def complete(self, http: web.Request) -> web.StreamResponse:
        body = json.loads(await http.read())
        head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": 1, "model": MODEL}
        if not body.get("stream"):
            choice = {"index": 0, "text": " t1", "logprobs": None, "finish_reason": "length"}
            kv = {
                "do_remote_prefill": True,
                "remote_block_ids": [list(range(8))],
                "remote_engine_id": "pacer",
                "remote_request_id": head["id"],
                "remote_host": "127.0.0.1",
                "remote_port": self._port,
            }
            usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
            return web.json_response(head | {"choices": [choice], "usage": usage, "kv_transfer_params": kv})
        return await self._stream(http, body, head)

    async def _stream(
        self, http: web.Request, body: dict[str, object], head: dict[str, object]
    ) -> web.StreamResponse:
        ids = bool(body.get("return_token_ids"))
        count = int(str(body.get("max_tokens", 16)))
        opening = "data: " + json.dumps(head, separators=(",", ":"))[:-1] + ',"choices":[{"index":0,"text":" t'
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(http)
        loop = asyncio.get_running_loop()
        due = loop.time() + self._first_s
        for number in range(count):
            await asyncio.sleep(due - loop.time())
            due += self._step_s
            finish = '"length"' if number == count - 1 else "null"
            prompt = (
                json.dumps(body["prompt"])
                if ids and number == 0 and isinstance(body["prompt"], list)
                else "null"
            )
            shown = f"[{number}]" if ids else "null"
            await response.write(
                f'{opening}{number}","logprobs":null,"finish_reason":{finish},"stop_reason":null,'
                f'"prompt_token_ids":{prompt},"token_ids":{shown}}}]}}\n\n'.encode()
            )
        await response.write(b"data: [DONE]\n\n")
        return response


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--first-s", type=float, default=0.02)
    parser.add_argument("--step-s", type=float, default=0.1)
    arguments = parser.parse_args()
    uvloop.install()
    app = Pacer(arguments.port, arguments.first_s, arguments.step_s).application()
    web.run_app(app, host="127.0.0.1", port=arguments.port, print=None, access_log=None)


if __name__ == "__main__":
    main()
