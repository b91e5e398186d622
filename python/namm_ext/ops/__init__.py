"""Fused operators on a ragged KV cache: typed functions over ``torch.ops.namm_ext``.

They take the store of one layer as :class:`~namm_ext.values.Segments` and its newest queries as
:class:`~namm_ext.values.Window`, which say every shape and dtype. Sizes: B batch rows, H KV heads,
S = B * H segments, G query heads per KV head (query head ``h * G + g`` belongs to KV head h), D
``head_dim``, Dv ``head_dim_v``, L new columns, C rows of the store. Keys, values and queries are
float32, bfloat16 or float16 (one dtype per call), contiguous in their last dimension; the tensors
of the store are contiguous. Index tensors are int32, ``active`` is bool, everything else float32.
All arguments are on one device.

**float64** inputs go to :mod:`namm_ext.reference`, which has the same functions in plain torch, so
that a whole model can be checked in double precision.

The numbers inside index tensors are checked on the CPU, before anything is written. On CUDA that
would wait for the device, so there they are the caller's promise.

None of the ops is differentiable: with gradients enabled, an argument that requires them is an
error.
"""

# These two are there for what they register.
from . import fakes, refusals  # noqa: F401
from .attention import attend, attend_, attention_received, record_, spectrogram
from .scores import bam_scores, gate_, mlp_scores, select
from .store import append_, compact

__all__ = [
    "append_",
    "attend",
    "attend_",
    "attention_received",
    "bam_scores",
    "compact",
    "gate_",
    "mlp_scores",
    "record_",
    "select",
    "spectrogram",
]
