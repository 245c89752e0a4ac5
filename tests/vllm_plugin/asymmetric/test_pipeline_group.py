"""The pipeline group over real processes and gloo: hidden states, slices, and what is broadcast."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
parallel_state = pytest.importorskip("vllm.distributed.parallel_state")

import torch.distributed as dist  # noqa: E402
import vllm.config  # noqa: E402 (once here, not in each child)
import vllm.distributed.device_communicators.shm_broadcast  # noqa: E402, F401
from vllm.platforms import current_platform  # noqa: E402

from hexgen2.vllm_plugin.asymmetric.layout import Layout  # noqa: E402
from hexgen2.vllm_plugin.asymmetric.pipeline_group import StagePipelineGroup, _cut  # noqa: E402

JOIN_S = 60
ROWS, HIDDEN = 5, 24


class Gatherer:
    """Stands for a stage's TP group: gathers flat slices in TP order."""

    def __init__(self, layout: Layout, rank: int) -> None:
        groups = [dist.new_group(list(ranks)) for ranks in layout.stage_ranks]
        self.group = groups[layout.places[rank].stage]
        self.world_size = layout.stages[layout.places[rank].stage].tp
        self.calls = 0

    def all_gather(self, tensor: Any, dim: int) -> Any:
        assert dim == 0
        self.calls += 1
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor, group=self.group)
        return torch.cat(parts)


def states(stage: int) -> dict[str, Any]:
    """What stage `stage` hands on: the same on all of its ranks."""
    hidden = torch.arange(ROWS * HIDDEN, dtype=torch.float32).reshape(ROWS, HIDDEN) + 1000 * stage
    return {
        "hidden_states": hidden,
        "residual": hidden.to(torch.bfloat16) * 2,
        "indivisible": torch.tensor([stage, 1, 2, 3, 4, 5, 6], dtype=torch.int64),
        "empty": torch.empty(0, 4),
        "note": f"from stage {stage}",
    }


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    if left.keys() != right.keys():
        return False
    return all(
        torch.equal(left[k], right[k]) if torch.is_tensor(left[k]) else left[k] == right[k] for k in left
    )


def take_part(rank: int, text: str, store: Path, sliced: bool, errors: Any) -> None:
    try:
        torch.set_num_threads(1)
        layout = Layout.parse(text, "test")
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=layout.world_size)
        group = StagePipelineGroup(layout, rank, "gloo")
        place = layout.places[rank]
        gatherer = Gatherer(layout, rank) if sliced else None

        assert group.world_size == len(layout.stages)
        assert group.rank_in_group == place.stage
        assert group.ranks[group.rank_in_group] == rank == group.rank
        assert group.is_first_rank == (place.stage == 0)
        assert group.is_last_rank == (place.stage == len(layout.stages) - 1)

        for _ in range(3):  # several steps in flight, as with pipelined batches
            if not group.is_first_rank:
                received, handles, finish = group.irecv_tensor_dict(all_gather_group=gatherer)
                for handle in handles:
                    handle.wait()
                for function in finish:
                    function()
                assert received is not None
                assert same(received, states(place.stage - 1)), received
            if not group.is_last_rank:
                handles = group.isend_tensor_dict(states(place.stage), all_gather_group=gatherer)
                assert bool(handles) == bool(layout.fed(rank))
                for handle in handles[1:]:
                    handle.wait()
        wide = layout.stages[place.stage].tp > 1 and not group.is_first_rank
        assert gatherer is None or (gatherer.calls > 0) == wide

        assert (
            group.broadcast_object(("id", rank) if rank == layout.stage_ranks[0][0] else None, src=0)[0] == "id"
        )

        sibling = group.make_sibling_device_group()
        sampled = torch.tensor([rank if group.is_last_rank else -1])
        dist.broadcast(sampled, src=group.last_rank, group=sibling)
        assert sampled.item() == layout.chain(rank)[-1]
        with pytest.raises(NotImplementedError):
            group.broadcast_tensor_dict({}, src=0)
        dist.barrier()
        group.destroy()
    except BaseException:
        errors.put(f"rank {rank}: {traceback.format_exc()}")
        raise
    os._exit(0)  # an interpreter's full end costs each child more than the test


@pytest.mark.parametrize("sliced", [True, False])
@pytest.mark.parametrize("text", ["2x1+1x1", "1x1+2x1", "2x1+4x1", "3x1@1+2x1+1x1@1"])
def test_every_rank_gets_the_previous_stages_states(text: str, sliced: bool, tmp_path: Path) -> None:
    assert (
        current_platform.is_cpu() or current_platform.is_cuda_alike()
    )  # found out once here, not in each child
    context = multiprocessing.get_context("fork")
    errors = context.Queue()
    ranks = [
        context.Process(target=take_part, args=(rank, text, tmp_path / "store", sliced, errors), daemon=True)
        for rank in range(Layout.parse(text, "test").world_size)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(JOIN_S)
    left = [process for process in ranks if process.is_alive()]
    for process in left:
        process.kill()
    assert errors.empty(), errors.get()
    assert not left
    assert [process.exitcode for process in ranks] == [0] * len(ranks)


@pytest.mark.parametrize("parts", [2, 4])
def test_slices_put_together_are_the_tensor(parts: int) -> None:
    whole = states(0)
    parcels = [_cut(whole, parts, part, None) for part in range(parts)]
    shape = parcels[0]["hexgen2.shapes"]["hidden_states"]
    assert torch.equal(torch.cat([p["hidden_states"] for p in parcels]).reshape(shape), whole["hidden_states"])
    assert all(torch.equal(p["indivisible"], whole["indivisible"]) for p in parcels)
    assert set(parcels[0]["hexgen2.shapes"]) == {"hidden_states", "residual"}


def test_a_tensor_that_is_not_to_be_gathered_is_sent_whole() -> None:
    parcel = _cut(states(0), 2, 0, {"residual": False})
    assert set(parcel["hexgen2.shapes"]) == {"hidden_states"}
    assert parcel["residual"].shape == (ROWS, HIDDEN)
