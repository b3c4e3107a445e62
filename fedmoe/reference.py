"""The plain loop: how anyone would train these clients, one after the other, eagerly; the oracle and the baseline.

Everything faster must give what this gives.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fedmoe import optimizer
from fedmoe.client import Client, measured, open_client, outgoing
from fedmoe.config import AUGMENTATIONS, Config
from fedmoe.engine.seam import Interrupted, Job, Metrics, Result, State
from fedmoe.engine.seeds import derive, generator, globals_kept, seed_globals
from fedmoe.engine.step import parts_of
from fedmoe.errors import UserError
from fedmoe.kernels.gather_oracle import draw_augmentation


class ReferenceEngine:
    """Trains and evaluates the clients of the run in folder `run`; see `fedmoe.engine.seam.Engine`.

    Every client that was ever used stays in memory. Setting `stop` makes `run` raise Interrupted after the step it is
    in; whoever set it then calls `rollback`.
    """

    def __init__(self, config: Config, run: Path, device: torch.device, stop: threading.Event | None = None) -> None:
        self.config, self.folder, self.device = config, run, device
        self.stop = stop or threading.Event()
        self._clients: dict[int, Client] = {}
        self._before: dict[int, State] = {}  # of the clients trained since the last commit
        self._changed: set[int] = set()
        self._flops_per_sample: dict[str, int] = {}

    def client(self, id: int) -> Client:
        """The client, opened on first use."""
        if id not in self._clients:
            client = open_client(self.config, id, self.folder, self.device)
            if client.model not in self._flops_per_sample:
                self._flops_per_sample[client.model] = measured(client)[0]
            self._clients[id] = client
        return self._clients[id]

    def run(self, kind: Literal["train", "evaluate"], jobs: Sequence[Job]) -> Iterator[Result]:
        """Yield a result for every job, in job order."""
        work = self._train if kind == "train" else self._evaluate
        for job in jobs:
            with globals_kept():
                result = work(self.client(job.client), job)
            yield result

    def commit(self) -> None:
        """Keep the state of every client trained since the last commit."""
        self._changed |= self._before.keys()
        self._before.clear()

    def rollback(self) -> None:
        """Return every client trained since the last commit to its state at that commit."""
        for id, state in self._before.items():
            self.client(id).load_state(state)
        self._before.clear()

    def changed(self) -> Mapping[int, Callable[[], State]]:
        """What gives copies of the states of all clients committed since this was last called, by client."""
        states = {id: partial(_given, self.client(id).state()) for id in sorted(self._changed)}
        self._changed.clear()
        return states

    def _train(self, client: Client, job: Job) -> Result:
        start, t = time.perf_counter(), self.config.training
        if optimizer.coded(t):  # a run whose plan was removed comes here
            raise UserError('training.optimizer_states is "8bit", which the plain loop does not have: restore the plan')
        before = client.state()
        at_commit = self._before.setdefault(client.id, before)
        client.receive(job.payload)
        client.mixture.train()
        epochs, size = int(job.settings["epochs"]), client.batch_size
        steps = client.training // size  # the last partial batch is dropped
        losses = torch.zeros((), device=self.device)
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        for epoch in range(epochs):
            place = (client.id, job.round, epoch)
            order = torch.randperm(client.training, generator=generator(self.config.seed, "order", *place))
            augmentations: Iterable[Tensor | None] = repeat(None)
            if (augment := AUGMENTATIONS[t.augment]) is not None:
                drawn = generator(self.config.seed, "augmentation", *place)
                augmentations = draw_augmentation(steps * size, *augment, drawn).to(self.device).split(size)
            seed_globals(derive(self.config.seed, "dropout", *place))
            batches = order.to(self.device).split(size)[:steps]
            for indices, augmentation in zip(batches, augmentations, strict=False):
                if self.stop.is_set():
                    raise Interrupted
                client.optimizer.zero_grad()
                parts = indices.chunk(parts_of(len(indices), t.micro_batch))
                changes = repeat(None) if augmentation is None else augmentation.split(len(parts[0]))
                for part, change in zip(parts, changes, strict=False):
                    x, y = client.batch(part, change)
                    loss, hits = client.program.join(client.program.run(x), y)
                    if len(parts) > 1:
                        loss = loss * (len(part) / len(indices))
                    loss.backward()
                    losses += loss.detach()
                    correct += hits
                if t.clip_norm:
                    torch.nn.utils.clip_grad_norm_(client.mixture.parameters(), t.clip_norm)
                client.optimizer.step()
        samples = epochs * steps * size
        metrics: Metrics = {
            "samples": samples,
            "flops": samples * self._flops_per_sample[client.model],
            "rolled_back": 0,
        }
        if not (bool(torch.isfinite(losses)) and client.finite()):
            client.load_state(before)
            if at_commit is before:
                del self._before[client.id]
            metrics |= {"rolled_back": 1, "seconds": time.perf_counter() - start}
            return outgoing(client.id, client.schema, job.payload, 0, metrics)
        predictions = samples * client.targets
        metrics |= {"loss": losses.item() / (epochs * steps), "accuracy": correct.item() / predictions}
        metrics["seconds"] = time.perf_counter() - start
        return outgoing(client.id, client.schema, client.payload(), client.training, metrics)

    @torch.no_grad()
    def _evaluate(self, client: Client, job: Job) -> Result:
        """With the client's own global expert, or with the job's where it brings one; neither changes the client."""
        start = time.perf_counter()
        loss = torch.zeros((), device=self.device)
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        seed_globals(derive(self.config.seed, "evaluation", client.id, job.round))
        client.mixture.eval()
        with client.lent(job.payload):
            for indices in client.held_out.split(self.config.evaluation.batch_size):
                if self.stop.is_set():
                    raise Interrupted
                x, y = client.batch(indices)
                logits = client.program.logits(client.program.run(x)).flatten(0, -2)
                loss += F.cross_entropy(logits, y.flatten(), reduction="sum")
                correct += (logits.argmax(1) == y.flatten()).sum()
        n = len(client.held_out)
        predictions = n * client.targets
        metrics: Metrics = {"accuracy": correct.item() / predictions, "loss": loss.item() / predictions}
        metrics["seconds"] = time.perf_counter() - start
        return outgoing(client.id, {}, {}, n, metrics)


def _given(state: State) -> State:
    return state
