"""Clients that send what they should not, simulated at the seam to the server, to try rules of aggregation on."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from fedmoe.config import Attack, Config
from fedmoe.engine.seam import Job, Result

SENT = {"scale": "θ + {0:g} (θ_k − θ)", "flip": "θ − {0:g} (θ_k − θ)", "nan": "NaN"}
"""What bad clients send, by `attack.kind`: θ is what the server sent them, θ_k what they trained."""


def attacked(attack: Attack, jobs: Sequence[Job], results: Iterator[Result]) -> Iterator[Result]:
    """The results of these training jobs as they reach the server: all as they are, but for the payload of bad clients.

    A bad client trains as any other, its private state is its own, and the weight and the metrics it sends are true.
    """
    return results if attack.kind == "none" else map(partial(_sent, attack), jobs, results)


def described(config: Config) -> str:
    """Who sends what, in a clause; empty where the simulation has no effect."""
    attack = config.attack
    if attack.kind == "none" or config.method == "local":  # which shares nothing
        return ""
    who = ", ".join(map(str, attack.clients[:20])) + ", ..." * (len(attack.clients) > 20)
    sent = SENT[attack.kind].format(attack.factor)
    return f"{len(attack.clients)} of {config.federation.clients} clients ({who}) send {sent} instead of θ_k"


def _sent(attack: Attack, job: Job, result: Result) -> Result:
    if result.client not in attack.clients or not result.weight:  # one that was rolled back sends nothing
        return result
    payload = {}
    for name, trained in result.payload.items():
        got = job.payload[name].to(trained.device)
        factor = {"scale": attack.factor, "flip": -attack.factor, "nan": torch.nan}[attack.kind]
        payload[name] = got + factor * (trained - got)
    return replace(result, payload=payload)
