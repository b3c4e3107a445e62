"""The profile's page: everything that is known is on it, nothing else, nothing that runs or is fetched."""

import base64
import gzip
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import pytest
from plotly.offline import get_plotlyjs

from fedmoe.profiling import figures, markup, timeline
from fedmoe.profiling.page import page
from fedmoe.profiling.profile import BatchSize, DeviceUse, Energy, Finding, Memory, Profile, Range, Round, Transfers
from fedmoe.profiling.roofline import Ceilings, Point
from fedmoe.profiling.shell import POLICY
from fedmoe.profiling.spans import Span
from fedmoe.profiling.trace import Series

HOSTILE = "<img src=x onerror=alert(1)> \"' & </script><script>alert(2)</script>"
VOID = {"meta", "link", "wbr", "br"}


class Parsed(HTMLParser):
    """What a browser would find."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.scripts: list[str] = []
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "script":
            self.scripts[-1] += data
        elif "style" not in self._open:
            self.words += data

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]

    @property
    def sections(self) -> list[str | None]:
        return [attributes["id"] for attributes in self.all("section")]

    @property
    def figures(self) -> dict[str, Any]:
        return dict(json.loads(self.scripts[0])) if self.scripts else {}


def span(phase: str, start: float, end: float, lane: int = 0, **more: Any) -> Span:
    return Span(phase, lane, (), start, end, **more)


def minimal() -> Profile:
    return Profile(
        title="one",
        environment={},
        plan={},
        config={},
        rounds=[Round(0.5, 0.4, 0.1, 1000, 0.0)],
        observed_seconds=[],
        steps=[],
        ranges=[],
        device=None,
        transfers=Transfers({}, 0.0, 0.0, 0.0),
        memory=[],
        meters={},
        missing={},
        energy=[],
        roof=Ceilings(1e10, 1e11),
        operators=[],
        batches=[],
    )


def full() -> Profile:
    return Profile(
        title="fedmoe on digits",
        environment={
            "gpu": "NVIDIA H200",
            "cpu": "EPYC",
            "cores": 16,
            "commit": 40 * "a" + " with changes",
            "apex": None,
        },
        plan={"precision": "bf16", "predicted": {"samples": 1_423_224}, "reasons": {"precision": "it has bf16"}},
        config={"training.lr": 0.02, "data.image": "", "model.local": ["cnn-1", "cnn-2"]},
        rounds=[Round(0.412, 0.4, 0.01, 50_000, 1e13), Round(0.42, 0.4, 0.02, 50_000, 1e13)],
        observed_seconds=[0.43, 0.45],
        steps=[0.001, 0.002, 0.003],
        ranges=[
            Range("step", 300, 0.6, 0.7, 0.5, "events"),
            Range("client", 20, 0.25, 0.3, None, "host"),
            Range("backward", 300, 0.0, 0.0, 0.3, "uncaptured"),
        ],
        device=DeviceUse(0.87, 0.42),
        transfers=Transfers({"host in": 48_300_000, "file in": 0}, 0.044, 0.09, 0.0),
        memory=[Memory("samples", 1_423_224, "device"), Memory("momentum", 16_000_000, "host")],
        meters={
            "gpu_power": {"unit": "W", "mean": 612.3, "max": 699.8, "description": "of the board"},
            "gpu_energy": {"unit": "J", "increase": 1000.0, "per_second": 555.6, "source": "integrated from gpu_power"},
            "cpu_time": {"unit": "s", "increase": 1.84, "per_second": 0.98, "source": "counter", "note": ""},
            "gpu_throttle": {"shares": {"power cap": 0.31}, "mean": None},
            "gpu_clocks": {"shares": {}, "note": ""},
            "gpu_unknown": {"mean": None},
        },
        missing={"gpu_pcie_tx": "this GPU does not give it"},
        energy=[Energy("gpu", 250.0, 5.0, "integrated from gpu_power"), Energy("cpu", 20.0, 0.4, "counter")],
        roof=Ceilings(4e12, 7e14),
        operators=[
            Point("mm", "float32[64, 500] float32[500, 10]", 10, 0.004, 10**9, 10**7, 0.13),
            Point("relu", "float32[64, 500]", 10, 0.002, 0, 10**8, 0.012),
        ],
        batches=[BatchSize(64, 0.0003), BatchSize(128, 0.0004)],
        notes=["steps were replayed"],
        findings=[Finding("transfer", "5% of the round is waiting", 0.05, {"share": 0.051, "bytes": 48.3e6})],
    )


SPANS = [
    span("round", 10.0, 10.4, device=(1.0, 1.4)),
    span("round", 11.0, 11.4, device=(2.0, 2.45)),
    span("step", 11.1, 11.2, 1, stream=7, device=(2.11, 2.3)),
]
SERIES: dict[str, Series] = {"gpu_power": ([9.0, 9.5, 10.0], [600.0, None, 699.8]), "gpu_pcie_tx": ([9.0], [None])}


@pytest.fixture(scope="module")
def shown() -> Parsed:
    return Parsed(page(full(), SPANS, SERIES))


def test_each_section_is_there_in_order(shown: Parsed) -> None:
    assert shown.sections == [
        "findings", "numbers", "ranges", "time", "roof", "operators", "sizes", "memory", "meters", "setup",
    ]  # fmt: skip
    assert len(shown.all("h1")) == 1 and len(shown.all("h2")) == len(shown.sections)
    assert set(shown.figures) == {f"plot-{n}" for n in ("ranges", "timeline", "roofline", "batches", "meter-0")}
    assert shown.figures.keys() == {div["id"] for div in shown.all("div") if div.get("role") == "img"}
    ids = [attributes["id"] for _, attributes in shown.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert [a["href"] for a in shown.all("a")] == [f"#{name}" for name in shown.sections]


def test_what_is_not_known_is_not_there() -> None:
    source = page(minimal(), [], {})
    shown = Parsed(source)
    assert shown.sections == ["numbers", "setup"] and shown.scripts == []  # without plots no Plotly
    assert "500 ms" in plain(shown) and "2,500" in plain(shown)
    assert "None" not in shown.words and "FLOP" not in shown.words and len(source) < 20_000


def plain(shown: Parsed) -> str:
    return shown.words.replace(markup.THIN, " ")


def test_figures_are_there(shown: Parsed) -> None:
    words = plain(shown)
    for said in (
        "NVIDIA H200 · EPYC (16 cores) · commit aaaaaaaaaa with changes",
        "5% of the round is waiting", "share 5.1%", "bytes 48.3 MB", "Steps were replayed",
        "416 ms", "412 ms to 420 ms", "125,000", "25.0 TFLOP/s", "3.6% of the 700 TFLOP/s",
        "2.00 ms", "p95 is 2.90 ms", "GPU energy a round250 J", "5.00 J per 1000 samples; integrated from gpu power",
        "20.0 J", "400 mJ per 1000 samples", "1,000 J", "556 J/s", "1.84 s", "0.980 s/s",
        "gpu clocksnone", "87%", "42%", "+5.8%",
        "round without graphs", "CUDA events", "48.3 MB", "44.0 ms, 5.0% of the rounds",
        "1.42 MB", "16.0 MB", "612 W", "power cap 31%", "this GPU does not give it", "it has bf16", "cnn-1, cnn-2",
        "250 GFLOP/s", "50.0 GB/s",
    ):  # fmt: skip
        assert said in words, said
    assert "None" not in words and "gpu unknown" not in words and "file in" not in words and "nan" not in words


def test_nothing_is_fetched() -> None:
    source = page(full(), SPANS, SERIES)
    shown = Parsed(source)
    [_, library, _] = shown.scripts
    assert gzip.decompress(base64.b64decode(library, validate=True)).decode() == get_plotlyjs()
    own = source.replace(library, "")
    assert len(own) < 100_000
    assert [m["content"] for m in shown.all("meta") if m.get("http-equiv")] == [POLICY]
    assert POLICY.startswith("default-src 'none'") and "http" not in POLICY
    for _, attributes in shown.tags:
        for name in ("src", "href", "srcset", "action", "data", "poster", "background"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), attributes
    assert not re.search(r"https?:|@import|url\(|\bfetch\(|XMLHttpRequest|\bimport\b|WebSocket|sendBeacon", own)
    assert "showSendToCloud: false" in own  # or Plotly offers to upload


def test_hostile_names_are_only_text() -> None:
    p = full()
    p.title, p.notes, p.environment = HOSTILE, [HOSTILE], {"gpu": HOSTILE}
    p.plan, p.config = {HOSTILE: HOSTILE}, {HOSTILE: 1}
    p.ranges = [replace(r, phase=HOSTILE) for r in p.ranges]
    p.memory = [replace(m, what=HOSTILE) for m in p.memory]
    p.operators = [replace(o, name=HOSTILE, shapes=HOSTILE) for o in p.operators]
    p.findings = [Finding(HOSTILE, HOSTILE, 0.1, {HOSTILE: 2.0})]
    p.meters = {HOSTILE: {"unit": HOSTILE, HOSTILE: 1.0, "what": HOSTILE, "flags": {HOSTILE: 0.5}}}
    p.energy = [Energy(HOSTILE, 1.0, 1.0, HOSTILE)]
    p.missing, p.transfers = {HOSTILE: HOSTILE}, Transfers({HOSTILE: 5}, 0.0, 0.0, 0.0)
    shown = Parsed(page(p, [*SPANS, span(HOSTILE, 11.0, 11.1)], {HOSTILE: ([1.0, 2.0], [1.0, 2.0])}))
    assert not shown.all("img") and len(shown.scripts) == 3
    assert "onerror" not in {name for _, attributes in shown.tags for name in attributes}
    assert shown.words.count(HOSTILE) > 15
    for plot in shown.figures.values():  # Plotly knows some HTML, too
        assert "<img" not in json.dumps(plot)
    assert "&lt;img" in json.dumps(shown.figures["plot-roofline"])


def test_what_is_not_finite_is_valid_json() -> None:
    p = full()
    p.meters["gpu_power"]["mean"] = float("nan")
    p.operators = [replace(p.operators[0], share=float("inf"))]
    shown = Parsed(page(p, SPANS, {"a": ([0.0, 1.0], [float("inf"), 1.0])}))
    assert shown.figures["plot-meter-0"]["data"][0]["y"] == [None, 1.0]


def test_the_timeline_is_of_the_last_round(shown: Parsed) -> None:
    bars = {trace["name"]: trace for trace in shown.figures["plot-timeline"]["data"]}
    assert list(bars) == ["round", "step"]
    assert bars["round"]["base"] == [0.0, 0.0] and bars["round"]["x"] == pytest.approx([400, 450])
    assert bars["step"]["base"] == pytest.approx([100, 110]) and bars["step"]["x"] == pytest.approx([100, 190])
    names = shown.figures["plot-timeline"]["layout"]["yaxis"]["ticktext"]
    assert names == ["host<br>lane 0", "host<br>lane 1", "device<br>stream 0", "device<br>stream 1"]


def test_what_is_within_is_below_and_what_reaches_beyond_is_cut() -> None:
    spans = [
        span("round", 1.0, 2.0), span("client", 1.0, 1.5), span("step", 1.0, 1.2), span("step", 1.2, 1.4),
        span("client", 1.5, 2.0), span("transfer out", 0.9, 1.1, 1),
    ]  # fmt: skip
    [(_, levels), (_, other)], device = timeline.last_round(spans)
    assert [[bar.phase for bar in row] for row in levels] == [["round"], ["client", "client"], ["step", "step"]]
    assert other[0][0].start == 0 and other[0][0].seconds == pytest.approx(0.1) and not device


def test_thousands_of_spans_become_fewer_bars_that_take_as_long() -> None:
    spans = [span("round", 0.0, 10.0)]
    for i in range(8000):
        at = i / 1000
        spans += [span("step", at, at + 4e-4), span("batch", at + 5e-4, at + 7e-4)]
    spans.append(span("averaging", 9.0, 9.5))
    [track], _ = timeline.last_round(spans)
    [(_, levels)], short = timeline.thinned([track])
    assert short > 0 and sum(map(len, levels)) <= timeline.MOST
    for phase, seconds, count in (("step", 3.2, 8000), ("batch", 1.6, 8000), ("averaging", 0.5, 1), ("round", 10.0, 1)):
        bars = [bar for row in levels for bar in row if bar.phase == phase]
        assert sum(bar.seconds for bar in bars) == pytest.approx(seconds) and sum(b.count for b in bars) == count
    for row in levels:
        assert all(a.end <= b.start + 1e-9 for a, b in pairwise(row))
    source = page(minimal(), spans, {})
    assert len(source) < 3_000_000
    assert "16,002 spans, drawn as" in Parsed(source).words


def test_few_spans_are_drawn_one_by_one(shown: Parsed) -> None:
    assert "drawn as" not in shown.words


def test_the_roofline_has_what_computes_and_both_ceilings() -> None:
    p = full()
    plot = figures.roofline(p.operators, p.roof)
    assert plot is not None and [name for name, _ in plot.legend] == [trace["name"] for trace in plot.data]
    copy, product, *operators = plot.data
    assert copy["y"][1] == product["y"][0] == product["y"][1] == 7e14
    assert copy["y"][0] == pytest.approx(copy["x"][0] * 4e12) and copy["x"][1] == 7e14 / 4e12
    assert [trace["name"] for trace in operators] == ["mm"]
    assert operators[0]["x"] == [100] and operators[0]["y"] == [pytest.approx(2.5e11)]
    assert figures.roofline(p.operators[1:], p.roof) is None
    many = [replace(p.operators[0], name=f"operator {i}") for i in range(20)]
    plot = figures.roofline(many, p.roof)
    assert plot is not None and plot.legend[-1][0] == "13 others" and len(plot.data) == 2 + figures.NAMED + 1


def test_a_meter_keeps_its_peaks_and_its_gaps() -> None:
    times = [i / 1000 for i in range(10_000)]
    values: list[float | None] = [1.0] * 10_000
    values[5003], values[7000:8000] = 99.0, [None] * 1000
    plot = figures.meter(0, "gpu power", (times, values), "W", 0.0)
    assert plot is not None
    y = plot.data[0]["y"]
    assert (
        len(y) <= 2 * figures.POINTS
        and 99.0 in y
        and None in y
        and "99.0 W" in plot.data[0]["customdata"][y.index(99.0)].replace(markup.THIN, " ")
    )
    assert figures.meter(0, "gpu power", ([1.0], [None]), "W", 0.0) is None


def test_phases_keep_their_colors() -> None:
    colors = figures.palette(["of another program", "step", "round"])
    assert list(colors) == ["round", "step", "of another program"] and colors["step"] == figures.COLORS["step"]
