"""tensorly's decompositions of kernels."""

from __future__ import annotations

import tensorly as tl
from tensorly.decomposition import parafac
from torch import Tensor


def parafac_error(kernel: Tensor, rank: int, *, starts: int, iterations: int) -> float:
    """The relative error of tensorly's parafac from the best of some starts: the first by SVD, the others random."""
    errors = []
    with tl.backend_context("pytorch"):
        for seed in range(starts):
            init = "svd" if seed == 0 else "random"
            fit = parafac(kernel, rank, n_iter_max=iterations, init=init, tol=1e-9, random_state=seed)
            errors.append(float((tl.cp_to_tensor(fit) - kernel).norm() / kernel.norm()))
    return min(errors)
