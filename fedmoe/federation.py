"""The run's federation, as an engine is given it: its samples, its members, and the one door out of them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fedmoe import mixture, optimizer
from fedmoe.client import Client, load_data, measured, open_client, outgoing
from fedmoe.config import AUGMENTATIONS, Config
from fedmoe.engine.member import Member, Samples
from fedmoe.engine.program import Program
from fedmoe.engine.seam import Metrics, Payload, Result, State
from fedmoe.mixture import Mixture
from fedmoe.partition import Split


class Federation:
    """The clients of the run in folder `run`; see `fedmoe.engine.member.Federation`."""

    def __init__(self, config: Config, run: Path) -> None:
        self._config, self._run = config, run
        dataset = load_data(config.data, config.seed)
        self._split = Split.load(run / "partition.safetensors")
        self._outputs = dataset.outputs
        self._measured: dict[str, tuple[int, tuple[str, ...]]] = {}
        t = config.training
        drawn = AUGMENTATIONS[t.augment]
        self.samples = Samples(dataset.inputs, dataset.labels, config.data.mean, config.data.std, drawn)
        self.optimizer, self.micro_batch = optimizer.rule(t), t.micro_batch
        self.seed, self.evaluation_batch = config.seed, config.evaluation.batch_size

    def open(self, client: int) -> tuple[Member, Program, State]:
        """The member, a program of its architecture, and its state as the last checkpoint has it."""
        opened = self._opened(self._config, client, True)
        return self._member(opened), opened.program, opened.state()

    def program(self, client: int) -> Program:
        """Another program of its architecture, untrained; for text, where it may be large, without memory."""
        if self._config.data.kind != "text":
            return self._opened(self._config, client, False).program
        model = self._config.model.local[client % len(self._config.model.local)]
        if model not in self._measured:
            self._opened(self._config, client, False)
        with torch.device("meta"):
            made = mixture.build(self._config, client, self.samples.shape, self._outputs)
        program = made.program()
        self._without_gradient(made, model)
        return program

    def batchable(self, client: int) -> Program:
        """A program of the client's architecture with the plain head: vmap runs the fused one row by row."""
        config = replace(self._config, engine=replace(self._config.engine, head="plain"))
        return self._opened(config, client, False).program

    def pack(self, theta: Sequence[Tensor]) -> Payload:
        """The payload {"theta": fp32 [P]}, a copy, on the tensors' device."""
        return mixture.pack(theta)

    def unpack(self, payload: Payload, theta: Sequence[Tensor]) -> None:
        """Write the payload's theta there."""
        mixture.unpack(payload, theta)

    def outgoing(
        self, kind: Literal["train", "evaluate"], member: Member, payload: Payload, weight: float, metrics: Metrics
    ) -> Result:
        """By `fedmoe.client.outgoing`, and by it alone; nothing but metrics leaves an evaluation."""
        return outgoing(member.id, member.schema if kind == "train" else {}, payload, weight, metrics)

    def _opened(self, config: Config, client: int, trained: bool) -> Client:
        opened = open_client(config, client, self._run, torch.device("cpu"), trained)
        if opened.model not in self._measured:
            self._measured[opened.model] = measured(opened)
        self._without_gradient(opened.mixture, opened.model)
        return opened

    def _without_gradient(self, made: Mixture, model: str) -> None:
        """An optimizer passes over parameters that get no gradient, and so must a kernel over all of them."""
        for name in self._measured[model][1]:
            made.get_parameter(name).requires_grad_(False)

    def _member(self, client: Client) -> Member:
        return Member(
            id=client.id,
            architecture=client.model,
            samples=torch.cat([self._split.train(client.id), self._split.test(client.id)]),
            training=client.training,
            batch_size=client.batch_size,
            flops=self._measured[client.model][0],
            schema=client.schema,
            finite=tuple(f"model/{name}" for name in client.finite_names),
        )
