#!/usr/bin/env python3
"""Seeds bugs, one at a time, and counts how many of them the tests catch.

    tools/mutate.py --count 85 --count-cpp 15 --seed 0 --json mutants.json

Each mutant is one small change in ``python/namm_ext`` or ``cpp``: a comparison turned, a bound off
by one, ``and`` for ``or``, a branch negated, a statement dropped. It is made in a worktree of its
own, never in this tree, and the tests of its area run until one fails. Extensions are taken from
where ``namm_ext`` is installed; those of ``cpp`` are built anew. Exit status 1 if fewer than 95 %
are caught.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Which tests are about what, the likeliest ones first; a file's own test file goes before them.
CACHE = (
    *("huggingface", "huggingface_hybrids", "huggingface_failures", "huggingface_undo"),
    *("huggingface_kinds", "huggingface_generate", "huggingface_batches"),
    *("huggingface_memory", "huggingface_files", "huggingface_patch", "huggingface_errors"),
    *("huggingface_parallel", "huggingface_compile", "soak", "damaged_files"),
)
POLICY = ("policy", "calibration", "policy_files", "budget", "statistics", "original", "version1")
OPS = (
    *("ops_append", "ops_attend", "ops_compact", "ops_gate", "ops_record", "ops_scores"),
    *("ops_select", "ops_window", "ops_schema", "golden", "ragged"),
)
AREAS: dict[str, tuple[str, ...]] = {
    "python/namm_ext/cache": CACHE,
    "python/namm_ext/ragged": ("ragged", *CACHE),
    "python/namm_ext/patching.py": ("huggingface_patch", "huggingface_parallel", *CACHE),
    "python/namm_ext/report.py": ("huggingface_memory", *CACHE),
    "python/namm_ext/policy": (*POLICY, "golden", "fitting", *CACHE),
    "python/namm_ext/budget.py": ("budget", *POLICY, *CACHE),
    "python/namm_ext/config.py": ("config", *POLICY),
    "python/namm_ext/baselines": ("baselines", "budget", "measure", "huggingface"),
    "python/namm_ext/evolution": (
        *("evolution", "evolution_runs", "problems", "imitate", "reading_problem"),
        *("golden_evolution", "cli_evolve"),
    ),
    "python/namm_ext/fitting": ("fitting", "cli_fit", "calibration"),
    "python/namm_ext/measure": ("measure", "cli", "readme"),
    "python/namm_ext/tasks": ("tasks", "readings", "problems"),
    "python/namm_ext/answers.py": ("answers", "reading_problem", "measure"),
    "python/namm_ext/ops": (*OPS, "huggingface", "cuda"),
    "python/namm_ext/values.py": ("ragged", *OPS),
    "python/namm_ext/rotation.py": ("fitting", "baselines"),
    "cpp": OPS,
}
NOT_COUNTED = re.compile(r"/(demo|zoo|cli)/|/(testing|reference|_library|corpus|library)\.py$")

TURNED: dict[type[ast.cmpop], str] = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
    ast.Is: "is not", ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in",
}  # fmt: skip
SWAPPED: dict[type[ast.operator], tuple[str, str]] = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "+"), ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "*"), ast.Div: ("/", "*"),
}  # fmt: skip
# What stands in a line of C++, and what is put in its place.
TOKENS = (
    (r" < ", " <= "), (r" <= ", " < "), (r" > ", " >= "), (r" >= ", " > "), (r" == ", " != "),
    (r" != ", " == "), (r" && ", " || "), (r" \|\| ", " && "),
    (r" \+ 1\b(?!\.)", ""), (r" - 1\b(?!\.)", ""),
    (r"std::max", "std::min"), (r"std::min", "std::max"), (r" \+ ", " - "), (r" - ", " + "),
    (r" % ", " * "), (r" \+= ", " -= "),
)  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One change of one file."""

    path: str
    line: int
    before: str
    after: str
    content: str


@dataclass
class Outcome:
    """What became of a mutant."""

    path: str
    line: int
    before: str
    after: str
    outcome: str
    by: str
    seconds: float


def mutants_of_python(path: str, source: str) -> Iterator[Mutant]:
    """All mutants of a module. What only says or describes something is left alone."""
    tree = ast.parse(source)
    lines = source.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line.encode()))
    data = source.encode()

    def at(line: int, column: int) -> int:
        return starts[line - 1] + column

    def changed(node: ast.AST, begin: int, end: int, new: str) -> Mutant:
        content = data[:begin] + new.encode() + data[end:]
        number = node.lineno  # type: ignore[attr-defined]
        before = source.splitlines()[number - 1].strip()
        after = content.decode().splitlines()[number - 1].strip()
        return Mutant(path, number, before, after, content.decode())

    def span(node: ast.expr | ast.stmt) -> tuple[int, int]:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return at(node.lineno, node.col_offset), at(node.end_lineno, node.end_col_offset)

    def between(
        node: ast.AST, left: ast.expr, right: ast.expr, old: str, new: str
    ) -> Mutant | None:
        begin, end = span(left)[1], span(right)[0]
        found = re.search(re.escape(old), data[begin:end].decode())
        if found is None:
            return None
        return changed(node, begin + found.start(), begin + found.end(), new)

    read = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}

    def visit(node: ast.AST) -> Iterator[Mutant | None]:
        # Messages, annotations and what only a type checker reads change nothing that runs.
        if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr):
            return
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.FunctionDef) and node.name in ("__repr__", "__str__"):
            return
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            symbol, new = _symbol(node.ops[0]), TURNED[type(node.ops[0])]
            yield between(node, node.left, node.comparators[0], symbol, new)
        elif isinstance(node, ast.BoolOp):
            old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
            yield between(node, node.values[0], node.values[1], old, new)
        elif isinstance(node, ast.BinOp) and type(node.op) in SWAPPED:
            if not isinstance(node.left, ast.Constant | ast.JoinedStr):  # text
                yield between(node, node.left, node.right, *SWAPPED[type(node.op)])
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            begin, _ = span(node)
            yield changed(node, begin, begin + len("not "), "")
        elif isinstance(node, ast.Constant):
            begin, end = span(node)
            if isinstance(node.value, bool):
                yield changed(node, begin, end, str(not node.value))
            elif isinstance(node.value, int):
                yield changed(node, begin, end, str(node.value + 1))
        elif isinstance(node, ast.If | ast.While | ast.IfExp):
            begin, end = span(node.test)
            yield changed(node.test, begin, end, f"not ({data[begin:end].decode()})")
        elif _is_droppable(node, read):
            yield changed(node, *span(node), "pass")
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "type_params"):
                continue
            if isinstance(node, ast.keyword) and node.arg == "strict":  # lengths that are alike
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from visit(child)

    for mutant in visit(tree):
        if mutant is not None:
            yield mutant


def _symbol(op: ast.cmpop) -> str:
    return {
        ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!=",
        ast.Is: "is", ast.IsNot: "is not", ast.In: "in", ast.NotIn: "not in",
    }[type(op)]  # fmt: skip


def _is_droppable(node: ast.AST, attributes: set[str]) -> bool:
    """Whether a statement only does something: calls, adds, or sets one of the attributes."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Call)
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
        return node.targets[0].attr in attributes
    return isinstance(node, ast.AugAssign)


def mutants_of_cpp(path: str, source: str) -> Iterator[Mutant]:
    """Mutants of a C++ file, token by token; comments, includes, checks and templates are left."""
    lines = source.splitlines(keepends=True)
    for number, line in enumerate(lines):
        code = line.split("//")[0]
        if re.match(r"\s*(#|\*|/\*|template|using|static_assert|STD_TORCH|check)", code):
            continue
        if '"' in code:
            continue
        for pattern, new in TOKENS:
            for found in re.finditer(pattern, code):
                changed = line[: found.start()] + new + line[found.end() :]
                content = "".join([*lines[:number], changed, *lines[number + 1 :]])
                yield Mutant(path, number + 1, line.strip(), changed.strip(), content)


def tests_of(path: str, tests: Path) -> list[str]:
    """Test files for a source, the likeliest first."""
    area = max((name for name in AREAS if path.startswith(name)), key=len)
    names = [Path(path).stem, *AREAS[area]]
    files = dict.fromkeys(f"test_{name}.py" for name in names)
    return [f"tests/{name}" for name in files if (tests / name).is_file()]


class Laboratory:
    """A worktree in which mutants are made and tested."""

    def __init__(self, folder: Path, limit: float) -> None:
        self.folder, self.limit = folder, limit
        self.package = folder / "python/namm_ext"
        subprocess.run(
            ["git", "worktree", "add", "--quiet", "--detach", folder, "HEAD"], cwd=ROOT, check=True
        )
        for extension in _installed().glob("*.so"):
            shutil.copy(extension, self.package)

    def close(self) -> None:
        """Remove the worktree."""
        command = ["git", "worktree", "remove", "--force", self.folder]
        subprocess.run(command, cwd=ROOT, check=True)

    def build(self) -> bool:
        """The ops from this tree's C++; False if it does not compile."""
        build = self.folder / "build/mutants"
        if not build.exists():
            configure = [
                *("cmake", "-S", self.folder, "-B", build, "-G", "Ninja"),
                *(f"-DPython_EXECUTABLE={sys.executable}", "-DNAMM_CUDA=OFF"),
            ]
            subprocess.run(configure, check=True, capture_output=True)
        command = ["cmake", "--build", build, "--target", "namm_ops"]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            return False
        (made,) = build.rglob("namm_ops.so")
        (self.package / "namm_ops.so").unlink(missing_ok=True)
        shutil.copy(made, self.package)
        return True

    def test(self, files: Sequence[str]) -> tuple[str, str]:
        """``caught``, ``survived`` or ``timed out``, and the test that said so."""
        output = self.folder / "pytest.txt"
        # A fork, because importing torch and transformers takes longer than most tests.
        child = multiprocessing.get_context("fork").Process(
            target=_run_pytest, args=(self.folder, files, output)
        )
        child.start()
        child.join(self.limit)
        if child.exitcode is None:
            assert child.pid is not None
            os.killpg(child.pid, signal.SIGKILL)
            child.join()
            return "timed out", ""
        if child.exitcode == 0:
            return "survived", ""
        text = output.read_text(encoding="utf-8", errors="replace")
        failed = re.search(r"^(?:FAILED|ERROR) (\S+)", text, flags=re.MULTILINE)
        return "caught", failed[1] if failed else f"exit status {child.exitcode}"

    def judge(self, mutant: Mutant) -> Outcome:
        """Make it, test it, undo it."""
        path, began = self.folder / mutant.path, time.perf_counter()
        original = path.read_text(encoding="utf-8")
        path.write_text(mutant.content, encoding="utf-8")
        try:
            if mutant.path.startswith("cpp/") and not self.build():
                outcome, by = "does not compile", ""
            else:
                outcome, by = self.test(tests_of(mutant.path, self.folder / "tests"))
        finally:
            path.write_text(original, encoding="utf-8")
        return Outcome(
            mutant.path, mutant.line, mutant.before, mutant.after, outcome, by,
            round(time.perf_counter() - began, 1),
        )  # fmt: skip


def _import_what_tests_import() -> None:
    """All that is slow to import, and nothing of ``namm_ext``."""
    for name in ("torch", "transformers", "pytest", "hypothesis", "cma", "rich.table", "typer"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def _run_pytest(folder: Path, files: Sequence[str], output: Path) -> None:
    """In a process of its own: the tests of a tree, with that tree's package."""
    os.setsid()
    with output.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    sys.path.insert(0, str(folder / "python"))
    os.environ["PYTHONPATH"] = str(folder / "python")
    import pytest

    sys.exit(pytest.main(["-x", "-q", "--no-header", "-p", "no:cacheprovider", *files]))


def _installed() -> Path:
    found = subprocess.run(
        [sys.executable, "-c", "import namm_ext; print(namm_ext.__path__[0])"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return Path(found.stdout.strip())


def chosen(count: int, count_cpp: int, seed: int) -> list[Mutant]:
    """So many of each kind: a file by the number of its mutants, no two of one line."""
    rng = random.Random(seed)
    python, cpp = [], []
    for path in sorted((ROOT / "python/namm_ext").rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if not NOT_COUNTED.search(name) and any(name.startswith(area) for area in AREAS):
            python += list(mutants_of_python(name, path.read_text(encoding="utf-8")))
    for pattern in ("ops/*.cpp", "kernels/*_cpu.cpp", "kernels/*.inc"):
        for path in sorted((ROOT / "cpp").glob(pattern)):
            # Some machines have no AMX.
            if "amx" not in path.name:
                name = path.relative_to(ROOT).as_posix()
                cpp += list(mutants_of_cpp(name, path.read_text(encoding="utf-8")))
    picked: list[Mutant] = []
    for pool, wanted in ((python, count), (cpp, count_cpp)):
        rng.shuffle(pool)
        unique = {(mutant.path, mutant.line): mutant for mutant in pool}
        picked += list(unique.values())[:wanted]
    return picked


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=85, help="mutants of Python")
    parser.add_argument("--count-cpp", type=int, default=15, help="mutants of C++")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for the tests of one")
    parser.add_argument("--only", type=int, action="append", help="judge this one alone, from 0")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    mutants = chosen(args.count, args.count_cpp, args.seed)
    _import_what_tests_import()
    done: list[Outcome] = []
    with tempfile.TemporaryDirectory() as temporary:
        laboratory = Laboratory(Path(temporary) / "tree", args.limit)
        try:
            for i, mutant in enumerate(mutants):
                if args.only and i not in args.only:
                    continue
                found = laboratory.judge(mutant)
                done.append(found)
                print(
                    f"{i:3d} {found.outcome:16s} {found.seconds:5.0f} s  {found.path}:"
                    f"{found.line}\n      {found.before}\n      {found.after}\n      {found.by}",
                    flush=True,
                )
                if args.json:
                    values = [asdict(outcome) for outcome in done]
                    args.json.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        finally:
            laboratory.close()
    counted = [outcome for outcome in done if outcome.outcome != "does not compile"]
    caught = sum(outcome.outcome != "survived" for outcome in counted)
    print(f"{caught} of {len(counted)} caught")
    return int(caught < 0.95 * len(counted))


if __name__ == "__main__":
    sys.exit(main())
