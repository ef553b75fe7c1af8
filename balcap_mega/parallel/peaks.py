"""Peak FLOP/s of GPUs' tensor cores, which model-FLOPs utilisation (MFU) is a share of."""

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
        """FLOP/s in that format. None for float32 as well: whether its products run as TF32 is not known here."""
        return {"bfloat16": self.bfloat16, "fp8": self.fp8}.get(format)


H100 = Peak(989.4e12, 1978.9e12)
PEAKS: dict[str, Peak | None] = {
    "H100 PCIe": Peak(756e12, 1513e12),
    "H100 NVL": Peak(835e12, 1671e12),  # FP8: twice bfloat16, as of all Hoppers
    "H200 NVL": None,  # slower than H200; its data sheet was not at hand
    "H100": H100,
    "H200": H100,
    "A100": Peak(312e12, None),
}
"""By a part of the device's name. The first key that the name contains counts. PCIe and NVL are as in the tables of
Lightning and torchtitan, which cite NVIDIA."""


def peak_of(name: str) -> Peak | None:
    """Peak of the GPU with that name (`torch.cuda.get_device_name`); None for an unknown one."""
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def device_peak(device: torch.device) -> Peak | None:
    """Peak of `device`; None for a CPU and for an unknown GPU."""
    return peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
