"""Repair without labels: factors fitted to data in closed form, layer by layer, on what the converted model feels.

refitting.py      the walk through the layers: what is repaired, in which order, towards what
samples.py        what the repair of a layer looks at, and its moments
grams.py          products of patches with themselves, the dearest part of those
solve.py          least squares for the stages of a layer, from those moments
fits.py           what is fitted of a layer: its factors, its last stage, its bias, or a dense kernel
recalibration.py  batch-norm statistics, the cheap alternative
"""

from convsplit.repair.recalibration import recalibrate as recalibrate
from convsplit.repair.refitting import Repaired as Repaired
from convsplit.repair.refitting import refit as refit
