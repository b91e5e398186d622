"""The way from a typed function to the op of the compiled library."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._library import libraries

kernels = torch.ops.namm_ext
names = libraries.ops


def check_gradients(op: torch._ops.OpOverload, args: tuple[Any, ...]) -> None:
    if torch._C._any_requires_grad(*args):
        names = [argument.name for argument in op._schema.arguments]
        guilty = next(
            name
            for name, value in zip(names, args, strict=False)
            if isinstance(value, Tensor) and value.requires_grad
        )
        raise RuntimeError(
            f"{op._schema.name.partition('::')[2]}: {guilty} must not require grad, got "
            "requires_grad=True; the op is not differentiable, call it under torch.no_grad()"
        )


def call(op: torch._ops.OpOverload, *args: Any) -> Any:
    """Dispatch below autograd, whose kernel is in Python and takes longer than a small op."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return op(*args)  # inference mode passes below autograd by itself
    if torch.is_grad_enabled():
        check_gradients(op, args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)
