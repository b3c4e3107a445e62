"""What steps of a federation's models take of memory: of language models tried out without any, of images estimated."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from itertools import product

from rich.console import Console
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fedmoe import optimizer, rehearsal
from fedmoe.config import Config
from fedmoe.data import Dataset
from fedmoe.engine.facts import Architecture, Facts, Sizes, Way
from fedmoe.engine.fit import work
from fedmoe.engine.footprint import footprint
from fedmoe.engine.member import Samples
from fedmoe.engine.seeds import globals_kept
from fedmoe.engine.step import How
from fedmoe.errors import UserError, reason
from fedmoe.kernels.gated_lm_head_launch import SLAB_BYTES
from fedmoe.mixture import Mixture
from fedmoe.models.language import Body


def text(
    config: Config, models: Mapping[str, Mixture], given: Sizes, dataset: Dataset, how: How, fused: bool, on: Facts
) -> Way:
    """How a step of text is taken on `on`: whole, or in the largest parts that fit.

    Likewise with activation checkpointing where the smallest do not fit without it; the smallest where nothing fits.
    Raises UserError where a step cannot be taken at all.
    """
    asked, micro_batch = config.model.activation_checkpointing, config.training.micro_batch
    halves = [given.batch >> i for i in range(1, given.batch.bit_length())]
    parts = [micro_batch] if micro_batch else [0, *halves]
    *wider, last = product((False, True) if asked == "auto" else (asked == "on",), parts)
    trials = _Trials(config, models, given, dataset, how, fused, on)
    for checkpointing, part in wider:
        if way := trials.way(part, checkpointing, fitting=True):
            return way
    way = trials.way(last[1], last[0], fitting=False)
    assert way is not None
    return way


class _Trials:
    """Steps of language models taken without memory, to see what they would take."""

    def __init__(
        self,
        config: Config,
        models: Mapping[str, Mixture],
        given: Sizes,
        dataset: Dataset,
        how: How,
        fused: bool,
        on: Facts,
    ) -> None:
        self._models, self._given, self._how, self._fused, self._on = models, given, how, fused, on
        self._samples = Samples(dataset.inputs, dataset.labels, config.data.mean, config.data.std)
        self._rule = optimizer.rule(config.training)
        self._evaluation: dict[str, int] = {}  # by architecture: it is the same however steps are taken
        self._console = Console(stderr=True)

    def way(self, micro_batch: int, checkpointing: bool, *, fitting: bool) -> Way | None:
        """This one, and what it takes; if `fitting`, None where that is too much."""
        given, way = self._given, None
        taken: dict[str, int] = {}
        # What does not fit is found soonest with the largest.
        for kind in sorted(given.architectures, key=lambda a: a.trainable + a.frozen, reverse=True):
            taken[kind.name] = self._taken(kind, micro_batch, checkpointing)
            known = tuple(a for a in given.architectures if a.name in taken)
            activations = tuple(taken[a.name] for a in known)
            way = Way(micro_batch=micro_batch, checkpointing=checkpointing, activations=activations)
            if fitting and not self._fits(replace(given, architectures=known).taken(way)):
                return None
        return way

    def _fits(self, taken: Sizes) -> bool:
        """Whether each kind of client can train so by itself."""
        gpu, low = self._on.device == "cuda", 2 if self._how.low else 0
        return work(taken, 1, 1, 1, low, gpu).total <= self._on.room

    def _taken(self, its: Architecture, micro_batch: int, checkpointing: bool) -> int:
        """Bytes that a step or an evaluation takes besides gradients, to the byte of what PyTorch asks for."""
        given = replace(self._given, architectures=(its,), micro_batch=micro_batch)
        batch = min(given.batch, 2 * given.backward)  # further parts take what the second does
        model = self._models[its.name]
        was, model.head = model.head, "fused" if self._fused else "plain"
        assert isinstance(model.local_expert, Body)
        model.local_expert.checkpoint(checkpointing)
        evaluated = 0 if its.name in self._evaluation else given.evaluation_batch
        try:
            with self._console.status(f"sizing a step of {its.name}"):
                found = footprint(
                    model, Mixture.program, self._samples, self._rule, self._how, batch, evaluated, micro_batch,
                    self._fused,
                )  # fmt: skip
        except Exception as error:  # whatever a library's model raises
            raise UserError(f"model {its.name!r}: a step cannot be taken: {reason(error)}") from error
        finally:
            model.head = was
        evaluation = self._evaluation.setdefault(its.name, found.evaluation)
        # While the fused head works, besides what it gives.
        slab, low = SLAB_BYTES if self._fused else 0, 2 if self._how.low else 0
        return max(found.training + slab - work(given, 1, 1, 1, low, False).gradients, evaluation)


def images(model: Mixture, given: Sizes, dataset: Dataset) -> int:
    """Likewise, but estimated, which costs less time: twice what the backward pass keeps of a batch.

    Gradients of activations are about as large as these; an evaluation keeps none.
    """
    model = copy.deepcopy(model).train()
    model.head = "plain"
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with globals_kept(), saved_tensors_hooks(keep, lambda tensor: tensor):
        # Held until the sum is taken: a storage that is let go of could lend its address to the next.
        x, y = rehearsal.blank(2, dataset.shape, dataset.outputs)
        loss, _ = model.join(model.program().run(x), y)
    count = sum(size for address, size in kept.items() if address not in own)
    del loss
    return -(-count // 2) * max(2 * given.backward, given.evaluation_batch)
