"""The server: it samples clients, sends them theta and aggregates what they return; it sees nothing else of them."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fedmoe.config import Config, per_round, trimmed
from fedmoe.config import Server as Rule
from fedmoe.engine.seam import Job, Payload, Result, Schema, TensorSpec, violations
from fedmoe.engine.seeds import generator
from fedmoe.kernels import robust
from fedmoe.kernels.averaging import RunningMean

MOST_SAMPLES = 2**53
"""What fp64 counts to one by one: no sum of such weights, nor of fp32 numbers so weighted, is beyond its range."""


class Server:
    """Holds theta, {"theta": fp32 [P]} or, if nothing is shared, {}; decides who trains it."""

    def __init__(self, config: Config, theta: Payload) -> None:
        self.config, self.theta = config, theta

    def sample(self, number: int) -> list[int]:
        """The K = max(1, round(fraction * N)) clients of round `number`, ascending; the seed and the round decide."""
        n = self.config.federation.clients
        order = torch.randperm(n, generator=generator(self.config.seed, "sampling", number))
        return sorted(order[: per_round(self.config)].tolist())

    def jobs(self, number: int) -> list[Job]:
        """A training job for each client sampled in round `number`."""
        settings = {"epochs": self.config.federation.epochs}
        return [Job(client, number, self.theta, settings) for client in self.sample(number)]

    def aggregate(self, results: Iterable[Result]) -> Payload:
        """The theta that these results of a round come to; it is not taken on yet."""
        arrivals = Arrivals(self.config.server, self.theta)
        for result in results:
            arrivals.add(result)
        return arrivals.theta()


class Arrivals:
    """What comes back in a round, checked as it arrives, and aggregated. theta_k is a client's, theta the server's.

    `mean` and `uniform` are summed up at once and hold nothing of a client; the robust rules hold all until the end.
    Each tensor of the payload is aggregated by itself.
    """

    def __init__(self, rule: Rule, theta: Payload) -> None:
        self.rule = rule
        self.rejected: dict[int, str] = {}
        """Clients whose result was not fit to count, and why."""
        self.kept = ""
        """Why `theta` found too little to go by, if so."""
        self._theta = theta
        self._schema = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in theta.items()}
        self._means = {name: RunningMean() for name in theta}
        self._held: list[tuple[Payload, float]] = []
        self._count = 0

    def add(self, result: Result) -> None:
        """Take a result in. One of weight 0 asks to be left out, and one that is not fit to count is."""
        if reason := unfit(result, self._schema):
            self.rejected[result.client] = reason
        elif result.weight > 0:
            self._count += 1
            if self.rule.aggregation in ("mean", "uniform"):
                weight = 1.0 if self.rule.aggregation == "uniform" else result.weight
                for name, mean in self._means.items():
                    mean.add(result.payload[name], weight)
            else:
                self._held.append((result.payload, result.weight))

    def theta(self) -> Payload:
        """The new theta, by `server.aggregation`; the old one where there is nothing, or too little, to go by."""
        least = 2 * self.rule.byzantine + 3 if "krum" in self.rule.aggregation else 1
        if self._theta and self._count < least:
            results = "result" if least == 1 else "results"
            self.kept = f"{self.rule.aggregation} needs {least} {results}, {self._count} were fit to count"
            return self._theta
        if self.rule.aggregation in ("mean", "uniform"):
            return {name: mean.mean() for name, mean in self._means.items()}
        weights = [weight for _, weight in self._held]
        return {n: _robust(self.rule, [p[n] for p, _ in self._held], weights, t) for n, t in self._theta.items()}


def unfit(result: Result, schema: Schema) -> str:
    """Why a result cannot count: its shape, dtype or numbers; empty if it can."""
    if broken := violations(result.payload, schema):
        return "; ".join(broken)
    if not 0 <= result.weight <= MOST_SAMPLES:  # nor NaN
        return f"its weight is {result.weight}, must be a number of samples, from 0 to 2^53"
    for name, value in result.metrics.items():
        if not all(math.isfinite(number) for number in (value if isinstance(value, list) else [value])):
            return f"its {name} is {value}, must be finite"
    for name, tensor in result.payload.items():
        # One pass, without a tensor of booleans: NaN is both the least and the most.
        if tensor.numel() and not all(bool(extreme.isfinite()) for extreme in torch.aminmax(tensor)):
            count = int((~tensor.isfinite()).sum())
            return f"{count} of the {tensor.numel()} numbers of {name!r} are not finite"
    return ""


def _robust(rule: Rule, updates: Sequence[Tensor], weights: Sequence[float], theta: Tensor) -> Tensor:
    """One tensor, by a rule that holds all updates; native where it can be, which gives the same."""
    native, _ = robust.robust_native_supported(updates)
    count = len(updates)
    if rule.aggregation == "median":
        return (robust.median_native if native else robust.median)(updates)
    if rule.aggregation == "trimmed_mean":
        # At least one: a client that was left out already must not leave the others untrimmed.
        out = min(max(trimmed(rule.trim, count), 1), (count - 1) // 2)
        return (robust.trimmed_mean_native if native else robust.trimmed_mean)(updates, out)
    if rule.aggregation == "clipped_mean":
        return robust.clipped_mean(updates, weights, theta, rule.clip_norm or None, rule.clip_factor)
    chosen = min(rule.chosen or count - rule.byzantine, count) if rule.aggregation == "multi_krum" else 1
    mean = RunningMean()
    for k in robust.krum(updates, rule.byzantine, chosen):
        mean.add(updates[k], 1.0)
    return mean.mean()
