"""The flat optimizer's kernels in Triton's interpreter, against the fp64 oracle; known bugs put into them."""

import functools
import importlib
import itertools
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedmoe.kernels import flat_norm_kernels, flat_optimizer_kernels, flat_optimizer_launch
from fedmoe.kernels.flat_optimizer import Control, flat_norm, sgd_step
from tests.optimizers import ADAMW, FP16, FP32, SGD, check

BF16 = torch.bfloat16
_count = itertools.count()


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"weight_decay": 0.1}, SGD])
def test_sgd(options: dict[str, Any]) -> None:
    check(options=options)
    check((2, 260), options, gradient=BF16, norm=1.0, live=True, wrong=True)
    check((3, 260), options, apart=True)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("options", [{"weight_decay": 0.0}, {"betas": (0.0, 0.9), "eps": 1e-3}, ADAMW])
def test_adamw(options: dict[str, Any], bits: int) -> None:
    check(options=options, bits=bits)
    check((2, 260), options, bits, gradient=FP16, norm=1.0, live=True, wrong=True)


@settings(max_examples=16, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    rows=st.sampled_from([None, 1, 2]),
    size=st.one_of(st.sampled_from([1, 255, 256, 257, 2048]), st.integers(1, 2500)),
    bits=st.sampled_from([0, 32, 8]),
    gradient=st.sampled_from([FP32, FP16, BF16]),
    scale=st.sampled_from([1.0, 3.0, 1024.0]),
    norm=st.sampled_from([None, 0.0, 0.3, 1e6]),
    live=st.booleans(),
    wrong=st.booleans(),
)
def test_any_size_and_options(rows: int | None, size: int, bits: int, live: bool, wrong: bool, **how: Any) -> None:
    shape = (size,) if rows is None else (rows, size)
    check(
        shape,
        ADAMW if bits else SGD,
        bits,
        live=live and rows is not None,
        wrong=wrong and how["norm"] is not None,
        **how,
    )


@pytest.mark.parametrize("bits", [0, 32, 8])
def test_two_runs_give_the_same_bits(bits: int) -> None:
    runs = [check((2, 1100), ADAMW if bits else SGD, bits, norm=1.0).tensors(True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(runs[0].values(), runs[1].values(), strict=True))


def test_norm_of_more_blocks_than_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("state.NORM_BLOCK", 64), ("launch.NORM_BLOCK", 64), ("state.NORM_PROGRAMS", 3)):
        monkeypatch.setattr(f"fedmoe.kernels.flat_optimizer_{name}", value)
    g = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
    control = Control.empty([g])
    assert control.partials.shape == (2, 3)
    flat_norm([g], out=control)
    torch.testing.assert_close(control.norm, g.norm(dim=1))


def test_gradients_can_be_kept_and_steps_be_integers() -> None:
    g = torch.ones(5)
    control, step = Control.empty([g]), torch.tensor(2**24, dtype=torch.int32)
    flat_norm([g], step=step, out=control)
    w = torch.zeros(5)
    sgd_step(w, g, None, lr=torch.ones(()), control=control, zero=False)
    assert step == 2**24 + 1 and (g == 1).all() and (w == -1).all()


def test_a_norm_that_overflows_is_not_finite() -> None:
    g = torch.full((3,), 1e30)
    control = Control.empty([g])
    flat_norm([g], max_norm=1.0, out=control)
    assert control.found_inf == 1


def sgd() -> None:
    check()


def adamw() -> None:
    check(options=ADAMW, bits=32)


def quantized() -> None:
    check(options=ADAMW, bits=8)


def clipped() -> None:
    check(norm=1.0)


def apart() -> None:
    check((2, 260), apart=True)


def skipped() -> None:
    check((2, 260), norm=0.0, live=True, wrong=True)


@functools.cache
def passes(checked: Callable[[], None]) -> None:
    checked()


UPDATES, NORMS = flat_optimizer_kernels, flat_norm_kernels
BUGS: dict[str, tuple[ModuleType, str, str, Callable[[], None]]] = {
    "bias correction of the next step": (
        UPDATES,
        "_correction(t.to(tl.float32), LOG_BETA1)",
        "_correction(t.to(tl.float32) + 1, LOG_BETA1)",
        adamw,
    ),
    "weight decay coupled to the gradient": (UPDATES, "(g - m)", "(g + WEIGHT_DECAY * w - m)", adamw),
    "eps inside the root": (UPDATES, "tl.sqrt(v / correction2) + EPS", "tl.sqrt(v / correction2 + EPS)", adamw),
    "rows taken to touch": (UPDATES, "_begin(PITCH, ALIGN)", "_begin(P, ALIGN)", apart),
    "low copy of the weights before": (
        UPDATES,
        "w -= rate * g\n    _write(weights, w, mask)",
        "_write(weights, w - rate * g, mask)",
        sgd,
    ),
    "Nesterov's step without the gradient": (UPDATES, "g + MOMENTUM * velocity if", "velocity if", sgd),
    "weight decay scaled like the gradient": (
        UPDATES,
        "* factor + WEIGHT_DECAY * w",
        "* factor + factor * WEIGHT_DECAY * w",
        sgd,
    ),
    "gradients not zeroed when skipped": (
        UPDATES,
        "_write(g, tl.zeros([BLOCK], tl.float32), tile < P)",
        "pass",
        skipped,
    ),
    "clipped before unscaled": (
        NORMS,
        "factor = _factor(None, scale, SCALE_K)\n        at",
        "factor = 1.0\n        at",
        clipped,
    ),
    "a later segment's sums over an earlier one's": (NORMS, "* PARTS + FIRST + program", "* PARTS + program", clipped),
    "NaN taken for finite": (NORMS, "finite = length <", "finite = length !=", skipped),
    "a step counted though skipped": (NORMS, "taken = finite & ", "taken = ", skipped),
    "rows trained that are not live": (NORMS, "stays |= tl.load(live + row) == 0", "pass", skipped),
    "codes rounded to nearest": (UPDATES, "+ noise) >> 20", "+ (1 << 19)) >> 20", quantized),
    "second moments that vanish": (UPDATES, "v > 0, 1.25", "v < 0, 1.25", quantized),
    "the sign of first moments lost": (UPDATES, "tl.where(m < 0, 128, 0)", "0", quantized),
}


@pytest.mark.parametrize("bug", BUGS)
def test_bug_is_noticed(bug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, right, wrong, checked = BUGS[bug]
    passes(checked)
    assert Path(str(module.__file__)).read_text().count(right) == 1
    loaded = {}
    name = f"planted_{next(_count)}"
    for kept in (NORMS, UPDATES):
        # The updates take functions from the norm's file, so both are read anew.
        source = Path(str(kept.__file__)).read_text().replace("fedmoe.kernels.flat_norm_kernels", f"{name}_norms")
        path = tmp_path / f"{name}_{'norms' if kept is NORMS else 'updates'}.py"
        path.write_text(source.replace(right, wrong) if kept is module else source)
        monkeypatch.syspath_prepend(tmp_path)
        loaded[kept] = importlib.import_module(path.stem)
    monkeypatch.setattr(flat_optimizer_launch, "_norms", loaded[NORMS])
    monkeypatch.setattr(flat_optimizer_launch, "_kernels", loaded[UPDATES])
    with pytest.raises(AssertionError, match=r"plain PyTorch's|of the codes differ"):
        checked()
