"""What `fedmoe profile` prints: the figures that matter most, a table of ranges, and the findings."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedmoe.display import say, widen
from fedmoe.profiling import profile as profiles
from fedmoe.profiling.profile import Profile


def gist(console: Console, profile: Profile) -> None:
    """Print it."""
    widen(console, 120)
    gpu = profile.device is not None
    names = ["range", "count", "time", "of the rounds", *(["on the device", "by"] if gpu else [])]
    table = Table(title=Text(profile.title), title_justify="left")
    for name in names:
        table.add_column(name, justify="left" if name in ("range", "by") else "right", no_wrap=name == "range")
    for r in profile.ranges:
        inside = r.source == "uncaptured"  # of a graph, where the host is not
        own = ["", ""] if inside else [f"{1e3 * r.seconds:,.1f} ms", f"{r.share:.1%}"]
        on_device = "" if r.device_seconds is None else f"{1e3 * r.device_seconds:,.1f} ms"
        table.add_row(r.phase, str(r.count), *own, *([on_device, r.source] if gpu else []))
    console.print(table)
    p50, p95 = profiles.quantiles(profile.steps)
    share = profile.flops_per_second / profile.roof.flops_per_second
    lines = [
        f"round {profile.round_seconds:,.3f} s (median of {len(profile.rounds)}); observing costs "
        f"{profile.observing:+.1%}",
        f"{profile.samples_per_second:,.0f} samples/s while training",
        f"{profile.flops_per_second / 1e9:,.1f} GFLOP/s, {share:.0%} of the "
        f"{profile.roof.flops_per_second / 1e9:,.0f} that a large product reaches",
    ]
    if p50 is not None and p95 is not None:
        lines.append(f"a training step takes {1e3 * p50:,.2f} ms (p50), {1e3 * p95:,.2f} ms (p95)")
    moved = sum(profile.transfers.bytes.values())
    if moved and profile.transfers.copying:
        hidden = 1 - min(1.0, profile.transfers.seconds / profile.transfers.copying)
        lines.append(f"{moved / 1e6:,.1f} MB of states moved between tiers, {hidden:.0%} of the time for it hidden")
    lines += [
        f"{e.of.upper()}: {e.joules_a_round:,.1f} J a round, {e.joules_per_1000_samples:,.2f} J for 1000 samples"
        for e in profile.energy
    ]
    for line in [*lines, *profile.notes, *(f"→ {finding.text}" for finding in profile.findings)]:
        say(console, line)
