"""The GPUs of this node, by NVIDIA's management library (NVML), which allocates nothing on them."""

from dataclasses import dataclass

import torch

from balcap_mega.config.schema import RunConfig
from balcap_mega.diagnostics.finding import Finding, check, fail, ok, some, warn
from balcap_mega.parallel.platform import Platform

BF16_CAPABILITY, FP8_CAPABILITY = (8, 0), (9, 0)
GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One visible device.

    total, free: bytes of memory
    driver_cuda: the newest CUDA version that the driver runs
    ecc_errors:  uncorrected memory errors since the last reset; None where it does not count them
    slowed_by:   why its clocks are held down now, beyond idling
    """

    index: int
    name: str
    capability: tuple[int, int]
    total: int
    free: int
    driver: str
    driver_cuda: tuple[int, int]
    persistent: bool
    ecc_errors: int | None
    slowed_by: tuple[str, ...]


def _read_gpus() -> list[Gpu]:
    """All devices that PyTorch sees."""
    import pynvml as nvml  # pyright: ignore[reportMissingImports] (on GPU hosts)

    slowdowns = {
        "heat": nvml.nvmlClocksThrottleReasonHwThermalSlowdown | nvml.nvmlClocksThrottleReasonSwThermalSlowdown,
        "its power supply": nvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown,
        "the hardware's own protection": nvml.nvmlClocksThrottleReasonHwSlowdown,
    }
    nvml.nvmlInit()
    try:
        cuda = nvml.nvmlSystemGetCudaDriverVersion_v2()
        found = []
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            reasons = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
            try:
                errors = nvml.nvmlDeviceGetTotalEccErrors(
                    handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
                )
            except nvml.NVMLError_NotSupported:
                errors = None
            found.append(
                Gpu(
                    index=index,
                    name=properties.name,
                    capability=(properties.major, properties.minor),
                    total=memory.total,
                    free=memory.free,
                    driver=nvml.nvmlSystemGetDriverVersion(),
                    driver_cuda=(cuda // 1000, cuda % 1000 // 10),
                    persistent=nvml.nvmlDeviceGetPersistenceMode(handle) == nvml.NVML_FEATURE_ENABLED,
                    ecc_errors=errors,
                    slowed_by=tuple(reason for reason, bits in slowdowns.items() if reasons & bits),
                )
            )
        return found
    finally:
        nvml.nvmlShutdown()


@check("GPUs")
def check_present(config: RunConfig | None, platform: Platform, gpus: list[Gpu]) -> Finding:
    """Are there GPUs, all alike, that can do what the run asks for? Appends them to `gpus`."""
    if platform.is_cuda:
        gpus += _read_gpus()
    else:
        asked = config is not None and config.parallel.device == "cuda"
        if asked or (torch.version.cuda and not (config and config.parallel.device == "cpu")):
            remedy = "does nvidia-smi see them? is CUDA_VISIBLE_DEVICES empty? or set parallel.device=cpu"
            return (fail if asked else warn)("PyTorch sees none", remedy)
        return ok("none, and none is needed: the run is on the CPU, over gloo")
    kinds = sorted({gpu.name for gpu in gpus})
    fp8 = config is not None and (config.model.fp8 != "none" or config.rollout.fp8)
    needed = FP8_CAPABILITY if fp8 else BF16_CAPABILITY
    weak = [f"GPU {gpu.index} ({gpu.name}, {gpu.capability})" for gpu in gpus if gpu.capability < needed]
    if weak:
        what = "FP8" if fp8 else "BF16"
        remedy = f"use GPUs of compute capability {needed[0]}.{needed[1]} or more" + (", or fp8=none" if fp8 else "")
        return fail(f"no {what} on {some(weak)}", remedy)
    detail = f"{len(gpus)} x {', '.join(kinds)}, {gpus[0].total / GIB:.0f} GiB"
    if len(kinds) > 1:
        return warn(detail, "keep to one kind (CUDA_VISIBLE_DEVICES): all wait for the slowest")
    return ok(detail)


@check("GPU memory")
def check_free_memory(gpus: list[Gpu]) -> Finding:
    used = [
        f"GPU {gpu.index}: {gpu.free / GIB:.1f} of {gpu.total / GIB:.1f} GiB"
        for gpu in gpus
        if gpu.free < 0.95 * gpu.total
    ]
    if used:
        return warn(f"free on {some(used)}", "end the processes that nvidia-smi shows there")
    return ok(f"at least {min(gpu.free for gpu in gpus) / GIB:.1f} GiB free on each")


@check("driver")
def check_driver(gpus: list[Gpu]) -> Finding:
    """Is the driver's major version of CUDA at least PyTorch's? Minor versions need not match."""
    driver, supported = gpus[0].driver, gpus[0].driver_cuda
    detail = f"driver {driver} runs CUDA {supported[0]}.{supported[1]}, PyTorch was built with {torch.version.cuda}"
    if supported[0] < int(torch.version.cuda.split(".")[0]):
        return fail(detail, f"install a driver for CUDA {torch.version.cuda}")
    return ok(detail)


@check("GPU health")
def check_health(gpus: list[Gpu]) -> Finding:
    broken = [f"GPU {gpu.index}: {gpu.ecc_errors} uncorrected memory errors" for gpu in gpus if gpu.ecc_errors]
    if broken:
        return fail(some(broken), "drain the node: nvidia-smi -r, and replace what fails again")
    slow = [f"GPU {gpu.index} is slowed by {' and '.join(gpu.slowed_by)}" for gpu in gpus if gpu.slowed_by]
    if slow:
        return warn(some(slow), "check cooling and power: all ranks wait for the slowest")
    if not all(gpu.persistent for gpu in gpus):
        return warn("persistence mode is off: first use is slow", "sudo nvidia-smi -pm 1")
    return ok("no uncorrected memory errors, no clock held down")
