"""Which benchmarks a process is to run, and how long: what `fedmoe bench` gives it on its command line."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """Which benchmarks to run, of those that pytest collects."""

    only: str = ""
    """Those with this in their name."""
    limits: Mapping[str, Mapping[str, float]] | None = None
    """By device, "cuda" or "cpu": those of these names, in this order, each in at most so many seconds. None: all."""
    skip: Sequence[str] = field(default_factory=list)
    """None of these names."""
    ends: float | None = None
    """When the time is up, by `time.monotonic`: none begins that may need more than is left."""

    def to_json(self) -> str:
        """For the command line."""
        return json.dumps(asdict(self))

    def seconds(self, device: str, name: str) -> float | None:
        """The limit of a benchmark; None: it has none."""
        return (self.limits or {}).get(device, {}).get(name)
