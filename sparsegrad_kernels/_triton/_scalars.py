"""Float64 scalars as kernel arguments: Triton passes a Python float as float32."""

from __future__ import annotations

import struct

import triton
import triton.language as tl


def float64_bits(value: float) -> int:
    """The bits of a number that is not negative, as the integer argument of a kernel."""
    return struct.unpack("<q", struct.pack("<d", abs(value)))[0]


@triton.jit
def from_bits(bits):
    """The float64 number whose bits an integer argument holds."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)
