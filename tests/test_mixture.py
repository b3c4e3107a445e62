"""The mixture is the paper's formula, its parts start as they should, and theta is what may be shared of it."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fedmoe import mixture, rehearsal
from fedmoe.config import Config, Gate, Model
from fedmoe.engine.seam import TensorSpec, violations
from fedmoe.errors import UserError
from fedmoe.experts import build as build_expert
from fedmoe.kernels.oracle import gated_mix

SHAPE, CLASSES = (1, 28, 28), 10


def made(client: int = 0, **fields: object) -> mixture.Mixture:
    return mixture.build(replace(Config(), **fields), client, SHAPE, CLASSES)  # type: ignore[arg-type]


def test_logits_are_the_header_of_the_weighted_sum() -> None:
    torch.manual_seed(0)
    m, x = made(), torch.randn(6, *SHAPE)
    weights = m.gate(x).softmax(1)
    mixed = weights[:, 0, None] * m.global_expert(x) + weights[:, 1, None] * m.local_expert(x)
    torch.testing.assert_close(m(x), m.header(mixed))
    torch.testing.assert_close(m.weights(x), weights)


def test_gate_order_is_global_then_local() -> None:
    g, one = torch.full((1, 3), 5.0), torch.ones(1, 3)
    torch.testing.assert_close(gated_mix(g, one, torch.tensor([[40.0, 0.0]])), g)
    torch.testing.assert_close(gated_mix(g, one, torch.tensor([[0.0, 40.0]])), one)


def test_join_is_mean_cross_entropy_and_correct_count() -> None:
    torch.manual_seed(0)
    m, x, y = made(), torch.randn(6, *SHAPE), torch.arange(6)
    loss, correct = m.join(m.program().run(x), y)
    logits = m(x).double()
    expected = -(logits - logits.logsumexp(1, keepdim=True))[range(6), y].mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    assert int(correct) == int((logits.argmax(1) == y).sum())


def test_one_loss_reaches_all_four_modules() -> None:
    m, x = made(), torch.randn(6, *SHAPE)
    m.join(m.program().run(x), torch.arange(6))[0].backward()
    for name, parameter in m.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(("weight", "share"), [(0.0, 0.0), (0.25, 0.25), (1.0, 1.0)])
def test_static_mixes_with_fixed_weights(weight: float, share: float) -> None:
    m, x = made(method="static", static_weight=weight), torch.randn(3, *SHAPE)
    torch.testing.assert_close(m(x), m.header(share * m.global_expert(x) + (1 - share) * m.local_expert(x)))
    assert all(torch.isfinite(b).all() for b in m.buffers())


def test_local_is_the_local_model_alone() -> None:
    m, x = made(method="local"), torch.randn(3, *SHAPE)
    assert torch.equal(m(x), m.header(m.local_expert(x)))
    assert {name for name, _ in m.named_children()} == {"local_expert", "header"}
    assert dict(m.program().segments) == {"theta": (), "private": ("local_expert", "header")}


def test_every_child_is_in_one_segment_and_theta_is_the_global_expert() -> None:
    m = made()
    segments = m.program().segments
    assert segments["theta"] == ("global_expert",)
    assert sorted(sum(segments.values(), ())) == sorted(name for name, _ in m.named_children())


def flat(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


def test_clients_differ_in_all_but_the_global_expert() -> None:
    first, other = made(0), made(5)  # the same architecture
    assert torch.equal(flat(first.global_expert), flat(other.global_expert))
    for part in ("local_expert", "gate", "header"):
        a, b = flat(getattr(first, part)), flat(getattr(other, part))
        assert a.shape == b.shape
        assert (a != b).float().mean() > 0.9, part


def test_controls_start_from_the_same_local_model_and_seeds_differ() -> None:
    a, b = made(3), made(3, method="local")
    assert torch.equal(flat(a.local_expert), flat(b.local_expert))
    assert torch.equal(flat(a.header), flat(b.header))
    c = made(3, seed=1)
    assert not torch.equal(flat(a.local_expert), flat(c.local_expert))
    assert not torch.equal(flat(a.global_expert), flat(c.global_expert))


def test_building_leaves_the_callers_random_numbers_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    made()
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("client", range(7))
def test_client_i_has_model_i_mod_5(client: int) -> None:
    extractor, _ = build_expert(f"cnn-{client % 5 + 1}", SHAPE, CLASSES)
    assert flat(made(client).local_expert).shape == flat(extractor).shape


class Normed(nn.Module):
    """An extractor with float and integer buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(784, 50)
        self.norm = nn.BatchNorm1d(50)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.linear(x.flatten(1)))
        return out


def make_normed(shape: tuple[int, int, int], classes: int) -> tuple[nn.Module, nn.Module]:
    return Normed(), nn.Linear(50, classes)


def make_narrow(shape: tuple[int, int, int], classes: int) -> tuple[nn.Module, nn.Module]:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 32)), nn.Linear(32, classes)


def test_theta_is_parameters_then_float_buffers_in_registration_order() -> None:
    m = made(model=Model(global_expert=f"{__name__}:make_normed"))
    g = m.global_expert
    assert isinstance(g, Normed)
    parts = [g.linear.weight, g.linear.bias, g.norm.weight, g.norm.bias, g.norm.running_mean, g.norm.running_var]
    expected = torch.cat([p.detach().reshape(-1) for p in parts if p is not None])
    assert torch.equal(mixture.pack(mixture.theta_tensors(g))["theta"], expected)
    assert mixture.schema(g) == {"theta": TensorSpec(torch.float32, (len(expected),))}


def test_theta_goes_in_as_it_came_out_and_is_a_copy() -> None:
    a, b = make_normed(SHAPE, 10)[0], make_normed(SHAPE, 10)[0]
    a(torch.randn(8, *SHAPE))
    packed = mixture.pack(mixture.theta_tensors(a))
    mixture.unpack(packed, mixture.theta_tensors(b))
    assert torch.equal(mixture.pack(mixture.theta_tensors(b))["theta"], packed["theta"])
    packed["theta"].zero_()
    assert flat(a).abs().sum() > 0


def test_experts_of_different_width_are_refused_in_one_line() -> None:
    narrow = Model(local=("cnn-1", f"{__name__}:make_narrow"))
    line = r"make_narrow' represents an image in 32 numbers, .*'cnn-5' in 50: .*, or set model.adapter to \"linear\"$"
    with pytest.raises(UserError, match=line):
        made(1, model=narrow)


NARROW = Model(local=("cnn-1", f"{__name__}:make_narrow"), adapter="linear")


def test_models_for_which_there_is_no_memory_are_refused_in_one_line() -> None:
    config = replace(Config(), model=Model(local=("resnet-18",), global_expert="resnet-18"))
    with pytest.raises(
        UserError, match=r"a model needs a tensor, for which there is no memory: lower data\.image_size"
    ):
        mixture.build(config, 0, (1, 2**31, 2**31), CLASSES)
    text = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 17179869184 bytes."
    with pytest.raises(UserError, match=r"a tensor of 17\.2 GB"), mixture._in_memory():
        raise RuntimeError(text)


def test_an_adapter_brings_the_global_expert_to_the_local_width() -> None:
    torch.manual_seed(0)
    m, x = made(1, model=NARROW), torch.randn(6, *SHAPE)
    assert m.adapter.weight.shape == (32, 50)
    shared, weights = m.adapter(m.global_expert(x)), m.weights(x)
    torch.testing.assert_close(m(x), m.header(weights[:, :1] * shared + weights[:, 1:] * m.local_expert(x)))
    torch.testing.assert_close(m.program().branches["global"](x), shared)
    m.join(m.program().run(x), torch.arange(6))[0].backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in m.parameters())


def test_an_adapter_is_private_and_seeded_by_itself() -> None:
    with_one, without = made(1, model=NARROW), made(1, method="local", model=NARROW)
    assert with_one.program().segments == {
        "theta": ("global_expert",),
        "private": ("adapter", "gate", "local_expert", "header"),
    }
    assert mixture.schema(with_one.global_expert) == mixture.schema(made(0).global_expert)
    assert torch.equal(flat(with_one.local_expert), flat(without.local_expert))
    assert torch.equal(flat(with_one.gate), flat(made(1).gate))
    for other in (made(3, model=NARROW), made(1, model=NARROW, seed=1)):
        assert not torch.equal(flat(with_one.adapter), flat(other.adapter))


def test_experts_of_equal_width_get_no_adapter() -> None:
    assert not hasattr(made(0, model=NARROW), "adapter")


def test_schema_violations_name_what_is_wrong() -> None:
    spec = {"theta": TensorSpec(torch.float32, (3,))}
    assert violations({"theta": torch.zeros(3)}, spec) == []
    assert violations({}, spec) == ["'theta' is missing"]
    assert violations({"theta": torch.zeros(3), "gate": torch.zeros(1)}, spec) == ["'gate' must not be there"]
    assert violations({"theta": torch.zeros(4)}, spec) == ["'theta' is torch.float32 [4], must be torch.float32 [3]"]
    assert violations({"theta": torch.zeros(3).double()}, spec) == [
        "'theta' is torch.float64 [3], must be torch.float32 [3]"
    ]


@pytest.mark.parametrize("norm", ["none", "paper", "layer-batch-batch", "switch-switch-switch"])
def test_gate_norms_train_and_evaluate(norm: str) -> None:
    m = made(gate=Gate(norm=norm))
    x = torch.randn(6, *SHAPE)
    assert m(x).shape == m.eval()(x).shape == (6, CLASSES)
    torch.testing.assert_close(m.weights(x).sum(1), torch.ones(6))


class Late(nn.Module):
    """Gets a buffer in its first training step."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(784, 50)
        self.register_buffer("seen", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen = torch.ones(1)
        out: Tensor = self.linear(x.flatten(1))
        return out


class Counting(Normed):
    """Keeps state outside of tensors."""

    def get_extra_state(self) -> int:
        return 3


class Detached(Normed):
    """Cannot train."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise KeyError("no such mode")
        return super().forward(x)


def make_late(shape: tuple[int, int, int], classes: int) -> tuple[nn.Module, nn.Module]:
    return Late(), nn.Linear(50, classes)


class Retyped(Late):
    """Changes the type of a buffer in training."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.ones(1, dtype=torch.float64))


def make_retyped(shape: tuple[int, int, int], classes: int) -> tuple[nn.Module, nn.Module]:
    return Retyped(), nn.Linear(50, classes)


class Sparse(nn.Module):
    """Has sparse gradients, which the optimizer does not take with weight decay."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(3, 50, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.table(x.flatten(1)[:, 0].long().clamp(0, 2))
        return out


class Averaging(nn.Module):
    """Keeps an average of its weights where it would be taken for one that never changes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(784, 50)
        self.average = nn.Parameter(self.layer.weight.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.average.lerp_(self.layer.weight.detach(), 0.1)
        out: Tensor = self.layer(x.flatten(1))
        return out


def make_averaging(shape: tuple[int, int, int], classes: int) -> tuple[nn.Module, nn.Module]:
    return Averaging(), nn.Linear(50, classes)


def make_sparse(shape: tuple[int, int, int], classes: int) -> tuple[nn.Module, nn.Module]:
    return Sparse(), nn.Linear(50, classes)


def make_counting(shape: tuple[int, int, int], classes: int) -> tuple[nn.Module, nn.Module]:
    return Counting(), nn.Linear(50, classes)


def make_detached(shape: tuple[int, int, int], classes: int) -> tuple[nn.Module, nn.Module]:
    return Detached(), nn.Linear(50, classes)


@pytest.mark.parametrize(
    ("factory", "complaint"),
    [
        ("make_late", "tensor 'local_expert.seen' appears or changes shape or type in training"),
        ("make_retyped", "tensor 'local_expert.seen' appears or changes shape or type in training"),
        ("make_averaging", "parameter 'local_expert.average' has no gradient, but its module changes it: use a buffer"),
        ("make_sparse", "a training step with 4 samples fails: "),
        ("make_counting", "Counting keeps state outside of tensors"),
        ("make_detached", "a training step with 4 samples fails: KeyError: 'no such mode'"),
    ],
)
def test_models_that_cannot_train_or_be_kept_are_found_in_rehearsal(factory: str, complaint: str) -> None:
    m = made(model=Model(local=(f"{__name__}:{factory}",)))
    with pytest.raises(UserError, match=complaint):
        rehearsal.rehearse(Config(), m, SHAPE, CLASSES, 4, factory)


def test_rehearsal_changes_nothing() -> None:
    m = made(model=Model(local=(f"{__name__}:make_normed",)), gate=Gate(norm="paper"))
    before = {name: tensor.clone() for name, tensor in m.state_dict().items()}
    rehearsal.rehearse(Config(), m, SHAPE, CLASSES, 4, "normed")
    assert all(torch.equal(before[name], tensor) for name, tensor in m.state_dict().items())
    assert all(p.grad is None for p in m.parameters())


class Double(Normed):
    """Has a float buffer that is not float32."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(1, dtype=torch.float64))


def make_double(shape: tuple[int, int, int], classes: int) -> tuple[nn.Module, nn.Module]:
    return Double(), nn.Linear(50, classes)


def make_bare(shape: tuple[int, int, int], classes: int) -> tuple[nn.Module, nn.Module]:
    return nn.Flatten(), nn.Linear(784, classes)


@pytest.mark.parametrize("factory", ["make_bare", "make_double"])
def test_global_expert_must_have_something_to_share_in_float32(factory: str) -> None:
    with pytest.raises(UserError, match=r"must have parameters, and all its floating-point tensors in float32"):
        made(model=Model(global_expert=f"{__name__}:{factory}"))


def test_batch_normalization_of_single_samples_is_found_in_rehearsal() -> None:
    m = made(gate=Gate(norm="paper"))
    with pytest.raises(UserError, match=r"with 1 samples fails: .*; raise training.batch_size or partition"):
        rehearsal.rehearse(Config(), m, SHAPE, CLASSES, 1, "cnn-1")
