"""One request while it is served."""

from __future__ import annotations

import dataclasses
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from hexgen2.coordinator.client_stream import ClientStream
from hexgen2.coordinator.continuation import Splice
from hexgen2.coordinator.desk import Held
from hexgen2.coordinator.journal import Journal
from hexgen2.coordinator.replay import Replay
from hexgen2.coordinator.request import ClientRequest, encode
from hexgen2.coordinator.tracing import NO_TRACE, Part, Trace
from hexgen2.specs.routing import Path


@dataclass(eq=False)
class Exchange:
    """What the client asked for, what engines are asked for, what has been sent, and what was tried.

    `sent` is the request that goes to engines: the client's, with what its stream needs should it have to go on
    elsewhere (token ids asked for, a seed); after a migration the continuation, or `first_sent` again where it
    is run anew.
    """

    http: web.Request
    request: ClientRequest
    journal: Journal
    sent: ClientRequest
    place: Held
    trace: Trace
    first_sent: ClientRequest
    splice: Splice | Replay | None = None
    handoff: Part = NO_TRACE
    fetched: bool = False  # the engine that answers needs nothing of the prefill engine any more
    failed_paths: list[Path] = field(default_factory=list)
    retries: int = 0
    migrations: int = 0
    stream: ClientStream | None = None  # once its answer has begun
    first_token_at: float | None = None
    last_token_at: float | None = None
    events: int = 0
    prompt_tokens: int | None = None
    answer_tokens: int | None = None  # of an answer that is no stream

    @classmethod
    def begin(
        cls, http: web.Request, request: ClientRequest, place: Held, trace: Trace, migrate: bool, seed: bool
    ) -> Exchange:
        added: dict[str, Any] = {}
        journal = Journal(request.body, request.chat, off=not (migrate and request.stream))
        if seed and journal.needs_seed:
            added["seed"] = secrets.randbelow(2**31)
            journal = Journal(request.body | added, request.chat)
        if journal.asks_for_ids:
            added["return_token_ids"] = True
        sent = request
        if added:
            body = request.body | added
            sent = dataclasses.replace(request, body=body, raw=encode(body))
        return cls(http, request, journal, sent, place, trace, sent)

    def take(self, block: bytes) -> bytes:
        """Write down a block of an engine's events; as the client is to see it."""
        self.last_token_at = time.perf_counter()
        self.events += block.count(b"\n\n")
        return self.journal.note(block) if self.splice is None else self.splice.block(block)

    @property
    def has_enough(self) -> bool:
        """Whether what the engine may still generate is not wanted: a stop string was found across the seam."""
        return self.splice is not None and self.splice.ended

    @property
    def generated(self) -> int:
        """Tokens sent in a stream: by their ids, or else by the events."""
        if self.journal.generated is not None:
            return self.journal.generated
        # Besides the tokens' events a stream has `[DONE]`, and in chat one that only names the role.
        return max(0, self.events - (2 if self.request.chat else 1))
