"""The scheduler's half of the connector: what to load, what to hand out, what to give back.

A request of leg 1 (`do_remote_decode`) ends with a lease on its blocks and an offer in its answer. A request of
leg 2 (`do_remote_prefill`) brings an offer: its lease is kept alive from arrival on, the blocks that the local
prefix cache lacks are loaded, and the lease is given back as soon as they are there, the load failed, or the
request has gone. Nothing depends on a role: one engine does both, for different peers.

With a stream's key both legs may be under way at once: leg 1's progress is told to the workers step by step,
and leg 2 is admitted when its prefill has begun, not before: no block waits for a prefill that waits itself.
"""

from __future__ import annotations

import itertools
import logging
from typing import TYPE_CHECKING, Any

from vllm.v1.request import Request, RequestStatus

from hexgen2.vllm_plugin.kv_connector.keeper import LeaseKeeper, Watch
from hexgen2.vllm_plugin.kv_connector.leases import LeaseOrder
from hexgen2.vllm_plugin.kv_connector.loader import LoadOrder
from hexgen2.vllm_plugin.kv_connector.metadata import HexgenMetadata
from hexgen2.vllm_plugin.kv_connector.params import (
    VERSION,
    Offer,
    Stream,
    WorkerAddress,
    decode_source,
    encode_offer,
    stream_key,
)
from hexgen2.vllm_plugin.kv_connector.streams import StreamEnd, StreamStep

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

logger = logging.getLogger("vllm.hexgen2.kv")


class SchedulerSide:
    """Called from vLLM's scheduler, on its thread."""

    def __init__(
        self, engine: str, block_tokens: int, lease_s: float, begin_s: float, keeper: LeaseKeeper
    ) -> None:
        self._engine = engine
        self._block_tokens = block_tokens
        self._lease_s = lease_s
        self._begin_s = begin_s
        self._keeper = keeper
        self._workers: tuple[WorkerAddress, ...] = ()
        self._numbers = itertools.count(1)
        self._streamed: dict[str, tuple[str, Request]] = {}
        """Requests of leg 1 whose caches may be read while they are computed, with their keys."""
        self._watches: dict[str, Watch] = {}
        self._offers: dict[str, Offer | Stream] = {}
        """Offers of requests that have not been scheduled yet."""
        self._local_tokens: dict[str, int] = {}
        """Tokens that the local prefix cache has, for the same requests."""
        self._loading: dict[str, Offer | Stream] = {}
        self._orders = HexgenMetadata()

    def set_workers(self, workers: tuple[WorkerAddress, ...]) -> None:
        self._workers = workers

    def on_new_request(self, request: Request) -> None:
        params = request.kv_transfer_params
        if params and params.get("do_remote_decode") and (key := stream_key(params)):
            self._streamed[request.request_id] = (key, request)
        if not params or not params.get("do_remote_prefill"):
            return
        try:
            offer = decode_source(params)
        except ValueError as error:
            logger.warning(
                "request %s computes its prompt itself: kv_transfer_params: %s", request.request_id, error
            )
            return
        self._offers[request.request_id] = offer
        if isinstance(offer, Stream):
            self._watches[request.request_id] = self._keeper.follow(offer, self._begin_s)
        else:
            self._keeper.track(offer)

    def matched_tokens(self, request: Request, local_tokens: int) -> tuple[int | None, bool]:
        """Tokens to load beyond the local ones, and whether that happens asynchronously; None while that is not
        known. May be called repeatedly.
        """
        offer = self._offers.get(request.request_id)
        if offer is None:
            return 0, False
        watch = self._watches.get(request.request_id)
        if watch is not None and not watch.begun and not watch.lost:
            return None, False
        # A prefill that was lost is loaded too: the load fails at once, and vLLM's policy decides what follows.
        self._local_tokens[request.request_id] = local_tokens
        # The last prompt token is computed here in any case, for the first output token.
        missing = request.num_prompt_tokens - 1 - local_tokens
        if isinstance(offer, Offer):
            missing = min(missing, offer.tokens - local_tokens)
        return (missing, True) if missing > 0 else (0, False)

    def after_allocation(self, request: Request, blocks: tuple[list[int], ...], tokens: int) -> None:
        """The request has been admitted: `tokens` of it are to be loaded into `blocks`."""
        offer = self._offers.pop(request.request_id, None)
        if offer is None:
            return  # no leg 2, or its second call, after the load
        watch = self._watches.pop(request.request_id, None)
        start = self._local_tokens.pop(request.request_id, 0)
        assert request.kv_transfer_params is not None
        request.kv_transfer_params["do_remote_prefill"] = (
            False  # one load a request, even if it is preempted later
        )
        if tokens <= 0:
            self._keeper.release(offer)
            return
        self._loading[request.request_id] = offer
        self._orders.loads.append(
            LoadOrder(
                request.request_id,
                offer,
                start,
                start + tokens,
                tuple(blocks[0]),
                self._block_tokens,
                watch.lost if watch is not None else "",
            )
        )

    def take_orders(self, output: SchedulerOutput) -> HexgenMetadata:
        """The orders of the step that `output` describes, before the scheduler counts it as done."""
        orders, self._orders = self._orders, HexgenMetadata()
        if self._streamed:
            self._note_step(output, orders)
        return orders

    def _note_step(self, output: SchedulerOutput, orders: HexgenMetadata) -> None:
        blocks = {new.req_id: tuple(new.block_ids[0]) for new in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        for name, more in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if more is not None:
                blocks[name] = tuple(more[0])
        for name, (key, request) in list(self._streamed.items()):
            if name in (output.preempted_req_ids or ()) or request.status == RequestStatus.PREEMPTED:
                del self._streamed[name]  # its blocks are gone, and what comes anew lies elsewhere
                orders.ends.append(StreamEnd(key, "the prefill was preempted"))
            elif tokens := output.num_scheduled_tokens.get(name):
                done = request.num_computed_tokens
                orders.steps.append(StreamStep(key, name, done, done + tokens, blocks.get(name, ())))

    def loads_ended(self, requests: set[str]) -> None:
        """Every worker has ended these requests' loads, well or not."""
        for request in requests:
            if offer := self._loading.pop(request, None):
                self._keeper.release(offer)

    def finished(self, request: Request, blocks: tuple[list[int], ...]) -> tuple[bool, dict[str, Any] | None]:
        """The request has ended. Whether its blocks must stay, and the offer for its answer."""
        if offer := self._offers.pop(request.request_id, None):  # it never got its turn
            self._local_tokens.pop(request.request_id, None)
            self._watches.pop(request.request_id, None)
            self._keeper.release(offer)
        params = request.kv_transfer_params
        if not params or not params.get("do_remote_decode"):
            return False, None
        key, _ = self._streamed.pop(request.request_id, ("", None))
        offer = self._offered(request, blocks)
        if offer is None:
            if key:
                self._orders.ends.append(StreamEnd(key, "the prefill was broken off"))
            return False, None
        self._orders.leases.append(LeaseOrder(offer.lease, request.request_id, self._lease_s, key))
        return True, encode_offer(offer, request.request_id)

    def _offered(self, request: Request, blocks: tuple[list[int], ...]) -> Offer | None:
        """What a request that has ended leaves for leg 2, under a lease of its own."""
        if request.status not in (RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_STOPPED):
            return None
        tokens = min(request.num_computed_tokens, request.num_prompt_tokens)
        if not self._workers or tokens <= 0 or not blocks[0]:
            return None
        return Offer(
            VERSION,
            self._engine,
            next(self._numbers),
            self._lease_s,
            tokens,
            self._block_tokens,
            tuple(blocks[0][: -(-tokens // self._block_tokens)]),
            self._workers,
        )

    def close(self) -> None:
        self._keeper.close()
