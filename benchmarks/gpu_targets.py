"""What the targets of the Triton kernels offer, and how many blocks of a kernel that allows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from triton.backends.compiler import GPUTarget


@dataclass(frozen=True)
class Target:
    """What one multiprocessor (compute unit) offers to blocks (workgroups).

    CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; for gfx942 the
    CDNA3 instruction set guide. A CUDA block holds 1 KB of shared memory besides its own.
    """

    backend: str
    arch: int | str
    warp_size: int
    shared_per_block: int
    shared_per_multiprocessor: int
    shared_reserved: int
    warps: int
    blocks: int
    partitions: int  # the register file is divided, and a warp's registers lie in one part
    registers_per_partition: int  # of 32 bits for each lane of a warp
    register_granularity: int
    tensor_memory_columns: int = 0

    @property
    def gpu(self) -> GPUTarget:
        return GPUTarget(self.backend, self.arch, self.warp_size)


KB = 1024
TARGETS = {
    "cuda:80": Target("cuda", 80, 32, 163 * KB, 164 * KB, KB, 64, 32, 4, 512, 8),
    "cuda:90": Target("cuda", 90, 32, 227 * KB, 228 * KB, KB, 64, 32, 4, 512, 8),
    "cuda:100": Target("cuda", 100, 32, 227 * KB, 228 * KB, KB, 64, 32, 4, 512, 8, 512),
    "hip:gfx942": Target("hip", "gfx942", 64, 64 * KB, 64 * KB, 0, 32, 32, 4, 512, 8),
}


class Usage(NamedTuple):
    """What the compiled kernel asks for: registers of a thread, bytes of a block."""

    registers: int
    stack: int  # bytes of a thread that live in memory: spilled registers, mostly
    shared: int
    tensor_memory: int


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def blocks_per_multiprocessor(target: Target, used: Usage, warps: int) -> tuple[int, str]:
    """How many blocks are resident at once, and what bounds them."""
    registers = _round_up(max(used.registers, 1), target.register_granularity)
    warps_by_registers = target.partitions * (target.registers_per_partition // registers)
    shared = _round_up(used.shared, 128) + target.shared_reserved
    bounds = {
        "blocks": target.blocks,
        "warps": target.warps // warps,
        "registers": warps_by_registers // warps,
        "shared memory": target.shared_per_multiprocessor // shared if shared else target.blocks,
    }
    if used.tensor_memory:
        bounds["tensor memory"] = target.tensor_memory_columns // used.tensor_memory
    bound = min(bounds, key=lambda name: bounds[name])
    return bounds[bound], bound
