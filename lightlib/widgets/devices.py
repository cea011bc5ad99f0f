"""What devices can do, from their makers' data sheets: memory, bytes a second, multiplications a second."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Device:
    """Memory in GB (10^9 bytes), GB/s, and GFLOP/s of dense 16-bit matrix products.

    Of a GPU also: its multiprocessors, their clock in GHz, and the L2 cache in MB (2^20 bytes).
    """

    name: str
    memory_gb: float
    gb_per_s: float
    gflop_per_s: float
    multiprocessors: int = 0
    ghz: float = 0.0
    l2_mb: float = 0.0

    def seconds(self, n_bytes: float, n_flop: float) -> tuple[float, str]:
        """(the least time that moving and computing take, "memory" or "compute": which of them it is)."""
        moving, computing = n_bytes / self.gb_per_s / 1e9, n_flop / self.gflop_per_s / 1e9
        return (moving, "memory") if moving >= computing else (computing, "compute")


# Peaks: real code comes near and does not reach them. GPUs: dense, half of what sheets print with sparsity.
DEVICES = {
    device.name: device
    for device in (
        # LPDDR5X-9600 on a 64-bit bus (Snapdragon 8 Gen 3 product brief). Rate: an estimate for its six large
        # cores' 16-bit vector units, 3.3 GHz x 64 + 5 x 3.1 GHz x 32 FLOP a cycle. 12 GB is a usual size
        Device("phone", 12, 76.8, 700),
        # DDR5-5600 on two channels: 2 x 8 bytes x 5.6 GHz. Rate: 8 cores x 3.5 GHz x two 256-bit FMAs
        Device("laptop", 16, 89.6, 900),
        # NVIDIA Ada GPU architecture whitepaper, appendix A: FP16 tensor, FP32 accumulate; boost clock
        Device("RTX 4090", 24, 1008, 165_200, 128, 2.52, 72),
        # NVIDIA A100 80GB data sheet, SXM: 2,039 GB/s, BF16 tensor 312 TFLOPS; boost clock of its whitepaper
        Device("A100 80GB", 80, 2039, 312_000, 108, 1.41, 40),
        # NVIDIA H100 data sheet, SXM: 3.35 TB/s, BF16 tensor 1,979 TFLOPS with sparsity, half of it without.
        # Clock: an assumption, what it keeps up under load (it may boost to 1.98 GHz)
        Device("H100", 80, 3350, 989_400, 132, 1.755, 50),
    )
}
# What the explorers of kernels offer. NVIDIA H200 data sheet: 141 GB at 4.8 TB/s, else as the H100
GPUS = {
    **{device.name: device for device in DEVICES.values() if device.multiprocessors},
    "H200": replace(DEVICES["H100"], name="H200", memory_gb=141, gb_per_s=4800),
}


def this_machine(roofline, memory_gb: float | None = None) -> Device:
    """The present machine as a Device, from `lightlib.measure.roofline()`; memory_gb: the main memory."""
    if memory_gb is None:
        memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return Device("this machine", memory_gb, roofline.bandwidth, roofline.matmul_gflop_per_s)


def known_devices(here: Device | None) -> dict[str, Device]:
    """DEVICES, and `here` in front of them if it is given."""
    return {here.name: here, **DEVICES} if here else dict(DEVICES)
