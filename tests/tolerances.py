"""How far results may differ, each with its reason. Integers, indices, layouts, weights and greedy tokens are exact."""

import numpy as np

LOGITS = 1e-4
"""Model logits against PyTorch's in float32, relative to the largest: two summation orders over tens of layers."""

ROUNDING = {"float32": 32 * 2.0**-24, "bfloat16": 2 * 2.0**-9, "float16": 2 * 2.0**-12}
"""Of outputs of order one: two in the narrow dtypes; more in float32, where the oracle is as inexact."""


def kernel_bound(plain, exact, dtype):
    """The largest error a kernel may make: twice that of plain attention in its dtype, and the rounding of the output.

    plain: the oracle run in the kernel's dtype. exact: the oracle run in float32 on the same inputs.
    """
    plain, exact = np.asarray(plain, np.float64), np.asarray(exact, np.float64)
    rounding = ROUNDING[str(dtype)] * max(np.abs(exact).max(initial=0.0), 1.0)
    return 2 * np.abs(plain - exact).max(initial=0.0) + rounding


LSE = 1e-5
"""Log-sum-exp in float32 against the oracle's, relative: sums of up to thousands of terms in another order."""
