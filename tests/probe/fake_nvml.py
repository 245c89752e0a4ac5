"""A stand-in for NVML's Python binding: cards described in a few words."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

SWITCHED = "switch"


@dataclass
class Card:
    """``links``: for each NVLink, the number of the card it leads to, or SWITCHED. None: not told."""

    name: str
    memory_gib: float
    links: list[int | str] = field(default_factory=list)
    link_mbps: int = 25_781
    pcie: tuple[int, int] | None = (4, 16)
    used_gib: float = 0.3
    mig: bool | None = None
    capability: tuple[int, int] = (8, 0)
    cores: int | None = 6912
    clocks_mhz: tuple[int, int] = (1410, 1593)
    bus_bits: int = 5120


class NVMLError(Exception):
    pass


class FakeNvml:
    """The part of pynvml that the probe uses; handles are the cards' numbers."""

    NVMLError = NVMLError
    NVML_NVLINK_MAX_LINKS = 18
    NVML_NVLINK_DEVICE_TYPE_GPU = 0
    NVML_NVLINK_DEVICE_TYPE_SWITCH = 2
    NVML_FI_DEV_NVLINK_SPEED_MBPS_COMMON = 90
    NVML_SUCCESS = 0
    NVML_CLOCK_SM = 1
    NVML_CLOCK_MEM = 2

    def __init__(self, *cards: Card) -> None:
        self.cards = cards
        self.open = 0

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        assert self.open
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlSystemGetDriverVersion(self) -> str:
        return "570.86.15"

    def nvmlDeviceGetName(self, handle: int) -> bytes:
        return self.cards[handle].name.encode()

    def nvmlDeviceGetPciInfo(self, handle: int) -> Any:
        return SimpleNamespace(busId=f"00000000:{handle:02X}:00.0".encode())

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        card = self.cards[handle]
        return SimpleNamespace(total=int(card.memory_gib * 2**30), used=int(card.used_gib * 2**30))

    def nvmlDeviceGetMigMode(self, handle: int) -> list[int]:
        mig = self._known(self.cards[handle].mig)
        return [int(mig), int(mig)]

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> tuple[int, int]:
        return self.cards[handle].capability

    def nvmlDeviceGetNumGpuCores(self, handle: int) -> int:
        return int(self._known(self.cards[handle].cores))

    def nvmlDeviceGetMaxClockInfo(self, handle: int, clock: int) -> int:
        return self.cards[handle].clocks_mhz[clock - 1]

    def nvmlDeviceGetMemoryBusWidth(self, handle: int) -> int:
        return self.cards[handle].bus_bits

    def nvmlDeviceGetMaxPcieLinkGeneration(self, handle: int) -> int:
        return int(self._known(self.cards[handle].pcie)[0])

    def nvmlDeviceGetMaxPcieLinkWidth(self, handle: int) -> int:
        return int(self._known(self.cards[handle].pcie)[1])

    def nvmlDeviceGetNvLinkState(self, handle: int, link: int) -> int:
        if not self.cards[handle].links:
            raise NVMLError("Not Supported")
        return int(link < len(self.cards[handle].links))

    def nvmlDeviceGetNvLinkRemoteDeviceType(self, handle: int, link: int) -> int:
        return 2 if self.cards[handle].links[link] == SWITCHED else 0

    def nvmlDeviceGetNvLinkRemotePciInfo(self, handle: int, link: int) -> Any:
        other = self.cards[handle].links[link]
        assert isinstance(other, int)
        return self.nvmlDeviceGetPciInfo(other)

    def nvmlDeviceGetFieldValues(self, handle: int, fields: list[int]) -> list[Any]:
        assert fields == [90]
        return [SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(uiVal=self.cards[handle].link_mbps))]

    def _known(self, value: Any) -> Any:
        if value is None:
            raise NVMLError("Not Supported")
        return value
