"""vLLM's pipeline group for stages of unlike width.

To vLLM's code the group looks as usual: `world_size` and `rank_in_group` count stages, `ranks` holds one rank
per stage. Two things differ beneath. Hidden states go along `Layout.fed` instead of to the one next rank; and
collectives run inside `Layout.columns`, of which each holds exactly one rank of the last stage, so that what
that stage samples reaches every rank once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from typing_extensions import override
from vllm.distributed.parallel_state import GroupCoordinator, Handle

from hexgen2.vllm_plugin.asymmetric.layout import Layout

_SHAPES = "hexgen2.shapes"
"""Beside the tensors travels {name: full shape} of those that were cut into slices."""

Received = tuple[dict[str, Any] | None, list[Handle], list[Callable[[], None]]]


class StagePipelineGroup(GroupCoordinator):  # type: ignore[misc]
    """The pipeline group of a layout. Made by every rank at once, since it makes process groups."""

    def __init__(self, layout: Layout, local_rank: int, backend: str) -> None:
        super().__init__(
            group_ranks=[list(column) for column in layout.columns],
            local_rank=local_rank,
            torch_distributed_backend=backend,
            # Only for collectives of the group, of which vLLM runs none on a pipeline.
            use_device_communicator=False,
            group_name="pp",
        )
        # A second coordinator over all ranks, addressed by global rank, for sends between any two of them. On
        # CPU this goes over gloo like on GPUs over NCCL, and not over vLLM's shared-memory path: one path,
        # tested everywhere.
        self.links = GroupCoordinator(
            group_ranks=[list(range(layout.world_size))],
            local_rank=local_rank,
            torch_distributed_backend=backend,
            use_device_communicator=False,
            group_name="pp_links",
        )
        place = layout.places[self.rank]
        self.layout = layout
        self.ranks = list(layout.chain(self.rank))
        self.world_size = len(layout.stages)
        self.rank_in_group = place.stage
        self.stage = layout.stages[place.stage]

    def isend_tensor_dict(
        self,
        tensor_dict: dict[str, torch.Tensor | Any],
        dst: int | None = None,
        all_gather_group: GroupCoordinator | None = None,
        all_gather_tensors: dict[str, bool] | None = None,
    ) -> list[Handle]:
        """Send hidden states to the ranks of the next stage that this rank feeds; perhaps none.

        As in vLLM the first handle is that of metadata, and `all_gather_group` allows sending each receiver a
        slice that its stage gathers: a stage of 4 then gets one copy over the link between the nodes and not
        4. Slices follow the receiver's TP, whatever group the sender names.
        """
        next_stage = self.rank_in_group + 1
        if dst not in (None, next_stage):
            raise NotImplementedError("a layout's stages send to the next stage only")
        handles: list[Handle] = []
        metadata: list[Handle] = []
        for receiver in self.layout.fed(self.rank):
            wide = self.layout.stages[next_stage].tp if all_gather_group is not None else 1
            parcel = _cut(tensor_dict, wide, self.layout.places[receiver].tp_rank, all_gather_tensors)
            first, *rest = self.links.isend_tensor_dict(parcel, dst=receiver)
            metadata.append(first)
            handles.extend(rest)
        # The other metadata handles need no wait: `links` keeps their buffers until they are sent.
        return metadata[:1] + handles

    @override
    def irecv_tensor_dict(
        self,
        src: int | None = None,
        all_gather_group: GroupCoordinator | None = None,
        all_gather_tensors: dict[str, bool] | None = None,
    ) -> Received:
        """Receive the previous stage's hidden states. The dict is whole once the handles are waited for and the
        returned functions have run, in this order. ``all_gather_tensors`` is not looked at: the sender's choice
        comes with the tensors."""
        if src not in (None, self.rank_in_group - 1):
            raise NotImplementedError("a layout's stages receive from the previous stage only")
        received, handles, finish = self.links.irecv_tensor_dict(src=self.layout.feeder(self.rank))
        if received is None:
            raise RuntimeError("torch.distributed is not initialised")
        shapes: dict[str, tuple[int, ...]] = received.pop(_SHAPES, {})

        def gather() -> None:
            if all_gather_group is None:
                raise RuntimeError("slices came for a receiver that does not gather")
            for name, shape in shapes.items():
                received[name] = all_gather_group.all_gather(received[name], dim=0).reshape(shape)

        return received, handles, [*finish, gather] if shapes else finish

    def broadcast_object(self, obj: Any | None = None, src: int = 0) -> Any:
        """Give every rank of the group the object of stage `src`'s first rank."""
        return self.links.broadcast_object(obj, src=self.layout.stage_ranks[src][0])

    def destroy(self) -> None:
        self.links.destroy()
        super().destroy()

    def _refuse(self, *_args: Any, **_kwargs: Any) -> Any:
        raise NotImplementedError(
            "hexgen2: this collective of vLLM's pipeline group has no meaning for stages of unlike TP"
        )

    # Inherited bodies of these take stages for ranks, and would hang or mix up ranks.
    broadcast = broadcast_tensor_dict = broadcast_object_list = _refuse
    all_reduce = all_gather = all_gatherv = reduce_scatter = reduce_scatterv = gather = _refuse
    send = recv = send_object = recv_object = isend_object = _refuse


def _cut(
    tensors: dict[str, torch.Tensor | Any], parts: int, part: int, choice: dict[str, bool] | None
) -> dict[str, Any]:
    """The tensors with each that divides into `parts` equal slices replaced by slice `part` of it, flat.

    `choice` overrides by name, as `all_gather_tensors` does in vLLM.
    """
    if parts == 1:
        return dict(tensors)
    parcel: dict[str, Any] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, value in tensors.items():
        divides = isinstance(value, torch.Tensor) and value.numel() > 0 and value.numel() % parts == 0
        if divides and (choice or {}).get(name, True):
            shapes[name] = tuple(value.shape)
            parcel[name] = value.reshape(parts, -1)[part]
        else:
            parcel[name] = value
    return {**parcel, _SHAPES: shapes}
