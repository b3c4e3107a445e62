"""The flat optimizer: its oracle against torch.optim, its refusals; `tests/interpreter` tests the kernels."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fedmoe.kernels import flat_optimizer as kernels
from fedmoe.kernels import flat_optimizer_oracle as oracle
from fedmoe.kernels import launch
from fedmoe.kernels.flat_optimizer_state import Control, Moments

FP32, FP64 = torch.float32, torch.float64
SHAPE = (700,)
SGD: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9},
    {"weight_decay": 0.1},
    {"momentum": 0.9, "weight_decay": 0.1},
    {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
]
ADAMW: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.0},
    {"betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.2},
    {"betas": (0.0, 0.99)},
]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = FP64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Trained:
    """A state of SGD or AdamW and its steps by the oracle."""

    def __init__(self, weights: Tensor, options: dict[str, Any], bits: int = 0) -> None:
        self.weights, self.low, self.options = weights.clone(), weights.half(), options
        self.step = torch.zeros(weights.shape[:-1])
        self.buffer = torch.zeros_like(weights) if options.get("momentum") else None
        self.moments = Moments.zeros(weights, bits) if bits else None
        self.lr: Tensor = torch.tensor(0.01, dtype=weights.dtype)

    def take(self, gradients: Tensor, control: Control | None = None, **how: Any) -> None:
        common = {"lr": self.lr, "low": self.low, "control": control, **how, **self.options}
        if self.moments is None:
            oracle.sgd_step(self.weights, gradients, self.buffer, **common)
        else:
            oracle.adamw_step(self.weights, gradients, self.moments, step=self.step, **common)

    def state(self) -> list[Tensor]:
        parts = [self.weights, self.low, self.step, self.buffer, *(self.moments or ())]
        return [t for t in parts if t is not None]

    def copies(self) -> list[Tensor]:
        return [t.clone() for t in self.state()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("scale", [None, 128.0])
@pytest.mark.parametrize(("bits", "options"), [*((0, o) for o in SGD), *((32, o) for o in ADAMW)])
def test_oracle_is_torch_optim(bits: int, options: dict[str, Any], scale: float | None, max_norm: float | None) -> None:
    ours = Trained(randn(*SHAPE), options, bits)
    theirs = randn(*SHAPE).requires_grad_()
    made = torch.optim.AdamW if bits else torch.optim.SGD
    optimizer = made([theirs], lr=0.01, **options)
    factor = None if scale is None else torch.tensor(scale, dtype=FP64)
    for t in range(4):
        gradient = randn(*SHAPE, seed=t + 1) * 0.1 ** (t - 1)  # clipped at first, at last not
        theirs.grad = gradient.clone()
        scaled = gradient * (scale or 1)
        if max_norm is None:
            ours.step += 1
            ours.take(scaled, scale=factor)
        else:
            control = Control.empty([gradient], FP64)
            oracle.flat_norm([scaled], scale=factor, max_norm=max_norm, step=ours.step, out=control)
            norm = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
            torch.testing.assert_close(control.norm, norm)
            ours.take(scaled, control)
        optimizer.step()
        torch.testing.assert_close(ours.weights, theirs.detach(), rtol=1e-10, atol=1e-12)
        assert torch.equal(ours.low, ours.weights.half())
        assert not scaled.any()


def test_segments_share_one_norm() -> None:
    first, second = randn(300), randn(40, seed=1).float()
    control = Control.empty([first, second], FP64)
    oracle.flat_norm([first, second], max_norm=0.5, out=control)
    torch.testing.assert_close(control.norm, torch.cat([first, second.double()]).norm())
    torch.testing.assert_close(control.factor, 0.5 / (control.norm + 1e-6))


@pytest.mark.parametrize("bits", [0, 32, 8])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_a_step_that_is_not_finite_is_skipped(wrong: float, bits: int) -> None:
    made = Trained(randn(*SHAPE).float(), {} if bits else {"momentum": 0.9}, bits)
    control = Control.empty([made.weights])

    def take(gradients: Tensor) -> None:
        oracle.flat_norm([gradients], step=made.step, out=control)
        made.take(gradients, control)
        assert not gradients.any()

    take(randn(*SHAPE, seed=1))
    assert made.step == 1 and control.found_inf == 0
    before, bad = made.copies(), randn(*SHAPE, seed=2)
    bad[-1] = wrong
    take(bad)
    assert same(made.state(), before)
    assert control.found_inf == 1
    take(randn(*SHAPE, seed=3))
    assert made.step == 2 and made.weights.isfinite().all()


@pytest.mark.parametrize("bits", [0, 32, 8])
@pytest.mark.parametrize("norm", [False, True])
def test_rows_are_separate_clients(norm: bool, bits: int) -> None:
    """Of K = 4: one that is not live, one whose gradients are not finite, and two that train."""
    options = {"weight_decay": 0.1, **({} if bits else {"momentum": 0.9})}
    weights, lr, scale = randn(4, *SHAPE).float(), torch.rand(4), torch.tensor([1.0, 2, 4, 8])
    live = torch.tensor([True, False, True, True])
    together = Trained(weights, options, bits)
    alone = [Trained(w, options, bits) for w in weights]
    together.lr = lr
    for t in range(3):
        gradients = randn(4, *SHAPE, seed=t + 1).float()
        gradients[1] = float("nan")  # not looked at
        if norm:
            gradients[2, 7] = float("inf")
        pieces = gradients.clone()
        how: dict[str, Any] = {"scale": scale}
        if norm:
            how = {"control": Control.empty([gradients])}
            oracle.flat_norm([gradients], scale=scale, max_norm=3.0, live=live, step=together.step, out=how["control"])
            assert how["control"].found_inf.tolist() == [0, 0, 1, 0]
            assert how["control"].norm[1] == 0
        else:
            together.step += live
        together.take(gradients, live=live, **how)
        assert not gradients.any()
        for k in (0, 2, 3):
            solo: dict[str, Any] = {"scale": scale[k]}
            if norm:
                solo = {"control": Control.empty([pieces[k]])}
                oracle.flat_norm([pieces[k]], scale=scale[k], max_norm=3.0, step=alone[k].step, out=solo["control"])
            else:
                alone[k].step += 1
            alone[k].lr = lr[k]
            alone[k].take(pieces[k], **solo)
    for k in range(4):
        assert same([t[k] for t in together.state()], alone[k].state()), k
    assert together.step.tolist() == ([3, 0, 0, 3] if norm else [3, 0, 3, 3])


def test_gradients_can_be_kept() -> None:
    gradients = randn(*SHAPE)
    Trained(randn(*SHAPE), {}).take(gradients, zero=False)
    assert torch.equal(gradients, randn(*SHAPE))


def test_8_bit_codes() -> None:
    """Each code is the value it stands for; the largest is exact; a stored value is off by at most 1/8 of itself."""
    first, second = randn(5, 1000).float() * 3, randn(5, 1000, seed=1).float() ** 2
    first[0, :256], second[0, :256] = 0, 0
    codes = oracle.encoded(first, second, torch.arange(5))
    m, v = oracle.decoded(codes, FP32)
    again = oracle.decoded(oracle.encoded(m, v, torch.arange(5) + 9), FP32)
    torch.testing.assert_close(again[0], m, rtol=2**-19, atol=0)
    torch.testing.assert_close(again[1], v, rtol=2**-19, atol=0)
    lowest = codes.first_absmax.repeat_interleave(256, -1)[:, :1000] * 2.0**-16 * 1.25  # type: ignore[union-attr]
    kept = first.abs() >= lowest
    assert ((m - first).abs()[kept] <= first.abs()[kept] / 8).all()
    assert ((m - first).abs() <= lowest)[~kept].all()
    assert ((v - second).abs() <= second / 8).all()
    assert torch.equal((v == 0), (second == 0))
    for values, stored in ((first.abs(), m.abs()), (second, v)):
        top = values[:, :256].max(-1)
        torch.testing.assert_close(stored.gather(1, top.indices[:, None])[:, 0], top.values, rtol=1e-6, atol=0)


def test_second_moments_do_not_vanish() -> None:
    """13 orders of magnitude in one block: too small ones become the lowest code, which makes their update smaller."""
    second = torch.logspace(-13, 0, 256)
    _, v = oracle.decoded(oracle.encoded(second.clone(), second, torch.ones(())), FP32)
    assert v.min() == v.max() * 1.25 * 2.0**-32
    assert ((v / second)[second < v.min()] > 1).all()


def test_8_bit_moments_follow_slow_changes() -> None:
    """A step of Adam moves a second moment by 1/1000: rounding must lose none of it on average.

    A block's first element stays at 4; the others begin at 0.5, and their squared gradient is then 2. After 1000 steps
    fp32 has 2 − 1.5 · 0.999¹⁰⁰⁰ = 1.4485, and nearest rounding still 0.5, as 0.0015 is less than half of the spacing of
    1/16. A step moves by at most 1/8, at a chance that makes the average 0.0015 at most: a variance of at most
    0.0015 / 8, after 1000 steps 0.19, so a deviation of 0.43, and of the mean of 1020 elements 0.014; 5 are allowed.
    """
    second = torch.full((1024,), 0.5)
    second[::256] = 4
    moments = oracle.encoded(torch.zeros(1024), second, torch.zeros(()))
    squares = torch.full((1024,), 2.0)
    squares[::256] = 4
    for t in range(1000):
        _, v = oracle.decoded(moments, FP32)
        moments = oracle.encoded(torch.zeros(1024), v.lerp(squares, 0.001), torch.tensor(t + 1))
    _, v = oracle.decoded(moments, FP32)
    assert v[::256].sub(4).abs().max() < 1e-3
    rest = v[torch.arange(1024) % 256 != 0]
    assert abs(rest.mean() - 1.4485) < 5 * 0.014


def test_8_bit_adamw_follows_fp32() -> None:
    """Within what its code's error permits, on the same gradients, of constant sign and of size 1 to 2.

    A stored moment is within [7/8, 9/8] of itself and only positive numbers are added to it, so at step t both moments
    are within the t−1 st power of that. An update m̂ / √v̂ is at most 2 and so off by at most
    2 ((9/8)ᵗ⁻¹ (8/7)^((t−1)/2) − 1). Rounding is right on average: so is the mean, within 5 of its deviations.
    """
    weights = randn(2000).float()
    exact, small = Trained(weights, {"weight_decay": 0.0}, 32), Trained(weights, {"weight_decay": 0.0}, 8)
    sign = randn(2000, seed=1).sign().float()
    bound = 1e-6
    for t in range(1, 6):
        gradients = sign * (1 + torch.rand(2000, generator=torch.Generator().manual_seed(t)))
        for made in (exact, small):
            made.step += 1
            made.take(gradients.clone())
        bound += 0.01 * 2 * ((9 / 8) ** (t - 1) * (8 / 7) ** ((t - 1) / 2) - 1)
        errors = sign * (small.weights - exact.weights)
        assert errors.abs().max() <= bound, t
    assert abs(errors.mean()) < 5 * errors.std() / 2000**0.5
    assert errors.std() < 0.05 * (exact.weights - weights).abs().mean()


def test_wrong_arguments() -> None:
    w, lr, step = torch.zeros(2, 8), torch.ones(()), torch.ones(2)
    moments, control = Moments.zeros(w), Control.empty([w])
    sgd: Any = oracle.sgd_step
    adamw: Any = oracle.adamw_step
    norm: Any = oracle.flat_norm
    calls: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((w, w[:, :7], None), {}, r"gradients has shape \(2, 7\).* expected contiguous \(2, 8\)"),
        ((w[None], w[None], None), {}, r"weights has shape \(1, 2, 8\), expected \[P\] or \[K, P\]"),
        ((w.T, w.T, None), {}, r"weights has shape \(8, 2\), strides \(1, 8\)"),
        ((w, w, torch.zeros(2, 9)[:, :8]), {"momentum": 0.9}, "buffer's rows are 9 elements apart, those of weights 8"),
        ((w, w, None), {"low": w.T}, r"low has shape \(8, 2\)"),
        ((w, w, None), {"lr": torch.ones(3)}, r"lr has shape \(3,\).* expected contiguous \(2,\)"),
        ((w, w, None), {"momentum": 0.9}, r"buffer is missing with momentum 0\.9"),
        ((w, w, w.clone()), {}, r"buffer is given with momentum 0\.0"),
        ((w, w, None), {"nesterov": True}, r"momentum is 0\.0 with nesterov=True"),
        ((w, w, None), {"live": torch.ones(2)}, r"live is torch\.float32, expected torch\.bool"),
        ((w, w, None), {"scale": lr, "control": control}, r"scale and control are both given"),
        ((w, w, None), {"control": Control.empty([w[0]])}, r"control's norm has shape \(\).* \(2,\)"),
    ]
    for given, options, message in calls:
        with pytest.raises(ValueError, match=message):
            sgd(*given, **{"lr": lr, **options})
    changes: list[tuple[Moments, dict[str, Any], str]] = [
        (moments._replace(second=w.half()[:1]), {}, r"second has shape \(1, 8\)"),
        (moments._replace(first_absmax=w), {}, r"first_absmax is given, the first moment torch\.float32"),
        (Moments.zeros(w, 8)._replace(second_absmax=None), {}, r"second_absmax is missing"),
        (Moments.zeros(w, 8)._replace(second=w), {}, r"second is torch\.float32, expected torch\.uint8"),
        (moments, {"betas": (0.9, 1.0)}, r"betas are \(0\.9, 1\.0\)"),
        (moments, {"step": torch.ones(3)}, r"step has shape \(3,\)"),
        (moments, {"step": torch.ones(2, dtype=torch.int64)}, r"step is torch\.int64, expected floating point"),
    ]
    for changed, options, message in changes:
        with pytest.raises(ValueError, match=message):
            adamw(w, w, changed, **{"step": step, "lr": lr, **options})
    norms: list[tuple[list[Tensor], dict[str, Any], str]] = [
        ([], {}, r"0 segments"),
        ([w, w[:1]], {}, r"gradients\[1\] has shape \(1, 8\).* expected contiguous \(2, 8\)"),
        ([w], {"max_norm": 0.0}, r"max_norm is 0\.0"),
        ([w, w], {}, r"partials has shape \(2, 1\).* expected contiguous \(2, 2\)"),
        ([w], {"step": torch.ones(())}, r"step has shape \(\).* expected contiguous \(2,\)"),
    ]
    for segments, options, message in norms:
        with pytest.raises(ValueError, match=message):
            norm(segments, **{"out": control, **options})
    with pytest.raises(ValueError, match="bits is 4, expected 8 or 32"):
        Moments.zeros(w, 4)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.zeros(8)
    monkeypatch.setattr(launch, "_missing", "")
    monkeypatch.setattr(launch, "INTERPRETED", False)
    reason = "weights is on cpu, not on a CUDA device"
    assert kernels.flat_optimizer_supported(w, w) == (False, reason)
    with pytest.raises(ValueError, match=f"sgd_step: {reason}"):
        kernels.sgd_step(w, w.clone(), None, lr=torch.ones(()))
    with pytest.raises(ValueError, match=r"flat_norm: gradients\[0\] is on cpu"):
        kernels.flat_norm([w], out=Control.empty([w]))
    monkeypatch.setattr(launch, "INTERPRETED", True)
    assert kernels.flat_optimizer_supported(w, w, w.half()) == (True, "")
    assert kernels.flat_optimizer_supported(w.double(), w)[1].startswith("weights is torch.float64, not one of")
    assert kernels.flat_optimizer_supported(w, w, w)[1].startswith("low is torch.float32, not one of")
    many = torch.zeros(65536, 1)
    assert kernels.flat_optimizer_supported(many, many) == (False, "65536 rows are more than 65535")
    with pytest.raises(ValueError, match=r"adamw_step: lr is torch\.float64"):
        kernels.adamw_step(w, w.clone(), Moments.zeros(w), step=torch.ones(()), lr=torch.ones((), dtype=FP64))
    monkeypatch.setattr(launch, "_missing", "no triton")
    assert kernels.flat_optimizer_supported(w, w) == (False, "Triton is missing (no triton)")
