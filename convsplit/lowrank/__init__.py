"""Low-rank factorisation of kernels: the only room that imports tensorly.

    svd.py       every slice of a kernel at once, and which of their singular triplets to keep
    factors.py   the components of a CP decomposition
    starts.py    where its fit starts
    als.py       the fit: alternating least squares
    canonical.py the canonical polyadic decomposition of a whole kernel
    curve.py     its error over ranks

Nothing here knows about modules, plans or budgets: tensors in, factors out.
"""

import tensorly as tl

from convsplit.lowrank.canonical import cp as cp
from convsplit.lowrank.canonical import cp_each as cp_each
from convsplit.lowrank.canonical import ends_early as ends_early
from convsplit.lowrank.canonical import fit_work as fit_work
from convsplit.lowrank.curve import Curve as Curve
from convsplit.lowrank.curve import cp_curve as cp_curve
from convsplit.lowrank.curve import cp_curves as cp_curves
from convsplit.lowrank.curve import curve_work as curve_work
from convsplit.lowrank.factors import CP as CP
from convsplit.lowrank.factors import affordable as affordable
from convsplit.lowrank.svd import SliceSVD as SliceSVD
from convsplit.lowrank.svd import slice_svd as slice_svd

# Entering a backend for the first time loads it, and that is not safe in several threads at once: the backend is
# registered before its functions are. The context sets nothing that outlives it.
with tl.backend_context("pytorch", local_threadsafe=True):
    pass
