"""What a profile says in plain words: what takes time that need not be taken, how much, and what to do."""

from collections.abc import Iterator

from fedmoe.profiling.profile import Finding, Profile

NOTABLE = 0.05
"""Share of a round from which something is worth a sentence."""
ASKED = ("idle", "clocks set by the user")
"""Reasons for a low clock that hold nothing back."""
SCALES = 1.5
"""How many times the samples a second a larger batch has to give."""


def find(profile: Profile) -> list[Finding]:
    """All findings, the largest first; one that says so if there is none."""
    found = sorted(_all(profile), key=lambda finding: -finding.share)
    if found:
        return found
    steps = _in_steps(profile)
    return [Finding("nothing", f"nothing stands out: {steps:.0%} of the round are steps", 0.0, {"steps": steps})]


STEP = ("global", "local", "gate", "header", "backward", "optimizer")


def _in_steps(p: Profile) -> float:
    """Share of the rounds: of a GPU's time, where the host only launches them."""
    return p.share("step", "batch", *STEP) if p.device is None else p.device.busy


def _all(p: Profile) -> Iterator[Finding]:
    yield from _transfers(p)
    yield from _data(p)
    yield from _batch(p)
    yield from _bookkeeping(p)
    yield from _evaluation(p)
    yield from _device(p)
    yield from _throttling(p)


def _transfers(p: Profile) -> Iterator[Finding]:
    share = p.transfers.seconds / sum(p.observed_seconds)
    if share >= NOTABLE:
        files = p.transfers.file_seconds / sum(p.observed_seconds)
        moved = sum(p.transfers.bytes.values())
        where = "engine.host_memory_mb" if p.device is None or files > share / 2 else "engine.device_memory_mb"
        cure = f"give them more memory ({where})" if moved else "longer rounds (federation.epochs) spread it"
        text = (
            f"{share:.0%} of the round is waiting for clients' states ({files:.0%} for files), "
            f"{moved / 1e6:,.0f} MB of which came from another tier or went there: {cure}"
        )
        yield Finding("transfer", text, share, {"share": share, "files": files, "bytes": float(moved)})


def _data(p: Profile) -> Iterator[Finding]:
    share = p.share("batch")
    inside = next((r for r in p.ranges if r.phase == "batch" and r.source == "uncaptured"), None)
    if inside is not None and inside.device_seconds is not None:
        step = sum(r.device_seconds or 0 for r in p.ranges if r.source == "uncaptured")
        share = _in_steps(p) * inside.device_seconds / step if step else 0.0
    if share >= NOTABLE:
        on_host = p.plan.get("data") == "host" and p.device is not None
        cure = 'keep the samples on the device (engine.data = "device")'
        if not on_host:
            cure = "larger batches (training.batch_size) are gathered less often"
        text = f"{share:.0%} of the round is making batches: {cure}"
        yield Finding("data", text, share, {"share": share})


def _batch(p: Profile) -> Iterator[Finding]:
    if len(p.batches) < 2:
        return
    own, best = p.batches[0], max(p.batches, key=lambda batch: batch.rate)
    gain = best.rate / own.rate
    if gain >= SCALES:
        text = (
            f"batches of {own.size} leave the hardware waiting: a step of {best.size} trains {gain:.1f} times the "
            f"samples a second ({best.rate:,.0f} against {own.rate:,.0f}): raise training.batch_size, or train clients "
            "together (engine.cohort)"
        )
        yield Finding("batch", text, 1 - 1 / gain, {"gain": gain, "size": own.size, "larger": best.size})


def _bookkeeping(p: Profile) -> Iterator[Finding]:
    share = p.share("client", "round", "averaging")
    if share >= NOTABLE:
        text = (
            f"{share:.0%} of the round is neither steps nor transfers: opening clients, orders of samples, averaging, "
            "metrics; longer rounds (federation.epochs) spread it"
        )
        yield Finding("bookkeeping", text, share, {"share": share})


def _evaluation(p: Profile) -> Iterator[Finding]:
    seen = [r.evaluate_seconds for r in p.rounds if r.evaluated]
    if not seen:
        return
    every = int(p.config.get("evaluation.every", 1))
    once = sum(seen) / len(seen) / every
    share = once / (once + sum(r.seconds - r.evaluate_seconds for r in p.rounds) / len(p.rounds))
    if share >= 0.3:
        often = f"every {every} rounds" if every > 1 else "every round"
        text = (
            f"{share:.0%} of a run is evaluation, {often}: evaluate less often (evaluation.every) or fewer clients "
            "(evaluation.clients)"
        )
        yield Finding("evaluation", text, share, {"share": share, "every": every})


def _device(p: Profile) -> Iterator[Finding]:
    if p.device is None:
        return
    idle = 1 - p.device.busy
    if idle >= 0.1:
        cure = "more lanes or larger cohorts (engine.lanes, engine.cohort)"
        text = f"no step is under way on the GPU for {idle:.0%} of the round: {cure}"
        yield Finding("idle", text, idle, {"idle": idle})
    if p.device.overlap is not None and p.device.overlap < 0.5 and p.plan.get("streams") and not p.plan.get("graphs"):
        text = (
            f"the experts overlap for {p.device.overlap:.0%} of the shorter one's time: each fills the GPU by itself, "
            "or the host launches them too slowly, which graphs would cure (engine.graphs)"
        )
        yield Finding("overlap", text, 0.0, {"overlap": p.device.overlap})


def _throttling(p: Profile) -> Iterator[Finding]:
    shares = p.meters.get("gpu_throttle", {}).get("shares", {})
    for reason, share in shares.items():
        if share >= NOTABLE and reason not in ASKED:
            text = f"the GPU's clock was held back for {share:.0%} of the time: {reason}"
            yield Finding("throttling", text, share, {"share": share})
