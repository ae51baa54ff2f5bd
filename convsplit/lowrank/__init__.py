"""Low-rank factorisation of kernels: the only room that imports tensorly.

    svd.py       every slice of a kernel at once, and which of their singular triplets to keep
    factors.py   the components of a CP decomposition
    starts.py    where its fit starts
    als.py       the fit: alternating least squares
    canonical.py the canonical polyadic decomposition of a whole kernel
    curve.py     its error over ranks

Nothing here knows about modules, plans or budgets: tensors in, factors out.
"""

from convsplit.lowrank.canonical import cp as cp
from convsplit.lowrank.curve import cp_curve as cp_curve
from convsplit.lowrank.factors import CP as CP
from convsplit.lowrank.svd import SliceSVD as SliceSVD
from convsplit.lowrank.svd import slice_svd as slice_svd
