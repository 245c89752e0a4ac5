"""Values by stage are those of the cost model, to the last bit."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from hexgen2.scheduler.evaluate import Evaluator
from hexgen2.scheduler.layouts import layout_of
from hexgen2.specs.cluster import Cluster
from hexgen2.specs.model import Model
from tests.scheduler.support import LATENT, MIXTURE, SMALL, clusters, problem


@pytest.mark.parametrize("model", [SMALL, MIXTURE, LATENT], ids=lambda model: model.name)
@given(where=clusters(most_gpus=5))
@settings(max_examples=12, deadline=None)
def test_options_equal_the_cost_model(model: Model, where: Cluster) -> None:
    task = problem(where, model)
    evaluator = Evaluator(task)
    cost, load = task.cost, task.lengths
    everything = evaluator.topology.everything
    for option in evaluator.options(everything, "prefill"):
        expected = cost.prefill_capacity(layout_of(evaluator.topology, option.template), load)
        assert (option.rps, option.latency_s) == (expected.rps, expected.latency_s)
    for option in evaluator.options(everything, "decode"):
        decode = cost.decode_capacity(layout_of(evaluator.topology, option.template), load)
        assert (option.rps, option.max_batch, option.latency_s) == (decode.rps, decode.max_batch, decode.tpot_s)
    for option in evaluator.options(everything, "colocated"):
        both = cost.colocated_capacity(layout_of(evaluator.topology, option.template), load)
        assert (option.rps, option.max_batch, option.latency_s) == (both.rps, both.max_batch, both.tpot_s)
