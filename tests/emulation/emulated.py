"""Builds the CUDA kernels for the CPU and calls their launchers through ctypes.

Every ``cuda/kernels/*.cu`` is compiled unchanged by g++ against ``cuda_emulation.h`` into one
shared library, cached by a hash of the sources. The structs below mirror
``cpp/include/namm_ext/params.h``; ``emulated.cpp`` reports their sizes and :func:`launch`
compares them. Inputs are copied into *guarded* memory that ends at an unmapped page, so a kernel
that reads or writes past a tensor fails the test.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["-std=c++17", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-clobbered"]
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
#: (order of threads, order of blocks): forwards, backwards, random.
ORDERS = [(0, 0), (1, 1), (17, 23)]


def _import_law() -> tuple[ModuleType, ModuleType]:
    """``namm_ext.reference`` and ``values`` from their files: no built package is needed."""
    package = ModuleType("namm_law")
    package.__path__ = [str(ROOT / "python/namm_ext")]
    sys.modules[package.__name__] = package
    return import_module("namm_law.reference"), import_module("namm_law.values")


reference, values = _import_law()

P, I32, I64, F32, F64, BOOL = (
    ctypes.c_void_p,
    ctypes.c_int32,
    ctypes.c_int64,
    ctypes.c_float,
    ctypes.c_double,
    ctypes.c_bool,
)


def _struct(name: str, *fields: tuple[str, object]) -> type[ctypes.Structure]:
    flat = [(n, t) for names, t in fields for n in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": flat})


Segments = _struct("Segments", ("cu_seqlens_k seqused_k", P), ("batch_size num_kv_heads", I32))
AppendParams = _struct(
    "AppendParams",
    ("seg", Segments),
    ("k v pos state seqused_k k_new v_new first num_new pos_first", P),
    ("k_new_strides v_new_strides", I64 * 3),
    ("head_dim head_dim_v num_state num_cols dtype", I32),
)
AttendParams = _struct(
    "AttendParams",
    ("seg", Segments),
    ("q k v pos first num_new pos_first out lse", P),
    ("q_strides out_strides lse_strides", I64 * 3),
    ("num_groups head_dim head_dim_v num_cols", I32),
    ("softmax_scale", F32),
    ("softcap", F32),
    ("dtype", I32),
)
RecordParams = _struct(
    "RecordParams",
    ("q lse first num_new pos_first q_window lse_window", P),
    ("q_strides lse_strides q_window_strides lse_window_strides", I64 * 3),
    ("batch_size num_heads head_dim num_cols num_rows dtype", I32),
)
Window = _struct(
    "Window",
    ("seg", Segments),
    ("q lse k pos pos_q active", P),
    ("q_strides", I64 * 3),
    ("lse_strides", I64 * 2),
    ("num_groups head_dim num_rows", I32),
    ("softmax_scale", F32),
    ("softcap", F32),
    ("dtype", I32),
)
SpectrogramParams = _struct(
    "SpectrogramParams", ("window", Window), ("state state_out", P), ("ema_coeff", F64)
)
ReceivedParams = _struct("ReceivedParams", ("window", Window), ("received", P), ("first_row", I32))
ScoreParams = _struct(
    "ScoreParams",
    ("seg", Segments),
    ("state pos params param_index mean var active scores", P),
    ("num_params", I64),
    ("num_candidates", I32),
    ("log_transform", BOOL),
    ("log_eps", F32),
    ("hidden depth", I32),
    ("bias residual_first", BOOL),
)
GateParams = _struct(
    "GateParams",
    ("seg", Segments),
    ("k v pos active weight bias state", P),
    ("num_inputs", I64),
    ("num_new head_dim head_dim_v num_state rotary_dim", I32),
    ("interleaved", BOOL),
    ("eps", F32),
    ("dtype", I32),
)
SelectParams = _struct(
    "SelectParams",
    ("seg", Segments),
    ("scores pos active keep num_kept", P),
    ("threshold", F32),
    ("cache_size budget", I32),
    ("fill protect_newest", BOOL),
    ("sink_tokens recent_tokens", I32),
)
CompactParams = _struct(
    "CompactParams",
    ("seg", Segments),
    ("cu_seqlens_new keep num_kept k v pos state k_out v_out pos_out state_out", P),
    ("k_row_bytes v_row_bytes", I64),
    ("num_state capacity_new", I32),
)
STRUCTS = {
    "append": AppendParams,
    "attend": AttendParams,
    "record": RecordParams,
    "spectrogram": SpectrogramParams,
    "attention_received": ReceivedParams,
    "bam_scores": ScoreParams,
    "mlp_scores": ScoreParams,
    "gate": GateParams,
    "select": SelectParams,
    "compact": CompactParams,
}


def _includes(path: Path, folders: Sequence[Path], found: dict[str, Path]) -> dict[str, Path]:
    """Our headers that ``path`` includes, directly or not, by the name in the ``#include``."""
    for name in re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE):
        header = next((f / name for f in folders if (f / name).exists()), None)
        if header is not None and name not in found:
            found[name] = header
            _includes(header, folders, found)
    return found


def _replace_atomically(command: list[str], target: Path) -> Path:
    """Run a command that writes ``-o <file>`` and move the file to ``target``."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        out = f"{folder}/out"
        run = subprocess.run([*command, "-o", out], capture_output=True, text=True, check=False)
        if run.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{run.stderr}")
        os.replace(out, target)
    return target


def build(kernels: Path, pattern: str = "*", optimise: str = "-O1") -> Path:
    """Compile ``kernels/<pattern>.cu`` and the driver for the CPU; returns the shared library.

    Objects and libraries are cached by the text of the sources and of the headers they include.
    """
    here = Path(__file__).parent
    folders = [kernels, ROOT / "cpp/include", here]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "namm_ext_emulation"
    cache.mkdir(parents=True, exist_ok=True)
    stems = sorted({*kernels.glob(f"{pattern}.cu"), kernels / "status.cu"})
    has = [f"-DNAMM_HAS_{s.stem.upper()}" for s in stems]

    # The standard headers behind cuda_emulation.h take half of a compilation: once is enough.
    emulation = here / "cuda_emulation.h"
    parts = [emulation, *_includes(emulation, [here], {}).values()]
    text = b"".join([" ".join([*FLAGS, optimise]).encode(), *(p.read_bytes() for p in parts)])
    prelude = cache / f"emulation_{hashlib.sha256(text).hexdigest()[:16]}.h"
    if not prelude.with_suffix(".h.gch").exists():
        prelude.write_text(f'#include "{emulation}"\n')
        _replace_atomically(
            ["g++", "-x", "c++-header", *FLAGS, optimise, str(prelude)],
            prelude.with_suffix(".h.gch"),
        )

    def compile_one(source: Path) -> Path:
        flags = [*FLAGS, optimise, *(has if source.suffix == ".cpp" else [])]
        digest = hashlib.sha256(" ".join(flags).encode() + source.read_bytes())
        for name, header in sorted(_includes(source, folders, {}).items()):
            digest.update(name.encode() + header.read_bytes())
        target = cache / f"{source.stem}_{digest.hexdigest()[:16]}.o"
        if target.exists():
            return target
        include = [f"-I{folder}" for folder in folders]
        return _replace_atomically(
            ["g++", "-x", "c++", *flags, *include, "-include", str(prelude), "-c", str(source)],
            target,
        )

    with ThreadPoolExecutor(2) as pool:
        objects = [str(o) for o in pool.map(compile_one, [*stems, here / "emulated.cpp"])]
    digest = hashlib.sha256(" ".join(objects).encode()).hexdigest()[:16]
    target = cache / f"emulated_{digest}.so"
    if target.exists():
        return target
    return _replace_atomically(["g++", "-shared", "-Wl,-z,defs", *objects], target)


def load(path: Path) -> ctypes.CDLL:
    """Open a library made by :func:`build`."""
    lib = ctypes.CDLL(str(path))
    lib.emulated_workspace.restype = ctypes.c_size_t
    lib.emulated_error.restype = ctypes.c_char_p
    return lib


@cache
def library() -> ctypes.CDLL:
    """The emulated kernels of this checkout."""
    return load(build(ROOT / "cuda/kernels"))


class EmulationError(RuntimeError):
    """A kernel broke a rule: barrier, bounds, alignment, dead-lock."""


_NO_ACCESS = 0
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def guarded(source: Tensor) -> Tensor:
    """Copy of a contiguous tensor in memory that ends, up to alignment by 16, at a locked page."""
    source = source.contiguous()
    num_bytes = source.numel() * source.element_size()
    if num_bytes == 0:
        return source.clone()
    padded = -(-num_bytes // 16) * 16
    body = max(-(-padded // mmap.PAGESIZE), 1) * mmap.PAGESIZE
    memory = mmap.mmap(-1, body + mmap.PAGESIZE)
    view = (ctypes.c_char * (body + mmap.PAGESIZE)).from_buffer(memory)
    if _libc.mprotect(ctypes.addressof(view) + body, mmap.PAGESIZE, _NO_ACCESS) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    # The mapping must outlive the tensor; it is small and tests are short, so it stays for good.
    _keep.append((memory, view))
    flat = torch.frombuffer(memory, dtype=torch.uint8, count=num_bytes, offset=body - padded)
    return flat.view(source.dtype).view(source.shape).copy_(source)


_keep: list[object] = []


def pointer(tensor: Tensor | None) -> int | None:
    """Address for a struct field; a dimension of size zero gives a null pointer."""
    return None if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


def segments(store: values.Segments, batch_size: int) -> ctypes.Structure:
    """The ``Segments`` struct; the tensors must stay alive."""
    cu, used = store.cu_seqlens_k, store.seqused_k
    return Segments(pointer(cu), pointer(used), batch_size, used.numel() // batch_size)


def launch(
    name: str,
    params: ctypes.Structure,
    capacity: int,
    *,
    simt: bool = False,
    order: tuple[int, int] = (0, 0),
    lib: ctypes.CDLL | None = None,
) -> None:
    """Run ``launch_<name>`` under the emulation.

    Args:
        params: the op's struct with addresses of CPU tensors.
        capacity: rows of the store.
        simt: force the plain float path.
        order: of threads and blocks; 0 forwards, 1 backwards, otherwise a seed.

    Raises:
        EmulationError: if the emulation or the launcher reports a fault.
    """
    lib = lib or library()
    ours, theirs = ctypes.sizeof(STRUCTS[name]), lib.emulated_sizeof(name.encode())
    assert ours == theirs, f"{name}: the struct has {theirs} bytes in params.h, {ours} here"
    size = lib.emulated_workspace(name.encode(), ctypes.byref(params), ctypes.c_int64(capacity))
    workspace = guarded(torch.full((size,), 0xFF, dtype=torch.uint8))
    status = lib.emulated_launch(
        name.encode(),
        ctypes.byref(params),
        ctypes.c_int64(capacity),
        ctypes.c_void_p(pointer(workspace)),
        ctypes.c_int(simt),
        ctypes.c_uint(order[0]),
        ctypes.c_uint(order[1]),
    )
    if status != 0:
        raise EmulationError(lib.emulated_error().decode())
