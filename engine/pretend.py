"""Modules on tensors that have a shape and no memory: what they compute and take is known without doing it."""

import copy
import weakref
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils._pytree import tree_leaves

M = TypeVar("M", bound=nn.Module)
_DEVICE, _ATEN = torch.ops.prim.device.default, torch.ops.aten
_VIEWS = {
    _ATEN.view.default, _ATEN.view.dtype, _ATEN._unsafe_view.default, _ATEN.slice.Tensor, _ATEN.select.int,
    _ATEN.split.Tensor, _ATEN.as_strided.default, _ATEN.t.default, _ATEN.transpose.int, _ATEN.permute.default,
    _ATEN.expand.default, _ATEN.unsqueeze.default, _ATEN.squeeze.dim, _ATEN.detach.default, _ATEN.alias.default,
}  # fmt: skip
_PLAIN = {
    int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format,
}  # fmt: skip


@contextmanager
def pretended(modules: M) -> Iterator[M]:
    """A copy without memory, what is shared in it shared; within the block no tensor that is made has any."""
    pretence = Pretence()
    own = pretence.copy(modules)
    with pretence:
        yield own


class Live:
    """Bytes of what is made while it is open, as long as that lives; `peak` is the most at a time."""

    def __init__(self) -> None:
        self.peak = 0
        self._now = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def made(self, tensor: Tensor) -> None:
        """Such a tensor has been made, with a storage of its own."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()

        def gone(_: object) -> None:
            del self._alive[key]
            self._now -= size

        self._alive[key] = weakref.ref(storage, gone)
        self._now += size
        self.peak = max(self.peak, self._now)


class _Made(NamedTuple):
    """A tensor with a storage of its own, no larger than it must be, as an operator gives it."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class _Answer(NamedTuple):
    """What an operator gives."""

    several: bool
    outputs: list[_Made | int | None]
    """A tensor, the operand at that place, or nothing."""


class Pretence(FakeTensorMode):
    """PyTorch's mode without memory, much faster: most calls of a model's layers differ in nothing from calls before.

    What follows from shapes and types alone is looked up, views are made as always, and PyTorch is asked the rest.
    """

    _answers: ClassVar[dict[Hashable, _Answer]] = {}

    def __init__(self) -> None:
        super().__init__()
        self._live: Live | None = None
        self._like: dict[torch.device, FakeTensor] = {}

    def copy(self, modules: M) -> M:
        """A copy without memory, what is shared in it shared."""
        tensors = [*modules.parameters(), *modules.buffers()]
        with torch.no_grad():
            plain = [tensor.detach() for tensor in tensors]
        with self:
            made: dict[int, Any] = {}
            for tensor, detached in zip(tensors, plain, strict=True):
                # Of a model that has no memory to begin with, as if it had.
                shape, dtype, known = detached.shape, detached.dtype, not detached.is_meta
                fake = self.from_tensor(detached) if known else torch.empty(shape, dtype=dtype)
                parameter = isinstance(tensor, nn.Parameter)
                made[id(tensor)] = nn.Parameter(fake, requires_grad=tensor.requires_grad) if parameter else fake
            return copy.deepcopy(modules, made)

    @contextmanager
    def live(self) -> Iterator[Live]:
        """Count what is made within the block; not in another such."""
        self._live = live = Live()
        try:
            yield live
        finally:
            self._live = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:
            return args[0].device
        kwargs = kwargs or {}
        operands: list[Tensor] = []
        if func in _VIEWS and type(args[0]) is FakeTensor and args[0].constant is None:
            return self._view(func, args, kwargs)
        try:
            call = func, torch.get_default_dtype(), _key((args, *kwargs.items()), operands)
        except _Special:
            return self._ask(func, types, args, kwargs)
        if (answer := self._answers.get(call)) is None:
            out = self._ask(func, types, args, kwargs)
            if _key((args, *kwargs.items()), []) == call[-1]:  # shapes of operands stay
                self._learn(call, func, operands, out)
            return out
        made = [self._make(output, operands) for output in answer.outputs]
        return tuple(made) if answer.several else made[0]

    def _ask(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """What PyTorch says, who may make others on the way."""
        live, self._live = self._live, None
        try:
            out = super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self._live = live
        if live is not None:
            known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            for tensor in tree_leaves(out):
                if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in known:
                    known.add(tensor.untyped_storage()._cdata)
                    live.made(tensor)
        return out

    def _view(self, func: Any, args: Any, kwargs: Any) -> Any:
        with in_kernel_invocation_manager(self):
            out = func(*args, **kwargs)
        device = args[0].fake_device
        return self._fake(out, device) if isinstance(out, Tensor) else [self._fake(each, device) for each in out]

    def _fake(self, meta: Tensor, device: torch.device) -> FakeTensor:
        """What the constructor makes, in a fifth of the time."""
        if (like := self._like.get(device)) is None:
            like = self._like[device] = FakeTensor(self, torch.empty(0, device="meta"), device)
        made: FakeTensor = Tensor._make_subclass(
            FakeTensor, meta, False, dispatch_device=True, device_for_backend_keys=device
        )
        torch._C._set_throw_on_mutable_data_ptr(made)
        made.__dict__.update(like.__dict__)
        return made

    def _make(self, output: _Made | int | None, operands: list[Tensor]) -> Tensor | None:
        if output is None:
            return None
        if isinstance(output, int):
            return operands[output]
        # No mode is on in here: on the meta device nothing has memory.
        made = torch.empty_strided(output.shape, output.stride, dtype=output.dtype, device="meta")
        if self._live is not None:
            self._live.made(made)
        return self._fake(made, output.device)

    def _learn(self, call: Hashable, func: Any, operands: list[Tensor], out: Any) -> None:
        """Remember the answer, unless there is more to it than shapes and types."""
        if (
            not isinstance(func, OpOverload) or torch.Tag.inplace_view in func.tags
        ):  # as `set_`, of which no shape tells
            return
        several = isinstance(out, tuple | list)
        outputs: list[_Made | int | None] = []
        storages = {tensor.untyped_storage()._cdata for tensor in operands}
        places = {id(tensor): i for i, tensor in enumerate(operands)}
        for o in out if several else (out,):
            if o is None:
                outputs.append(None)
            elif id(o) in places and len(places) == len(operands):
                outputs.append(places[id(o)])
            else:
                try:
                    shape, stride, dtype, device = _key(o, [])
                except (_Special, ValueError):
                    return
                storage = o.untyped_storage()
                size = torch._prims_common.compute_required_storage_length(shape, stride, 0) * dtype.itemsize
                if storage._cdata in storages or storage.nbytes() != size or o.storage_offset():
                    return
                storages.add(storage._cdata)
                outputs.append(_Made(shape, stride, dtype, device))
        self._answers[call] = _Answer(several, outputs)


class _Special(Exception):
    """What a call gives may not follow from shapes and types."""


def _key(tree: Any, operands: list[Tensor]) -> Any:  # hashable
    """All that matters of an operand, or of several, whose tensors are added to `operands`."""
    kind = type(tree)
    if kind is FakeTensor:
        if tree.constant is not None or tree.layout is not torch.strided or tree.dtype.is_complex:
            raise _Special
        operands.append(tree)
        return tree.shape, tree.stride(), tree.dtype, tree.fake_device
    if kind in (tuple, list):
        return tuple([_key(each, operands) for each in tree])
    if kind not in _PLAIN:
        raise _Special
    return kind, tree  # 1 is True, but not the same operand
