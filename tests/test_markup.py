"""Numbers on a profile's page: three digits, a prefix, a unit."""

import pytest

from fedmoe.profiling import markup


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.0, "0 s"), (6.446e-3, "6.45 ms"), (0.9996, "1.00 s"), (9.996e-4, "1.00 ms"), (83.4, "83.4 s"),
        (1234.5, "1,234 s"), (3e-9, "3.00 ns"), (-0.5, "-500 ms"),
    ],
)  # fmt: skip
def test_times(value: float, said: str) -> None:
    assert markup.seconds(value).replace(markup.THIN, " ") == said


@pytest.mark.parametrize(
    ("value", "said"), [(0.0, "0.0%"), (0.451, "45%"), (0.06, "6.0%"), (0.0031, "0.31%"), (1.34, "134%")]
)
def test_shares(value: float, said: str) -> None:
    assert markup.percent(value) == said


@pytest.mark.parametrize(
    ("value", "unit", "said"),
    [
        (8.04e6, "bytes", "8.04 MB"), (2.1e10, "bytes/s", "21.0 GB/s"), (1755.0, "MHz", "1,755 MHz"),
        (93.0, "%", "93.0%"), (1.84, "s", "1.84 s"), (0.0, "W", "0 W"), (5.0, "", "5.00"), (7.7e6, "J", "7.70 MJ"),
    ],
)  # fmt: skip
def test_quantities(value: float, unit: str, said: str) -> None:
    assert markup.quantity(value, unit).replace(markup.THIN, " ") == said
