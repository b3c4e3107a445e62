"""The server: it samples clients, sends them theta and averages what they return; it sees nothing else of them."""

import torch
from torch import Tensor

from fedmoe.config import Config
from fedmoe.engine.seam import Job, Payload, Result
from fedmoe.engine.seeds import generator
from fedmoe.kernels.averaging import weighted_mean, weighted_mean_native, weighted_mean_native_supported


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

    def average(self, results: list[Result]) -> Payload:
        """theta = sum of (n_k / sum n) theta_k, or with equal weights (`uniform`), over the results of weight > 0.

        With no such result theta stays as it is.
        """
        counted = [r for r in results if r.weight > 0]
        if not counted:
            return self.theta
        uniform = self.config.federation.aggregation == "uniform"
        weights = [1.0 if uniform else r.weight for r in counted]
        return {name: _mean([r.payload[name] for r in counted], weights) for name in self.theta}


def per_round(config: Config) -> int:
    """K, the number of clients in a round."""
    return max(1, round(config.federation.fraction * config.federation.clients))


def _mean(updates: list[Tensor], weights: list[float]) -> Tensor:
    """The native mean where it can, which has the same bits and makes one pass over memory; else the plain one."""
    supported, _ = weighted_mean_native_supported(updates)
    return (weighted_mean_native if supported else weighted_mean)(updates, weights)
