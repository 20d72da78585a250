from __future__ import annotations

import pytest
import torch


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """Fresh random numbers in each run; the seed is shown with a failure."""
    generator = torch.Generator()
    print(f"seed {generator.seed()}")
    return generator
