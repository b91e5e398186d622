"""What the ops refuse before a kernel sees it: gradients and negative views."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .dispatch import check_gradients, kernels, names

# Gradients: an op without a formula would silently return results that carry none -------------

_library = torch.library.Library("namm_ext", "IMPL")


def _refuse_gradients(name: str) -> None:
    """For calls of ``torch.ops`` and under torch.compile; ``call`` passes below it."""
    op = getattr(kernels, name).default

    def kernel(keyset: Any, *args: Any) -> Any:
        if torch.is_grad_enabled():
            check_gradients(op, args)
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    _library.impl(name, kernel, "Autograd", with_keyset=True)


# Negative views hold numbers with the other sign: a kernel would write half of a result --------


def _refuse_negative_views(name: str) -> None:
    def kernel(*args: Any) -> Any:
        arguments = [a.name for a in getattr(kernels, name).default._schema.arguments]
        view = next(
            n for n, a in zip(arguments, args, strict=False) if isinstance(a, Tensor) and a.is_neg()
        )
        raise RuntimeError(f"{name}: {view} must not be a negative view; call {view}.resolve_neg()")

    _library.impl(name, kernel, "Negative")


for _name in names:
    _refuse_gradients(_name)
    _refuse_negative_views(_name)
