"""Checks of the flat optimizer's kernels against the fp64 oracle, by the error that plain PyTorch makes in fp32."""

from typing import Any

import torch
from torch import Tensor

from fedmoe.kernels import flat_optimizer as kernels
from fedmoe.kernels import flat_optimizer_oracle as oracle
from fedmoe.kernels.flat_optimizer_state import Control, Moments
from tests.heads import assert_within_rule

FP32, FP16, FP64 = torch.float32, torch.float16, torch.float64
SGD: dict[str, Any] = {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True}
ADAMW: dict[str, Any] = {"weight_decay": 0.1}


class State:
    """Everything that a step writes, for two segments that share a norm, and the step itself by either implementation.

    `options` are those of SGD, or with `bits` of AdamW.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: str,
        gradient: torch.dtype,
        low: torch.dtype,
        bits: int,
        apart: bool = False,
    ) -> None:
        generator = torch.Generator().manual_seed(7)
        shapes = (shape, (*shape[:-1], shape[-1] // 3 + 1))
        self.weights = [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]
        self.wide = []  # with what lies between rows, 7, and must stay
        self.gradients = [torch.zeros(s, dtype=d, device=device) for s, d in zip(shapes, (gradient, FP32), strict=True)]
        self.low = self.weights[0].to(low)
        self.buffers = [torch.zeros_like(w) for w in self.weights]
        for k, values in enumerate(self.weights if apart else ()):
            wide = torch.cat([values, torch.full_like(values, 7), self.buffers[k], torch.full_like(values, 7)], dim=1)
            wide = wide.view(len(values), 4, -1)
            self.weights[k], self.buffers[k] = wide[:, 0], wide[:, 2]
            self.wide.append(wide)
        self.moments = [Moments.zeros(w, bits) for w in self.weights] if bits else None
        self.step = torch.zeros(shape[:-1], device=device)
        self.control = Control.empty(self.gradients, dtype)
        self.lr = torch.linspace(0.2, 0.3, shape[0], dtype=dtype, device=device) if len(shape) > 1 else None

    def receive(self, t: int, scale: float, wrong: bool) -> None:
        """Gradients of step t, some of them tiny; with `wrong`, one of the last row's is NaN."""
        generator = torch.Generator().manual_seed(t)
        for gradient in self.gradients:
            made = torch.randn(gradient.shape, generator=generator) * scale
            made[..., 4::5] *= 1e-6
            if wrong:
                made.view(-1)[-1] = float("nan")
            gradient.copy_(made)

    def take(
        self, module: Any, options: dict[str, Any], scale: Tensor, live: Tensor | None, norm: float | None
    ) -> None:
        """One step; `norm`: not at all (None), checked only (0), or clipped to it."""
        how: dict[str, Any] = {"live": live, **options}
        dtype = self.weights[0].dtype
        how["lr"] = torch.full((), 0.2, dtype=dtype, device=scale.device) if self.lr is None else self.lr
        if norm is None:
            self.step += 1 if live is None else live
            how["scale"] = scale.to(dtype)
        else:
            common = {"live": live, "step": self.step, "out": self.control}
            module.flat_norm(self.gradients, scale=scale.to(dtype), max_norm=norm or None, **common)
            how["control"] = self.control
        for k, (w, g) in enumerate(zip(self.weights, self.gradients, strict=True)):
            how["low"] = self.low if k == 0 else None
            if self.moments is None:
                module.sgd_step(w, g, self.buffers[k] if options.get("momentum") else None, **how)
            else:
                module.adamw_step(w, g, self.moments[k], step=self.step, **how)

    def tensors(self, norm: bool) -> dict[str, Tensor]:
        """By name, codes as codes; without the results of a norm that may not be finite."""
        named = {"low": self.low, "step": self.step}
        for k in range(2):
            named |= {f"weights {k}": self.weights[k], f"gradients {k}": self.gradients[k]}
            if self.moments is None:
                named[f"buffer {k}"] = self.buffers[k]
            else:
                named |= {f"{n} {k}": t for n, t in self.moments[k]._asdict().items() if t is not None}
        return named | ({"found_inf": self.control.found_inf} if norm else {})


def check(
    shape: tuple[int, ...] = (700,),
    options: dict[str, Any] = SGD,
    bits: int = 0,  # 0: SGD, 32 or 8: AdamW and its moments
    gradient: torch.dtype = FP32,
    low: torch.dtype = FP16,
    scale: float = 64.0,
    norm: float | None = None,
    live: bool = False,  # with rows: the first is not
    wrong: bool = False,  # the second of three steps is not finite
    device: str = "cpu",
    apart: bool = False,  # with rows: those of weights and buffers do not touch
) -> State:
    """Three steps, compared after each; returns the kernels' state."""
    made = [State(shape, dtype, device, gradient, low, bits, apart) for dtype in (FP64, FP32, FP32)]
    mask = torch.arange(shape[0], device=device) > 0 if live else None
    factor = torch.full((), scale, device=device)
    for t in range(3):
        for state, module in zip(made, (oracle, oracle, kernels), strict=True):
            state.receive(t, scale, wrong and t == 1)
            state.take(module, options, factor, mask, norm)
        exact, plain, actual = (state.tensors(norm is not None) for state in made)
        exact["low"] = exact["weights 0"]  # rounded twice, what lies between two numbers could become either
        for name, truth in exact.items():
            if truth.dtype == torch.uint8:
                assert_same_codes(f"{name} of step {t}", actual[name], truth)
                plain[name].copy_(truth)  # one that fell to the other side is no error of the next step
                actual[name].copy_(truth)
            else:
                assert_within_rule(f"{name} of step {t}", actual[name], plain[name], truth.double())
        if norm is not None and not wrong:
            assert_within_rule("norm", *(state.control.norm for state in (made[2], made[1], made[0])))
    assert all((wide[:, 1::2] == 7).all() for state in made for wide in state.wide)
    return made[2]


def assert_same_codes(name: str, actual: Tensor, exact: Tensor) -> None:
    """But where rounding in fp32 meets the edge of a code: 20 bits of noise decide, of which it moves a few units."""
    gaps = (actual.int() - exact.int()).abs()
    differing, size = int((gaps > 0).sum()), gaps.numel()
    assert gaps.max() <= 1 and differing <= max(2, size // 1000), (
        f"{name}: {differing} of {size} of the codes differ, by up to {gaps.max()}"
    )
