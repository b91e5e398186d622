"""What the build promises: which symbols, which includes, which imports, which messages."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import namm_ext
import pytest
import torch

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "python" / "namm_ext"
FOLDER = namm_ext.libraries.folder
LIBRARIES = sorted(FOLDER.glob("namm_*.so"))
needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="needs binutils")

TORCH_SYMBOLS = {
    line
    for line in (Path(__file__).parent / "torch_symbols.txt").read_text().splitlines()
    if line and not line.startswith("#")
}


def _undefined(library):
    command = ["nm", "-D", "--undefined-only", str(library)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return {line.split()[-1] for line in lines if line.split()[-2] == "U"}


@needs_nm
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda p: p.name)
def test_libraries_need_only_what_the_oldest_torch_has(library):
    undefined = _undefined(library)
    system = {s for s in undefined if re.search(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_[0-9.]+$", s)}
    if library.name == "namm_cuda.so":
        system |= {s for s in undefined if re.match(r"cuda[A-Z]|__cuda[A-Z]", s)}
    assert "torch_library_impl" in undefined
    assert undefined - system - TORCH_SYMBOLS == set()


@needs_nm
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda p: p.name)
def test_libraries_hold_no_python_and_export_nothing(library):
    assert not [s for s in _undefined(library) if s.startswith(("Py", "_Py"))]
    command = ["nm", "-D", "--defined-only", str(library)]
    if library.name == "namm_ops.so":
        exported = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert exported.split() == []


@needs_nm
@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs binutils")
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda p: p.name)
def test_libraries_find_torch_through_python(library):
    dynamic = subprocess.run(
        ["readelf", "-d", str(library)], capture_output=True, text=True, check=True
    ).stdout
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", dynamic))
    assert "libtorch_cpu.so" in needed or library.name == "namm_cuda.so"
    # A second libgomp would mean a second pool of threads.
    assert not [n for n in needed if "omp" in n or "python" in n]
    assert "PATH" not in dynamic


def test_version_comes_from_pyproject():
    text = (ROOT / "pyproject.toml").read_text()
    version = re.search(r'^version = "(.+)"', text, re.MULTILINE).group(1)
    assert namm_ext.__version__ == version
    for other in (PACKAGE / "__init__.py", ROOT / "CMakeLists.txt"):
        assert version not in other.read_text()


def _includes():
    for folder in ("cpp", "cuda"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".h", ".cpp", ".cu", ".cuh", ".inc"):
                for name in re.findall(r'^\s*#\s*include\s*[<"](.+?)[>"]', path.read_text(), re.M):
                    yield path.relative_to(ROOT).as_posix(), name


def test_includes_stay_on_their_side():
    wrong = []
    for path, name in _includes():
        in_ops = path.startswith(("cpp/ops/", "cuda/ops/"))
        if name.startswith(("torch/", "ATen/", "c10/", "caffe2/")):
            # The stable ABI only, and only in ops/.
            if not in_ops or not name.startswith(
                ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/")
            ):
                wrong.append((path, name))
        elif name.startswith("pybind11") or name == "Python.h":
            if not path.startswith("cpp/bindings/"):
                wrong.append((path, name))
        elif re.match(r"(cuda|cublas|cub/|cooperative_groups|mma\.h)", name):
            if not path.startswith("cuda/kernels/"):
                wrong.append((path, name))
        elif name.endswith("intrin.h") and not path.startswith("cpp/kernels/"):
            wrong.append((path, name))
    assert wrong == []
    assert len(list(_includes())) > 50


# A module may import what stands on its own or a lower floor.
FLOORS = [
    {"budget", "config", "transfer", "values", "_files", "_library", "_core"},
    {"reference"},
    {"ops"},
    {"testing", "policy", "ragged", "rotation"},
    {"cache", "patching", "report"},
    {"corpus", "library", "tasks"},
    {"answers", "asking", "baselines", "evolution", "fitting"},
    {"integrations"},
    {"measure", "zoo"},
    {"demo", "cli"},
]
TRANSFORMERS_FLOOR = 4
ALLOWED = {
    "budget": set(),
    "config": set(),
    "_files": set(),
    "transfer": {"torch"},
    "values": {"torch"},
    "reference": {"torch"},
    "ops": {"torch"},
    "_library": {"torch"},
}


def _floor(module):
    return next(i for i, names in enumerate(FLOORS) if module in names)


def _sources():
    """Name and path of every module of the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def _imports(path, modules):
    """Modules that a file names; of a package the submodule where the name is one."""
    package = ["namm_ext", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{name}.{alias.name}" if f"{name}.{alias.name}" in modules else name


def test_imports_go_downwards():
    modules, wrong = dict(_sources()), []
    known = {name.split(".")[1] for name in modules if name != "namm_ext"}
    assert known <= set().union(*FLOORS) <= known | {"_core"}
    for module, path in modules.items():
        if module == "namm_ext":
            continue
        own = module.split(".")[1]
        for name in _imports(path, modules):
            top, _, rest = name.partition(".")
            if top == "namm_ext":
                if rest and _floor(rest.split(".")[0]) > _floor(own):
                    wrong.append((module, name))
            elif top == "transformers":
                if _floor(own) < TRANSFORMERS_FLOOR:
                    wrong.append((module, name))
            elif own in ALLOWED and top not in ALLOWED[own] | sys.stdlib_module_names:
                wrong.append((module, name))
    assert wrong == []


def _circles(imports):
    """Modules in circles of imports, or between two of them."""
    imports = {name: set(names) & set(imports) - {name} for name, names in imports.items()}
    while True:
        imported = set().union(*imports.values())
        ends = {name for name, names in imports.items() if not names or name not in imported}
        if not ends:
            return set(imports)
        imports = {name: names - ends for name, names in imports.items() if name not in ends}


def test_imports_have_no_circle():
    assert _circles({"a": "b", "b": "cd", "c": "a", "d": "", "e": "a"}) == {"a", "b", "c"}
    modules = dict(_sources())
    assert len(modules) > 40
    found = _circles({name: _imports(path, modules) for name, path in modules.items()})
    assert found == set()


def _python(code, **env):
    path = os.pathsep.join(p for p in sys.path if p)
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **env},
        check=False,
    )


def test_import_works_without_transformers_and_leaves_it_alone():
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import namm_ext, namm_ext.policy, namm_ext.ragged, namm_ext.baselines, namm_ext.testing\n"
        "namm_ext.NAMM; namm_ext.NAMMConfig; namm_ext.ops.attend; namm_ext.reference.attend\n"
        "del sys.modules['transformers']\n"
        "import importlib; assert not [m for m in sys.modules if m.startswith('transformers')]\n"
    )
    result = _python(code)
    assert result.returncode == 0, result.stderr


# What an installed wheel with CUDA ops says on the torch at hand; argument: its folder.
WHEEL_PROBE = """
import sys
sys.path.insert(0, sys.argv[1])
sys.meta_path[:] = [finder for finder in sys.meta_path if isinstance(finder, type)]
import torch, namm_ext
assert namm_ext.__file__.startswith(sys.argv[1]), namm_ext.__file__
assert (namm_ext.libraries.folder / "namm_cuda.so").is_file()
k = torch.arange(8.0).view(4, 2)
one, ends = torch.tensor([4], dtype=torch.int32), torch.tensor([0, 4], dtype=torch.int32)
keep, kept = torch.tensor([0, 1, 0, 1], dtype=torch.uint8), torch.tensor([2], dtype=torch.int32)
pos = torch.arange(4, dtype=torch.int32)
store = namm_ext.values.Segments(k, k, pos, k, ends, one)
new = namm_ext.ops.compact(store, keep, kept, 2 * (ends > 0).int(), capacity=2)
assert torch.equal(new[0], k[[1, 3]]), new
loaded = "namm_cuda.so" in open("/proc/self/maps").read()
assert loaded == namm_ext.libraries.has_cuda == (torch.version.cuda is not None)
from namm_ext.cli import main
sys.argv[1:] = ["info"]
main()
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_wheel_with_cuda_ops_works_on_any_torch(tmp_path):
    """One wheel, built without a GPU, carries the CUDA ops; a CPU torch leaves them alone."""
    pytest.importorskip("scikit_build_core")
    pytest.importorskip("typer")
    pip = [sys.executable, "-m", "pip", "--quiet"]
    command = [
        *pip, "wheel", "--no-index", "--no-build-isolation", "--no-deps",
        "-Ccmake.define.NAMM_CUDA=ON", "-Ccmake.define.CMAKE_CUDA_ARCHITECTURES=90-real",
        f"-Cbuild-dir={ROOT}/build/wheel-check", "-w", str(tmp_path), str(ROOT),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("namm_ext-*.whl")
    site = tmp_path / "site"
    install = ["install", "--no-index", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run([*pip, *install], check=True)
    result = subprocess.run(
        [sys.executable, "-c", WHEEL_PROBE, str(site)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "COLUMNS": "200"},
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    status = "loaded" if torch.version.cuda else "built, not loaded: this torch has no CUDA"
    assert re.search(rf"CUDA kernels +{status} *$", result.stdout, re.MULTILINE), result.stdout


@needs_nm
@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a compiler")
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("namespace namm_ext::avx2 { int f() { return 1; } }", None),
        ("#include <vector>\nint f() { return 1; }", "do not name their instruction set"),
        (None, "no object of an instruction set"),
    ],
    ids=["inside", "outside", "nothing"],
)
def test_isa_objects_are_checked(tmp_path, source, message):
    objects = tmp_path / "probe_base.cpp.o"
    if source:
        objects = tmp_path / "probe_avx2.cpp.o"
        (tmp_path / "probe.cpp").write_text(source)
        compiler = ["c++", "-std=c++17", "-c", str(tmp_path / "probe.cpp"), "-o", str(objects)]
        subprocess.run(compiler, check=True)
    script = ROOT / "cmake" / "check_isa_objects.cmake"
    command = ["cmake", "-DNM=nm", f"-DOBJECTS={objects}", "-DPROCESSOR=x86_64", "-P", str(script)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode == 0) == (message is None), result.stderr
    assert message is None or message in " ".join(result.stderr.split())


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="module 'namm_ext' has no attribute 'nonsense'"):
        _ = namm_ext.nonsense
    assert {"NAMM", "NAMMCache", "NAMMConfig", "apply", "patch", "remove"} <= set(dir(namm_ext))


@pytest.mark.parametrize("missing", ["_core", "namm_ops"])
def test_missing_binaries_are_one_helpful_error(tmp_path, missing):
    package = tmp_path / "namm_ext"
    package.mkdir()
    for path in [*PACKAGE.glob("*.py"), PACKAGE / "ops", *FOLDER.glob("*.so")]:
        if not path.name.startswith(missing + "."):
            (package / path.name).symlink_to(path.resolve())
    code = (
        "import sys\n"
        # An editable installation answers before the path does; its finder is an instance.
        "sys.meta_path[:] = [finder for finder in sys.meta_path if isinstance(finder, type)]\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "import namm_ext"
    )
    result = _python(code, PYTHONSAFEPATH="1")
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: namm_ext: the compiled library {missing}")
    assert "pip install --no-build-isolation ." in last


def test_old_torch_is_one_helpful_error():
    code = "import torch; torch.__version__ = '2.9.1'; import namm_ext"
    result = _python(code)
    assert result.stderr.strip().splitlines()[-1] == (
        "ImportError: namm_ext: torch must be 2.11 or newer, got 2.9.1; run `pip install -U torch`"
    )


def _locate(*flags, **env):
    command = [sys.executable, *flags, str(ROOT / "cmake" / "locate_torch.py")]
    env = {k: v for k, v in {**os.environ, **env}.items() if k != "PYTHONPATH"}
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


def test_locate_torch():
    folder, version, cuda = _locate().stdout.strip().split(";")
    assert Path(folder).resolve() == Path(torch.__file__).parent.resolve()
    assert torch.__version__.startswith(version)
    assert cuda == (torch.version.cuda or "")


def test_locate_torch_by_its_folder(tmp_path):
    assert _locate(NAMM_TORCH_DIR=str(tmp_path)).returncode == 1
    found = _locate(NAMM_TORCH_DIR=str(Path(torch.__file__).parent))
    assert found.stdout.split(";")[0] == str(Path(torch.__file__).parent)


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
def test_configuring_without_torch_says_what_to_do(tmp_path):
    script = tmp_path / "CMakeLists.txt"
    script.write_text(
        "cmake_minimum_required(VERSION 3.24)\n"
        "project(probe LANGUAGES NONE)\n"
        f'set(Python_EXECUTABLE "{sys.executable}")\n'
        f'list(APPEND CMAKE_MODULE_PATH "{ROOT / "cmake"}")\n'
        "find_package(TorchStable 2.11 REQUIRED)\n"
    )
    result = subprocess.run(
        ["cmake", "-S", str(tmp_path), "-B", str(tmp_path / "build")],
        capture_output=True,
        text=True,
        env={**os.environ, "NAMM_TORCH_DIR": str(tmp_path)},
        check=False,
    )
    assert result.returncode != 0
    text = " ".join(result.stderr.split())
    assert "torch >= 2.11 was not found. Install torch first, then run" in text
    assert "`pip install --no-build-isolation .`" in text
