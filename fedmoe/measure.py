"""What a run is judged by on held-out samples: of images the accuracy, of text the perplexity."""

import math
from dataclasses import dataclass
from typing import Literal

from fedmoe.config import Config
from fedmoe.errors import UsageError

LARGEST = 700.0
"""Loss of a token up to which e to its power is a finite number."""


@dataclass(frozen=True, slots=True)
class Measure:
    """A measure and how it is shown.

    Means, differences and intervals are taken of values that add up: of the accuracy itself, of the logarithm of the
    perplexity, which is the test loss of a token. `level` makes of such a value what is shown.
    """

    name: Literal["accuracy", "perplexity"]
    better: Literal["higher", "lower"]

    @property
    def one(self) -> str:
        """Its name with an article."""
        return f"{'an' if self.name == 'accuracy' else 'a'} {self.name}"

    @property
    def worst(self) -> str:
        """What the client that does worst is called."""
        return "lowest" if self.better == "higher" else "highest"

    def gain(self, value: float) -> float:
        """More is better: of values, levels and differences."""
        return value if self.better == "higher" else -value

    def level(self, value: float) -> float:
        """The accuracy, or the perplexity."""
        return math.exp(min(value, LARGEST)) if self.name == "perplexity" else value

    def shift(self, difference: float) -> float:
        """What a difference of values makes of levels: so much accuracy more, or so many percent perplexity more."""
        return 100 * math.expm1(min(difference, LARGEST)) if self.name == "perplexity" else difference

    def figure(self, level: float, digits: int = 3) -> str:
        """A level in figures: accuracy with so many digits."""
        if self.name == "accuracy":
            return f"{level:.{digits}f}"
        return f"{level:,.2f}" if level < 1e6 else f"{level:.3g}"

    def change(self, difference: float) -> str:
        """A difference of values in figures."""
        shift = self.shift(difference)
        if self.name == "accuracy":
            return f"{shift:+.4f}"
        return f"{shift:+,.2f} %" if shift < 1e4 else f"{shift:+.3g} %"

    def spread(self, deviation: float, digits: int = 3) -> str:
        """A standard deviation of values in figures: of perplexity, by how many percent it lies higher there."""
        return f"± {self.shift(deviation):,.1f} %" if self.name == "perplexity" else f"± {deviation:.{digits}f}"

    def check_target(self, target: float | None) -> None:
        """Raise UsageError unless `target` is a level that there is, or None."""
        if target is None or (0 < target <= 1 if self.name == "accuracy" else 1 <= target < math.inf):
            return
        must = "an accuracy, more than 0 and at most 1" if self.name == "accuracy" else "a perplexity, 1 or more"
        raise UsageError(f"--target is {target:g}, must be {must}")


ACCURACY = Measure("accuracy", "higher")
PERPLEXITY = Measure("perplexity", "lower")


def measure(config: Config) -> Measure:
    """That of a run's kind of data."""
    return PERPLEXITY if config.data.kind == "text" else ACCURACY
