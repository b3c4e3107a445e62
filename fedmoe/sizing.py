"""What steps of a federation's models take of memory: of language models tried out without any, of images estimated."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

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
) -> tuple[Way, ...]:
    """How a step of text may be taken: whole, if that fits on `on`; or in ever smaller parts; or so, checkpointed.

    With activation checkpointing only where the smallest parts do not fit without it, or it is asked for. Raises
    UserError where a step cannot be taken at all.
    """
    asked, micro_batch = config.model.activation_checkpointing, config.training.micro_batch
    counts = [micro_batch] if micro_batch else [given.batch >> i for i in range(given.batch.bit_length())]

    def whole(taken: Sequence[int]) -> dict[int, int]:
        return {micro_batch: taken[0]}

    def parts(taken: Sequence[int]) -> dict[int, int]:
        two, three = taken  # each further sample takes as much more as the third does
        return {0 if count == given.batch else count: two + (count - 2) * (three - two) for count in counts}

    trials = _Trials(config, models, given, dataset, how, fused, on)
    if found := trials.ways(asked == "on", [given.batch], micro_batch, whole, fitting=True):
        return found
    if asked == "auto" and (found := trials.ways(False, [2, 3], 0, parts, fitting=True)):
        return found
    return trials.ways(asked != "off", [2, 3], 0, parts, fitting=False)


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

    def ways(
        self,
        checkpointing: bool,
        batches: Sequence[int],
        micro_batch: int,
        parts: Callable[[Sequence[int]], dict[int, int]],
        *,
        fitting: bool,
    ) -> tuple[Way, ...]:
        """What `parts` makes of what steps of these batches take: bytes by samples in a backward pass, the least last.

        If `fitting`, none unless the last fits.
        """
        given = self._given
        found: tuple[Way, ...] = ()
        taken: dict[str, dict[int, int]] = {}
        # What does not fit is found soonest with the largest.
        for kind in sorted(given.architectures, key=lambda a: a.trainable + a.frozen, reverse=True):
            taken[kind.name] = parts(self._taken(kind, batches, micro_batch, checkpointing))
            known = [a for a in given.architectures if a.name in taken]
            found = tuple(
                Way(
                    micro_batch=part, checkpointing=checkpointing, activations=tuple(taken[a.name][part] for a in known)
                )
                for part in taken[kind.name]
            )
            if fitting and not self._fits(replace(given, architectures=tuple(known)).taken(found[-1])):
                return ()
        return found

    def _fits(self, taken: Sizes) -> bool:
        """Whether each kind of client can train so by itself."""
        gpu, low = self._on.device == "cuda", 2 if self._how.low else 0
        free = self._on.device_free if gpu else self._on.host_available
        return work(taken, 1, 1, 1, low, gpu).total <= free * 4 // 5

    def _taken(self, its: Architecture, batches: Sequence[int], micro_batch: int, checkpointing: bool) -> list[int]:
        """Bytes that steps of these batches or an evaluation take besides gradients, to the byte of what PyTorch asks.

        Raises UserError where a step cannot be taken.
        """
        model = self._models[its.name]
        was, model.head = model.head, "fused" if self._fused else "plain"
        assert isinstance(model.local_expert, Body)
        model.local_expert.checkpoint(checkpointing)
        evaluated = 0 if its.name in self._evaluation else self._given.evaluation_batch
        try:
            with self._console.status(f"sizing a step of {its.name}"):
                found = footprint(
                    model, Mixture.program, self._samples, self._rule, self._how, batches, evaluated, micro_batch,
                    self._fused,
                )  # fmt: skip
        except Exception as error:  # whatever a library's model raises
            raise UserError(f"model {its.name!r}: a step cannot be taken: {reason(error)}") from error
        finally:
            model.head = was
        evaluation = self._evaluation.setdefault(its.name, found.evaluation)
        # While the fused head works, besides what it gives.
        slab, low = SLAB_BYTES if self._fused else 0, 2 if self._how.low else 0
        gradients = work(replace(self._given, architectures=(its,)), 1, 1, 1, low, False).gradients
        return [max(training + slab - gradients, evaluation) for training in found.training]


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
