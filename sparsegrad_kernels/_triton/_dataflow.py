"""Tasks of one launch that wait for each other's results.

Programs take tickets in the order in which they start, and a ticket is a task: what a task waits
for has lower tickets, so it has started already and nothing can keep it from ending. No program
counts on others to be resident at the same time, and in the interpreter, which runs programs one
after another, nothing waits. A task says that it is done with `signal`, behind the stores of all
its threads; behind `wait` all threads see what was stored before the signals waited for.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

_LINE = 16  # int64 of a line of the cache: no two views share one


@triton.jit
def take_ticket(tickets):
    return tl.atomic_add(tickets, 1, sem="relaxed").to(tl.int32)


@triton.jit
def signal(flag):
    tl.debug_barrier()
    tl.atomic_add(flag, 1, sem="release")


@triton.jit
def wait(flag, n_signals):
    """Until `flag` was signalled `n_signals` times."""
    while tl.atomic_add(flag, 0, sem="acquire") < n_signals:
        pass
    tl.debug_barrier()


def zeroed(device: torch.device, *sizes: int) -> list[Tensor]:
    """int64 zeros of these sizes, in one allocation and one fill."""
    ends = [0]
    for size in sizes:
        ends.append(ends[-1] + triton.cdiv(size, _LINE) * _LINE)
    state = torch.zeros(ends[-1], dtype=torch.int64, device=device)
    return [state[start:end] for start, end in pairwise(ends)]
