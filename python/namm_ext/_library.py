"""Find and load the compiled libraries, once.

``namm_ops.so`` (schemas and CPU kernels) and ``namm_cuda.so`` lie next to the extension module
``_core``, in a normal and in an editable installation. torch is imported first: the libraries name
``libtorch_cpu.so`` without saying where it is, and the loader takes the one already in memory.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import torch

OLDEST_TORCH = (2, 11)


class Libraries:
    """What was loaded: the folder, the version, and why CUDA ops are there or not."""

    def __init__(self) -> None:
        release = tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2])
        if release < OLDEST_TORCH:
            raise ImportError(
                f"namm_ext: torch must be 2.11 or newer, got {torch.__version__}; "
                "run `pip install -U torch`"
            )
        try:
            core = importlib.import_module("namm_ext._core")
        except ImportError as error:
            raise ImportError(_missing("_core", str(error))) from error
        self.folder = Path(core.__file__ or "").parent
        self.build_info: dict[str, str] = core.build_info()
        self.supported_isas: list[str] = core.supported_isas()
        self._load("namm_ops.so")
        self.has_cuda, self.cuda_status = self._load_cuda()
        #: Names of the ops on tensors, as the library defines them.
        self.ops: tuple[str, ...] = tuple(sorted(_ops_on_tensors()))

    def _load(self, name: str) -> None:
        path = self.folder / name
        if not path.is_file():
            raise ImportError(_missing(name, f"there is no {path}"))
        try:
            torch.ops.load_library(str(path))
        except OSError as error:
            raise ImportError(_missing(name, str(error))) from error

    def _load_cuda(self) -> tuple[bool, str]:
        built = (self.folder / "namm_cuda.so").is_file()
        if torch.version.cuda is None:
            return False, "built, not loaded: " * built + "this torch has no CUDA"
        if not built:
            return False, "built without CUDA; reinstall with -Ccmake.define.NAMM_CUDA=ON and nvcc"
        try:
            self._load("namm_cuda.so")
        except ImportError as error:
            return False, str(error)
        return True, "loaded"


def _ops_on_tensors() -> Iterator[str]:
    for qualified in torch._C._dispatch_get_all_op_names():
        space, _, name = qualified.partition("::")
        if space == "namm_ext":
            schema = getattr(torch.ops.namm_ext, name).default._schema
            if any(str(argument.type) == "Tensor" for argument in schema.arguments):
                yield name


def _missing(name: str, reason: str) -> str:
    return (
        f"namm_ext: the compiled library {name} cannot be loaded ({reason}). Build it with "
        "`pip install --no-build-isolation .` in the repository, or put the build folder of "
        "`cmake --build build/dev` on the path: PYTHONPATH=build/dev/python."
    )


libraries = Libraries()
