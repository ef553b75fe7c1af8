"""What a GPU's tensor cores can do at most: what a model-FLOPs utilisation is a share of."""

from dataclasses import dataclass
from typing import Literal

import torch

Format = Literal["float32", "bfloat16", "fp8"]


@dataclass(frozen=True)
class Peak:
    """FLOP/s of dense matrix products, by NVIDIA's data sheets; None where there is no such unit."""

    bfloat16: float
    fp8: float | None

    def of(self, format: Format) -> float | None:
        """None for float32 too: whether its products run as TF32 is not known here."""
        return {"bfloat16": self.bfloat16, "fp8": self.fp8}.get(format)


H100 = Peak(989.4e12, 1978.9e12)
PEAKS = {
    "H100 PCIe": Peak(756e12, 1513e12),
    "H100 NVL": Peak(835e12, 1671e12),
    "H200 NVL": Peak(835e12, 1671e12),
    "H100": H100,
    "H200": H100,
    "A100": Peak(312e12, None),
}
"""By what stands in the device's name; the first that does counts."""


def peak_of(name: str) -> Peak | None:
    """Of the GPU of that name, as `torch.cuda.get_device_name` has it; None for one that is not known."""
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def device_peak(device: torch.device) -> Peak | None:
    """Of this device; None for a CPU, or a GPU that is not known."""
    return peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
