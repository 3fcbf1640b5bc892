"""What DESIGN keeps true of the whole package: layers, dependencies, and what no file may do.

Everything is read from the syntax trees, so a rule holds for code that no other test runs.
"""

import ast
import doctest
import importlib
import re
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import minirlhf

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "minirlhf").rglob("*.py"))
TREES = {path: ast.parse(path.read_text("utf-8"), str(path)) for path in FILES}

DEPENDENCIES = {"torch", "tokenizers", "safetensors", "numpy", "tqdm"}
LAZY_DEPENDENCIES = {  # inside functions only
    "jinja2", "huggingface_hub", "matplotlib", "pyarrow", "yaml", "wandb", "trackio",
}

# From the ground up: a wing imports from itself and from wings on lower floors. Wings on one floor
# do not know each other, and only `minirlhf` itself may name what lies above it (lazily).
FLOORS = (
    "console errors interrupt ranks shards streams",
    "equations files",
    "models data run",
    "rewards",
    "batches",
    "evaluation",
    "setup",
    "recipes lessons",
    "tools",
    "cli",
    "__main__",
)
FLOOR = {wing: level for level, wings in enumerate(FLOORS) for wing in wings.split()}
TOGETHER = {  # the arrows on the ground floor
    ("errors", "console"), ("interrupt", "console"), ("interrupt", "errors"),
    ("ranks", "interrupt"), ("ranks", "errors"), ("shards", "ranks"),
}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): tree for path, tree in TREES.items()}


def imported(tree: ast.AST) -> Iterator[tuple[str, ast.stmt]]:
    """Full name of each thing that a file imports, wherever in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a script run by its path has no parent"
            yield from ((f"{node.module}.{alias.name}", node) for alias in node.names)


def module_behind(name: str) -> str:
    """minirlhf.equations.kl.kl_k1 -> minirlhf.equations.kl"""
    while name not in MODULES and "." in name:
        name = name.rpartition(".")[0]
    return name


def own_imports(module: str) -> set[str]:
    names = {module_behind(name) for name, _ in imported(MODULES[module])}
    return {name for name in names if name.split(".")[0] == "minirlhf"}


def wing_of(module: str) -> str:
    """minirlhf.equations.kl -> equations; the package itself has none."""
    wing = module.partition(".")[2].partition(".")[0]
    assert wing in FLOOR or module == "minirlhf", f"{module} has no wing: give it one in FLOORS"
    return wing


# ---- imports -------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_downward_by_wing(module):
    me = wing_of(module)
    others = {wing_of(name) for name in own_imports(module)} - {me, ""}
    assert not [
        wing for wing in others if FLOOR[wing] >= FLOOR[me] and (me, wing) not in TOGETHER
    ]


def test_imports_have_no_cycle():
    graph = {module: own_imports(module) - {module} for module in MODULES}
    assert set(TopologicalSorter(graph).static_order()) >= set(MODULES)  # raises CycleError


@pytest.mark.parametrize("module", [name for name in MODULES if wing_of(name) == "equations"])
def test_equations_import_nothing_of_ours_but_each_other(module):
    assert {wing_of(name) for name in own_imports(module)} <= {"equations"}


@pytest.mark.parametrize("module", [m for m in MODULES if wing_of(m) in ("recipes", "lessons")])
def test_recipes_and_lessons_do_not_import_each_other(module):
    others = own_imports(module) - {module}
    assert not [name for name in others if wing_of(name) in ("recipes", "lessons")]


@pytest.mark.parametrize("module", MODULES)
def test_no_private_name_crosses_a_module(module):
    ours = [name for name, _ in imported(MODULES[module]) if name.startswith("minirlhf")]
    names = [name.rpartition(".")[2] for name in ours]
    assert not [name for name in names if name.startswith("_") and not name.startswith("__")]


def test_the_top_of_the_package_shows_the_wings():
    top = {path.stem for path in (ROOT / "minirlhf").glob("*.py")}
    assert top == {"__init__", "__main__", "cli", "console", "errors", "interrupt", "ranks",
                   "shards", "streams"}


@pytest.mark.parametrize("module", MODULES)
def test_modules_take_public_names_from_where_they_live(module):
    """`from minirlhf import gae` inside the package would hide an edge of the import graph."""
    public = {f"minirlhf.{name}" for name in minirlhf.__all__} - {"minirlhf.__version__"}
    assert not public & {name for name, _ in imported(MODULES[module])} - set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_imports_are_the_declared_dependencies(module):
    tree = MODULES[module]
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = {id(node) for function in functions for node in ast.walk(function)}
    for name, node in imported(tree):
        top = name.split(".")[0]
        legal = top in sys.stdlib_module_names | DEPENDENCIES | {"minirlhf"}
        assert legal or (top in LAZY_DEPENDENCIES and id(node) in inside), f"{name}:{node.lineno}"


def test_dependencies_are_the_five_with_floors_only():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    floors = [re.fullmatch(r"([a-z]+)>=[0-9.]+", line) for line in project["dependencies"]]
    assert all(floors)
    assert sorted(floor[1] for floor in floors) == sorted(DEPENDENCIES)


def test_version_is_written_once():
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert pyproject["project"]["dynamic"] == ["version"]
    attr = pyproject["tool"]["setuptools"]["dynamic"]["version"]["attr"]
    assert attr == "minirlhf.__version__"


def test_files_that_the_code_reads_are_declared():
    """setuptools leaves out what is no Python file and not declared."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    declared = pyproject["tool"]["setuptools"]["package-data"]
    there: dict[str, list[str]] = {}
    for path in sorted((ROOT / "minirlhf").rglob("*")):
        if path.suffix in (".json", ".toml", ".tsv"):
            there.setdefault(".".join(path.parent.relative_to(ROOT).parts), []).append(path.name)
    assert {package: sorted(names) for package, names in declared.items()} == there


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_module_hides_another(path):
    """A script run by its path has its own folder first on sys.path."""
    if path.stem not in ("__init__", "__main__"):
        assert path.stem not in sys.stdlib_module_names | DEPENDENCIES | LAZY_DEPENDENCIES


@pytest.mark.parametrize("wing", [w for w in FLOOR if (ROOT / "minirlhf" / w).is_dir()])
def test_a_wing_says_what_lives_there(wing):
    """And in which order to read it, and what it may import."""
    text = ast.get_docstring(MODULES[f"minirlhf.{wing}"]) or ""
    assert 3 <= len(text.splitlines()) <= 10
    assert "mport" in text  # what it may import
    # and names each of its files, in the order to read them; {sft,ppo}_settings.py names two
    named = set(re.findall(r"(?<![\w}])\w+\.py", text))
    for group, rest in re.findall(r"\{([\w,]+)\}(\w+\.py)", text):
        named |= {f"{first}{rest}" for first in group.split(",")}
    files = (ROOT / "minirlhf" / wing).glob("*.py")
    assert named == {path.name for path in files} - {"__init__.py"}


# ---- how much there is to read -------------------------------------------------------------------

# To understand one PPO step with its math.
PPO_STEP = (
    "lessons.ppo", "equations.masking", "equations.kl", "equations.advantages", "equations.policy",
    "batches.rollouts", "models.alignment", "models.heads",
)


def lines_of_code(path: Path) -> int:
    """Lines that hold a token, without docstrings, comments and blank lines."""
    skipped = tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT
    lines: set[int] = set()
    with tokenize.open(path) as file:
        for token in tokenize.generate_tokens(file.readline):
            if token.type not in (*skipped, tokenize.ENDMARKER):
                lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(TREES[path]):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if documented and ast.get_docstring(node):
            lines.difference_update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def test_one_ppo_step_takes_at_most_700_lines():
    paths = [ROOT / "minirlhf" / f"{name.replace('.', '/')}.py" for name in PPO_STEP]
    assert sum(map(lines_of_code, paths)) <= 700


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_and_functions_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    functions = [n for n in ast.walk(TREES[path]) if isinstance(n, ast.FunctionDef)]
    assert not [f.name for f in functions if f.end_lineno - f.lineno + 1 > 60]


# ---- what every file must do ---------------------------------------------------------------------


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"minirlhf.__main__"}))
def test_module_imports_and_its_examples_hold(module):
    assert doctest.testmod(importlib.import_module(module)).failed == 0


@pytest.mark.parametrize("name", minirlhf.__all__)
def test_public_name_resolves(name):
    assert getattr(minirlhf, name) is not None
    assert name in dir(minirlhf)


def test_package_refuses_a_name_that_it_has_not():
    with pytest.raises(AttributeError, match="module 'minirlhf' has no attribute 'Trainer'"):
        minirlhf.Trainer  # noqa: B018


@pytest.mark.parametrize("module", ["minirlhf", "minirlhf.cli", "minirlhf.run.settings"])
def test_import_does_not_wait_for_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
