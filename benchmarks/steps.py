"""One linear's training step, by each method, on the same input."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import peft
import torch
from measure import Run
from paper import PaperLinear
from torch import Tensor, nn

from sparsegrad_kernels import Basis, SparseAdam, SparseGradLinear

_LR = 1e-6


def random_basis(
    in_features: int, out_features: int, generator: torch.Generator, device: torch.device
) -> Basis:
    """Orthogonal, of full rank: cost does not depend on which."""
    u, v = (
        torch.linalg.qr(torch.randn(n, n, generator=generator).to(device, torch.float64))[0].float()
        for n in (in_features, out_features)
    )
    return Basis(u, v)


class Steps:
    """Forward, backward and optimizer step of an `[out, in]` linear; makes runs to time.

    Args:
        tokens: how many; `share` of them have a gradient.
        density: share of the weight gradient's entries that is kept.
        autocast: a half type to compute in; parameters are float32 nevertheless.
        capturable: of the optimizers, so that a step may be captured in a CUDA graph.
    """

    def __init__(
        self,
        tokens: int,
        share: float,
        generator: torch.Generator,
        in_features: int = 768,
        out_features: int = 3072,
        density: float = 0.01,
        device: torch.device | None = None,
        autocast: torch.dtype | None = None,
        capturable: bool = False,
    ) -> None:
        self.device = device or torch.device("cpu")
        self.k = max(1, int(density * in_features * out_features))
        self.autocast, self.capturable = autocast, capturable
        dtype = autocast or torch.float32
        self.x = torch.randn(tokens, in_features, generator=generator).to(self.device, dtype)
        self.x.requires_grad_()
        g = torch.randn(tokens, out_features, generator=generator)
        nonzero = torch.rand(tokens, 1, generator=generator) < share
        nonzero[0] = True  # of few tokens none might be
        self.g = (g * nonzero).to(self.device, dtype)
        self.linear = nn.Linear(in_features, out_features, device=self.device)

    def forward(self, module: Callable[[Tensor], Tensor]) -> Tensor:
        enabled = self.autocast is not None
        with torch.autocast(self.device.type, dtype=self.autocast, enabled=enabled):
            return module(self.x)

    def run(self, module: Callable[[Tensor], Tensor], *optimizers: torch.optim.Optimizer) -> Run:
        def step() -> None:
            self.x.grad = None
            self.forward(module).backward(self.g)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

        return step

    def sparsegrad(self, basis: Basis | None) -> Run:
        """With a basis of None: MeProp."""
        layer = SparseGradLinear.from_linear(self.linear, basis, k=self.k)
        self.check(layer)
        optimizer = SparseAdam(layer.parameters(), lr=_LR, capturable=self.capturable)
        return self.run(layer, optimizer)

    def check(self, layer: SparseGradLinear) -> None:
        self.x.grad = None
        self.forward(layer).backward(self.g)
        g, x = self.g.double(), self.x.detach().double()
        dense = g.T @ x
        dense = dense if layer.v is None else layer.v.double() @ dense
        dense = dense if layer.u is None else dense @ layer.u.double().T
        grad = layer.delta.grad.coalesce()
        at = grad.indices()
        for got, wanted in (
            (grad.values(), dense[at[0], at[1]]),
            (self.x.grad, g @ self.linear.weight.double()),
        ):
            error = (got.double() - wanted).norm() / wanted.norm()
            # The two factors of a product are rounded, and rotated ones once more.
            allowed = 1e-5 if self.autocast is None else 4 * torch.finfo(self.autocast).eps
            if torch.backends.cuda.matmul.fp32_precision == "tf32":
                allowed = max(allowed, 4e-3)
            assert error <= allowed, f"a gradient is wrong by {error}"
        layer.zero_grad()

    def paper(self, basis: Basis) -> Run:
        layer = PaperLinear(self.linear, basis, self.k)
        optimizers = (
            torch.optim.SparseAdam([layer.weight], lr=_LR),
            torch.optim.AdamW([layer.bias], lr=_LR),
        )
        return self.run(layer, *optimizers)

    def dense(self) -> Run:
        linear = nn.Linear(self.linear.in_features, self.linear.out_features, device=self.device)
        return self.run(linear, self.adamw(linear.parameters()))

    def lora(self, rank: int = 7) -> Run:
        config = peft.LoraConfig(r=rank, target_modules=["0"], lora_dropout=0.0)
        linear = nn.Linear(self.linear.in_features, self.linear.out_features, device=self.device)
        model = peft.get_peft_model(nn.Sequential(linear), config)
        trained = [p for p in model.parameters() if p.requires_grad]
        return self.run(model, self.adamw(trained))

    def adamw(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=_LR, fused=True, capturable=self.capturable)

    def bound(self) -> Run:
        """The dense forward, and the input gradient of the tokens with one: no method does less."""
        weight, x = self.linear.weight.detach(), self.x.detach()
        packed = self.g[(self.g != 0).any(1)]
        return lambda: (x @ weight.T, packed @ weight)
