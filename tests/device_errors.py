"""What the kernels of a device may be off by, where that is more than float32 rounding.

The bounds for CUDA are two to three times the errors measured under the emulation
(``cuda/README.md``, section on accuracy).
"""

from __future__ import annotations

#: ``bam_scores``, as a part of the largest score: fp16 products on CUDA.
BAM_SCORES = {"cpu": 0.0, "cuda": 4e-3}
#: Recency features, whose values lie in [-1, 1].
RECENCY = {"cpu": 1.2e-7, "cuda": 4e-7}
#: New features of queries that are logarithms of probabilities; 2^x is approximate on CUDA.
CHAIN_EMA = {"cpu": 5e-6, "cuda": 2e-5}
