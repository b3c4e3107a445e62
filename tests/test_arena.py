"""Layouts and arenas: where each tensor lies, round trips, and bindings that are noticed when they break."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from fedmoe.engine.arena import Arena
from fedmoe.engine.layout import ALIGNMENT, Layout, digest
from fedmoe.engine.member import SGD, AdamW
from fedmoe.engine.program import Program
from fedmoe.engine.seam import State
from fedmoe.kernels.flat_optimizer import Moments

LOW = torch.bfloat16
MOMENTUM = SGD(lr=0.1, momentum=0.9, weight_decay=0.0, reset_theta=True)


class Model(nn.Module):
    """Everything an arena must hold: shared and private, tied, frozen, normalized, all kinds of buffers, odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.local = nn.Sequential(nn.Linear(3, 7), nn.BatchNorm1d(7), nn.Linear(7, 7, bias=False))
        self.shared = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.tied = self.local[2]
        self.register_buffer("mask", torch.tensor([True, False]))

    def program(self) -> Program:
        branches = {"shared": self.shared, "local": self.local}
        segments = {"theta": ("shared",), "private": ("local", "frozen", "tied")}
        return Program(self, branches, lambda o: o["local"], lambda o, y: (o["local"].sum(), y.sum()), segments)


def state(model: nn.Module) -> State:
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    momentum = {f"momentum/{name}": torch.randn_like(p) for name, p in trainable.items()}
    return {f"model/{name}": t.detach().clone() for name, t in tensors.items()} | momentum


def made(low: torch.dtype | None = None) -> tuple[Model, Layout, Tensor, State]:
    torch.manual_seed(0)
    model = Model()
    layout = Layout.of(model.program(), MOMENTUM)
    kept, block = state(model), torch.empty(Layout.of(model.program(), MOMENTUM).size, dtype=torch.uint8)
    layout.pack(kept, block)
    return model, layout, block, kept


def test_every_tensor_has_its_own_aligned_bytes() -> None:
    _, layout, _, kept = made()
    assert layout.entries.keys() == kept.keys()
    spans = sorted((e.offset, e.offset + e.bytes) for e in layout.entries.values())
    assert all(start % ALIGNMENT == 0 for start, _ in spans)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert spans[-1][1] <= layout.size and layout.size % ALIGNMENT == 0


def test_order_of_the_weights() -> None:
    _, layout, _, _ = made()
    weights = [n for n, e in sorted(layout.entries.items(), key=lambda i: i[1].offset) if e.offset < 4 * layout.weights]
    narrow = [n for n in weights if layout.entries[n].offset < 4 * layout.narrow]
    assert narrow == [
        "model/shared.0.weight", "model/shared.0.bias", "model/local.0.weight", "model/local.0.bias",
        "model/local.2.weight",
    ]  # fmt: skip
    assert set(weights) - set(narrow) == {f"model/{m}.1.{p}" for m in ("shared", "local") for p in ("weight", "bias")}
    assert layout.theta == (
        "model/shared.0.weight", "model/shared.0.bias", "model/shared.1.weight", "model/shared.1.bias",
        "model/shared.1.running_mean", "model/shared.1.running_var",
    )  # fmt: skip


def test_round_trip() -> None:
    _, layout, block, kept = made()
    again = layout.unpack(block)
    assert again.keys() == kept.keys() and all(torch.equal(again[name], kept[name]) for name in kept)
    without = {name: t for name, t in kept.items() if not name.startswith("momentum/local")}
    layout.pack(without, block)
    assert not layout.unpack(block)["momentum/local.0.weight"].any()


def test_constants_lie_behind_what_moves_and_come_in_parts_of_any_size() -> None:
    model = Model()
    model.frozen = nn.Linear(30, 40).requires_grad_(False)
    program = replace(model.program(), constants=frozenset({"frozen.weight", "frozen.bias"}))
    layout = Layout.of(program, MOMENTUM)
    n = layout.size - layout.moving
    for size in (256, 1024, n):
        tail = torch.cat([layout.constants(model, start, min(start + size, n)) for start in range(0, n, size)])
        block = torch.cat([torch.zeros(layout.moving, dtype=torch.uint8), tail])
        for name in program.constants:
            assert torch.equal(layout.entries[f"model/{name}"].of(block), model.get_parameter(name))


def test_a_digest_tells_names_shapes_types_and_every_byte_apart() -> None:
    def of(weights: Tensor, name: str = "a") -> bytes:
        return bytes(digest(nn.ParameterDict({name: nn.Parameter(weights, False)}), [name]).tolist())

    weights = torch.zeros(100, 50)
    other = weights.clone()
    other[-1, -1] = 1
    views = (weights.view(torch.int32), weights.view(50, 100), other)
    assert len({of(weights), of(weights, "b"), *map(of, views)}) == 5
    assert of(weights) == of(weights.clone())
    assert of(other) == of(other.t().contiguous().t())  # wherever its elements lie


@pytest.mark.parametrize("constant", [False, True])
def test_tensors_without_elements(constant: bool) -> None:
    model = Model()
    model.frozen.register_parameter("empty", nn.Parameter(torch.empty(0, 3), requires_grad=False))
    model.register_buffer("none", torch.empty(0))
    constants = frozenset({"frozen.empty"} if constant else ())
    layout, kept = Layout.of(replace(model.program(), constants=constants), MOMENTUM), state(model)
    if constant:
        del kept["model/frozen.empty"]
        kept["constants"] = digest(model, constants)
    layout.pack(kept, block := torch.empty(layout.moving, dtype=torch.uint8))
    assert layout.unpack(block).keys() == kept.keys()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s.pop("model/mask"), "tensor 'model/mask' is missing"),
        (lambda s: s.update({"model/x": torch.ones(1)}), "tensor 'model/x' is unknown"),
        (
            lambda s: s.update({"model/mask": torch.ones(2)}),
            r"mask' is torch.float32 \[2\], .* torch.bool \[2\]",
        ),
    ],
)
def test_a_state_that_does_not_fit(spoil: object, message: str) -> None:
    _, layout, block, kept = made()
    assert callable(spoil)
    spoil(kept)
    with pytest.raises(ValueError, match=message):
        layout.pack(kept, block)


def test_masters_must_be_fp32() -> None:
    model = Model()
    model.local.double()
    with pytest.raises(ValueError, match=r"'local.0.weight' is torch.float64, the engine trains torch.float32"):
        Layout.of(model.program(), MOMENTUM)


def test_modules_are_whoever_is_in_the_region() -> None:
    model, layout, block, kept = made()
    region = torch.zeros(layout.size + 1000, dtype=torch.uint8)
    other = Model()
    arena = Arena(other.program(), layout, region)
    region[: layout.size].copy_(block)
    arena.check()
    x = torch.randn(4, 3)
    assert torch.equal(other.local(x), model.local(x))
    assert getattr(other.tied, "weight") is getattr(other.local[2], "weight")  # noqa: B009
    with torch.no_grad():
        other.get_parameter("shared.0.weight").add_(1)
    assert torch.equal(layout.unpack(region)["model/shared.0.weight"], kept["model/shared.0.weight"] + 1)
    assert torch.equal(arena.masters()["shared.0.weight"], other.get_parameter("shared.0.weight"))
    assert torch.equal(arena.kept("momentum")["local.0.bias"], kept["momentum/local.0.bias"])
    assert [t.shape for t in arena.theta()] == [layout.entries[name].shape for name in layout.theta]


def test_modules_without_memory_can_be_bound() -> None:
    _, layout, block, kept = made()
    with torch.device("meta"):
        other = Model()
    arena = Arena(other.program(), layout, block)
    arena.check()
    named = dict(other.named_parameters()) | dict(other.named_buffers())
    assert all(torch.equal(tensor, kept[f"model/{name}"]) for name, tensor in named.items())
    assert getattr(other.tied, "weight") is getattr(other.local[2], "weight")  # noqa: B009
    assert not other.frozen.weight.requires_grad and other.local[0].weight.requires_grad
    assert all(p.data_ptr() == other.get_parameter(name).data_ptr() for name, p in arena.masters().items())


def test_low_precision_binds_copies_of_all_but_normalizations() -> None:
    _, layout, block, kept = made()
    model = Model()
    arena = Arena(model.program(), layout, block, LOW)
    arena.refresh()
    arena.check()
    for name, parameter in model.named_parameters():
        low = ".1." not in name and not name.startswith("frozen")
        assert parameter.dtype == (LOW if low else torch.float32), name
        assert torch.equal(parameter, kept[f"model/{name}"].to(parameter.dtype))
    assert all(t.dtype == torch.float32 for t in arena.masters().values())


@pytest.mark.parametrize(
    "unbind",
    [
        lambda m: m.double(),
        lambda m: m.load_state_dict({k: t.clone() for k, t in m.state_dict().items()}, assign=True),
        lambda m: setattr(m.local[0], "weight", nn.Parameter(torch.ones(7, 3))),
        lambda m: setattr(m.local[1], "running_mean", torch.ones(7)),
    ],
)
def test_what_unbinds_is_noticed(unbind: object) -> None:
    _, layout, block, _ = made()
    model = Model()
    arena = Arena(model.program(), layout, block)
    arena.check()
    assert callable(unbind)
    unbind(model)
    with pytest.raises(AssertionError, match="no longer bound"):
        arena.check()


ADAMW = AdamW(lr=0.1, weight_decay=0.0, reset_theta=True)
CODED = AdamW(lr=0.1, weight_decay=0.0, reset_theta=True, bits=8)


@pytest.mark.parametrize("rule", [ADAMW, CODED])
def test_moments_lie_like_the_weights_and_theta_has_ranges_of_its_own(rule: AdamW) -> None:
    layout = Layout.of(Model().program(), rule)
    assert [part.theta for part in layout.ranges] == [True, False, True, False]  # narrow, then normalizations'
    assert [part.start for part in layout.ranges[1:]] == [part.stop for part in layout.ranges[:-1]]
    assert layout.ranges[0].start == 0 and layout.ranges[-1].stop == layout.weights
    block = torch.zeros(layout.size, dtype=torch.uint8)
    for part in layout.ranges:
        weights, moments = layout.flat("model", block)[part.start : part.stop], layout.moments(part, block)
        fresh = Moments.zeros(weights, rule.bits)
        for mine, theirs in zip(moments, fresh, strict=True):
            if theirs is not None:
                assert mine is not None and mine.shape == theirs.shape and mine.dtype == theirs.dtype
                assert not mine.any()  # nobody else's
                mine.fill_(1)
        names = [n for n in layout.trainable if part.start <= layout.entries[f"model/{n}"].offset // 4 < part.stop]
        assert names and all((layout.entries[f"second/{n}"].of(block) == 1).all() for n in names)
        assert all(n.startswith("shared.") == part.theta for n in names)
    assert not layout.flat("step", block).any() and not layout.flat("model", block).any()
    assert not any(
        layout.entries[f"model/{n}"].of(block).any() for n in ("frozen.weight", "mask", "local.1.running_var")
    )


@pytest.mark.parametrize("rule", [ADAMW, CODED, MOMENTUM])
def test_theta_begins_anew_alone(rule: SGD | AdamW) -> None:
    layout = Layout.of(Model().program(), rule)
    block = torch.full((layout.size,), 1, dtype=torch.uint8)
    before = layout.unpack(block)
    layout.reset_theta(block)
    for name, tensor in layout.unpack(block).items():
        kind, _, rest = name.partition("/")
        if kind == "step":
            assert tensor.tolist() == [before["step"][0].item(), 0]
        elif kind.endswith("_absmax"):
            assert (tensor == 0).tolist() == [part.theta for part in layout.ranges]  # of a block each
        else:
            assert tensor.any() == (kind == "model" or not rest.startswith("shared.")), name


def test_round_trip_of_codes() -> None:
    torch.manual_seed(0)
    layout = Layout.of(Model().program(), CODED)
    kept = {n: t for n, t in state(Model()).items() if n.startswith("model/")}
    kept |= {
        name: torch.randint(255, entry.shape).to(entry.dtype)
        for name, entry in layout.entries.items()
        if not name.startswith("model/")
    }
    block = torch.empty(layout.size, dtype=torch.uint8)
    layout.pack(kept, block)
    again = layout.unpack(block)
    assert again.keys() == kept.keys() and all(torch.equal(again[name], kept[name]) for name in kept)
    with pytest.raises(ValueError, match=r"'step' is torch.float32 \[1\], the client's is torch.float32 \[2\]"):
        layout.pack(kept | {"step": torch.ones(1)}, block)
