"""Lengths from quantile tables joined by a Gaussian copula."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau, spearmanr

from hexgen2.specs import Lengths, Marginals, Workload

RNG_SEED = 7
LENGTHS = st.lists(st.integers(1, 100_000), min_size=2, max_size=12).map(sorted)
CORRELATIONS = st.floats(-1, 1)


def marginals(inputs: list[int], outputs: list[int], correlation: float) -> Marginals:
    """Tables at even levels, padded to one length with their last values."""
    size = max(len(inputs), len(outputs))
    columns = (
        np.array(values + values[-1:] * (size - len(values)), dtype=float) for values in (inputs, outputs)
    )
    return Marginals(np.linspace(0, 1, size), *columns, rank_correlation=correlation)


def drawn(table: Marginals, count: int = 4000) -> Lengths:
    return Workload(name="test", marginals=table).sample(count, np.random.default_rng(RNG_SEED))


@settings(deadline=None, max_examples=40)
@given(LENGTHS, LENGTHS, CORRELATIONS)
def test_draws_are_whole_and_within_the_tables(inputs: list[int], outputs: list[int], rho: float) -> None:
    lengths = drawn(marginals(inputs, outputs, rho), 500)
    for values, table in ((lengths.inputs, inputs), (lengths.outputs, outputs)):
        assert values.dtype == np.int64
        assert values.min() >= table[0]
        assert values.max() <= table[-1]


@settings(deadline=None, max_examples=20)
@given(st.floats(-0.95, 0.95))
def test_the_rank_correlation_is_the_one_asked_for(rho: float) -> None:
    """Spearman's ρ, whatever the marginals: it is invariant under monotone maps."""
    lengths = drawn(marginals([1, 5_000, 100_000], [1, 90_000, 100_000], rho), 20_000)
    assert spearmanr(lengths.inputs, lengths.outputs).statistic == pytest.approx(rho, abs=0.02)


@pytest.mark.parametrize(("rho", "tau"), [(1.0, 1.0), (-1.0, -1.0), (0.0, 0.0)])
def test_the_ends_of_dependence(rho: float, tau: float) -> None:
    lengths = drawn(marginals([1, 100_000], [1, 100_000], rho))
    assert kendalltau(lengths.inputs, lengths.outputs).statistic == pytest.approx(tau, abs=0.03)


@settings(deadline=None, max_examples=20)
@given(CORRELATIONS)
def test_dependence_leaves_the_marginals_alone(rho: float) -> None:
    table = marginals([10, 500, 4_000], [5, 50, 900], rho)
    levels = np.array([0.1, 0.25, 0.5, 0.75, 0.9])
    lengths = drawn(table, 20_000)
    for values, column in ((lengths.inputs, table.inputs), (lengths.outputs, table.outputs)):
        below = [(values <= length).mean() for length in np.interp(levels, table.levels, column)]
        np.testing.assert_allclose(below, levels, atol=0.02)


@settings(deadline=None, max_examples=20)
@given(LENGTHS, LENGTHS, CORRELATIONS, st.integers(1, 600))
def test_representative_requests_are_always_the_same(
    inputs: list[int], outputs: list[int], rho: float, count: int
) -> None:
    workload = Workload(name="test", marginals=marginals(inputs, outputs, rho))
    first, second = workload.representative(count), workload.representative(count)
    assert len(first) == count
    np.testing.assert_array_equal(first.inputs, second.inputs)
    np.testing.assert_array_equal(first.outputs, second.outputs)


@settings(deadline=None, max_examples=20)
@given(st.floats(-0.9, 0.9))
def test_few_representative_requests_have_the_means_of_many(rho: float) -> None:
    workload = Workload(name="test", marginals=marginals([10, 900, 5_000], [1, 200, 600], rho))
    few, many = workload.representative(256), drawn(marginals([10, 900, 5_000], [1, 200, 600], rho), 50_000)
    assert few.inputs.mean() == pytest.approx(many.inputs.mean(), rel=0.02)
    assert few.outputs.mean() == pytest.approx(many.outputs.mean(), rel=0.02)
    product, expected = (few.inputs * few.outputs).mean(), (many.inputs * many.outputs).mean()
    assert product == pytest.approx(expected, rel=0.05)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 9_999), st.integers(1, 9_999)), min_size=1, max_size=40),
    st.integers(1, 99),
)
def test_a_trace_is_sampled_in_whole_requests(rows: list[tuple[int, int]], count: int) -> None:
    """Prompt and answer stay together, drawn and representative alike."""
    inputs, outputs = (np.array(column, dtype=np.int64) for column in zip(*rows, strict=True))
    workload = Workload(name="test", trace=Lengths(inputs, outputs))
    for lengths in (workload.sample(count, np.random.default_rng(0)), workload.representative(count)):
        assert len(lengths) == count
        assert set(zip(lengths.inputs.tolist(), lengths.outputs.tolist(), strict=True)) <= set(rows)


def test_a_trace_as_large_as_the_representatives_is_the_trace() -> None:
    inputs, outputs = np.arange(1, 257), np.arange(256, 0, -1)
    lengths = Workload(name="test", trace=Lengths(inputs, outputs)).representative(256)
    np.testing.assert_array_equal(lengths.inputs, inputs)
    np.testing.assert_array_equal(lengths.outputs, outputs)
