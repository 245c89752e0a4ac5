"""What all specs have in common."""

from __future__ import annotations

import pytest

from hexgen2.specs.catalog import load_model


@pytest.mark.parametrize("deep", [False, True])
def test_a_copy_with_other_values_keeps_nothing_computed_from_the_old_ones(deep: bool) -> None:
    model = load_model("llama-2-7b")
    before = model.kv_bytes_per_token, model.total_params
    wider = model.model_copy(update={"kv_bytes": 2 * model.kv_bytes, "layers": 2 * model.layers}, deep=deep)
    assert wider.kv_bytes_per_token == 4 * before[0]
    assert wider.total_params > before[1]
    assert (model.kv_bytes_per_token, model.total_params) == before
