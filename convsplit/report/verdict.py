"""The verdict: what a report's figures mean, in words, by fixed thresholds.

In this order:

    not worth splitting   nothing was split, or less than 5 % of the whole model's parameters and of its MACs is
                          saved, or both models were timed and the converted one is not faster while it saves less
                          than 25 % of the parameters
    unknown               the outputs could not be compared, or are NaN or infinite already in the original, or split
                          layers are not what the converted model runs
    too far gone          the same top-1 class for fewer than half of the inputs or, without classes, relative
                          output drift above 0.9: an output of zeros has 1; outputs that became NaN or infinite
    refit or fine-tune    top-1 agreement below 98 % or, without classes, relative drift above 0.05
    ready to use          the rest, if measured on at least 100 inputs; on fewer it "looks ready"

Where both models were timed and the converted one is not faster, the headline begins with that.

Agreement says how often the model decides alike, not how often it is right: measure accuracy where there are labels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from convsplit.tables import percent, share

WORTH = 0.05  # saved, of the whole model's parameters or MACs
WORTH_SLOWER = 0.25  # saved parameters that make up for no speed
AGREES, CLOSE = 0.98, 0.05  # agreement and relative drift of a model that is ready
LOST_AGREEMENT, LOST_DRIFT = 0.5, 0.9
ENOUGH_INPUTS = 100


@dataclass(frozen=True)
class Verdict:
    """A level ("ready", "repair", "lost", "pointless" or "unknown"), a headline, and the figures behind it."""

    level: str
    headline: str
    figures: str

    def __str__(self) -> str:
        return f"{self.headline}: {self.figures}"


@dataclass(frozen=True)
class Evidence:
    """The figures a verdict rests on. `kept` are fractions of the whole model, `speedup` is before / after.

    `unused` counts the split layers that the converted model never called, though the original calls what they replace.
    """

    split_layers: int
    params_kept: float
    macs_kept: float | None
    speedup: float | None
    relative_drift: float | None
    agreement: float | None
    inputs: int
    unused: int = 0


def judge(evidence: Evidence) -> Verdict:
    """The verdict on some evidence; the head of the module states the thresholds. What got slower is said first."""
    found = _judged(evidence)
    if evidence.speedup is None or evidence.speedup > 1 or not evidence.split_layers:
        return found
    slower = f"Slower than before ({evidence.speedup:.2f}x the speed)"
    return replace(found, headline=f"{slower}; {found.headline[0].lower()}{found.headline[1:]}")


def _judged(evidence: Evidence) -> Verdict:
    if not evidence.split_layers:
        return Verdict("pointless", "Not worth splitting", "no layer was split")
    saved = _saved(evidence)
    if _pointless(evidence):
        return Verdict("pointless", "Not worth splitting", saved)
    moved = _moved(evidence)
    if evidence.unused:
        what = f"{evidence.unused} of {evidence.split_layers} split layers are never called"
        return Verdict("unknown", "Not what runs", f"{saved}; {what}, so the outputs say nothing about them")
    agreement, drift = evidence.agreement, evidence.relative_drift
    if drift is None and agreement is None:
        return Verdict("unknown", "Saved, but the drift is unknown", f"{saved}; no outputs could be compared")
    if drift is not None and math.isnan(drift):
        return Verdict("unknown", "Saved, but the drift is unknown", f"{saved}; the outputs are not finite")
    broken = drift is not None and math.isinf(drift)
    if broken or (agreement < LOST_AGREEMENT if agreement is not None else (drift or 0.0) > LOST_DRIFT):
        return Verdict("lost", "Too far gone: keep more, or fine-tune at length", f"{saved}; {moved}")
    if not (agreement >= AGREES if agreement is not None else (drift or 0.0) <= CLOSE):
        return Verdict("repair", "Refit or fine-tune first", f"{saved}; {moved}")
    if evidence.inputs < ENOUGH_INPUTS:
        advice = f"measure on {ENOUGH_INPUTS} real inputs or more to be sure"
        return Verdict("ready", "Looks ready to use", f"{saved}; {moved}; {advice}")
    return Verdict("ready", "Ready to use", f"{saved}; {moved}")


def _pointless(evidence: Evidence) -> bool:
    params_saved = 1 - evidence.params_kept
    macs_saved = 0.0 if evidence.macs_kept is None else 1 - evidence.macs_kept
    slower = evidence.speedup is not None and evidence.speedup <= 1
    return max(params_saved, macs_saved) < WORTH or (slower and params_saved < WORTH_SLOWER)


def _saved(evidence: Evidence) -> str:
    parts = [f"{percent(1 - evidence.params_kept)} of the model's parameters saved"]
    if evidence.macs_kept is not None:
        parts.append(f"{percent(1 - evidence.macs_kept)} of its MACs")
    if evidence.speedup is not None:
        parts.append(f"runs at {evidence.speedup:.2f}x the speed")
    return ", ".join(parts)


def _moved(evidence: Evidence) -> str:
    parts = []
    if evidence.agreement is not None:
        parts.append(f"same top-1 class for {percent(evidence.agreement)} of {evidence.inputs} inputs")
    if evidence.relative_drift is not None:
        parts.append(f"relative output drift {share(evidence.relative_drift)}")
    return ", ".join(parts)
