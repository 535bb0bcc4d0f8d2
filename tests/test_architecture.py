"""Who may import whom, and how large a file may be: read from the source, without running it."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path
from types import FunctionType

import pytest

import tenfold.nn
import tenfold.structure

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "tenfold").rglob("*.py"), *ROOT.glob("tenfold_cli/*.py")])
LINES = 400

# part -> the parts that it may import; report reads result files, recipes are data
MAY_IMPORT = {
    "structure": set(),
    "nn": {"structure"},
    "models": {"structure", "nn"},
    "evaluation": {"structure", "nn", "models"},
    "compression": {"structure", "nn", "models", "evaluation"},
    "baselines": {"structure", "nn", "models", "evaluation", "compression"},
    "train": {"structure", "nn", "models", "evaluation", "compression"},
    "integrations": {"structure", "nn", "models"},
    "export": {"structure", "nn", "models"},
    "report": set(),
    "recipes": set(),
    "demo": set(),
}
TOP = {"__init__", "__main__", "api", "checkpoint_jobs", "cli", "tenfold_cli"}  # may import everything
NO_MATHEMATICS = {"io", "json", "logging", "os", "pathlib", "shutil", "subprocess", "sys", "tempfile"}


def part_of(path: Path) -> str:
    inside = path.relative_to(ROOT).with_suffix("").parts
    return inside[1] if inside[0] == "tenfold" else inside[0]


def imported(path: Path) -> list[str]:
    """Full names of the modules that ``path`` imports anywhere, in functions too."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            whole = node.module == "tenfold"
            names += [f"tenfold.{alias.name}" for alias in node.names] if whole else [node.module]
    return names


def called(path: Path) -> set[str]:
    """Names of the functions that ``path`` calls by a bare name."""
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return {call.id for call in calls if isinstance(call, ast.Name)}


def each(files):
    return pytest.mark.parametrize("path", files, ids=[str(path.relative_to(ROOT)) for path in files])


def test_every_part_is_known():
    assert {part_of(path) for path in FILES} <= MAY_IMPORT.keys() | TOP
    assert {"structure", "nn", "models", "evaluation", "compression", "train"} <= {part_of(path) for path in FILES}


@each([path for path in FILES if part_of(path) not in TOP])
def test_parts_import_only_what_is_below_them(path):
    part = part_of(path)
    for name in imported(path):
        assert not name.startswith("tenfold_cli")
        if name.startswith("tenfold."):
            other = name.split(".")[1]
            assert other == part or other in MAY_IMPORT[part], f"{part} imports {name}"


@each([path for path in FILES if part_of(path) == "structure"])
def test_structure_is_mathematics_only(path):
    roots = {name.split(".")[0] for name in imported(path)}
    assert roots - sys.stdlib_module_names <= {"tenfold", "torch", "opt_einsum", "scipy", "jaxtyping"}
    assert not roots & NO_MATHEMATICS
    assert not [name for name in imported(path) if name.startswith("torch.nn")]
    assert not called(path) & {"open", "print", "input", "exec", "eval"}


@each([path for path in FILES if part_of(path) not in ("models", *TOP)])
def test_only_models_knows_architectures(path):
    assert not [name for name in imported(path) if name.startswith(("transformers.models", "transformers.quantizers"))]


def runtime_imports(path: Path) -> set[str]:
    """Modules of the package that ``path`` imports when it runs, in functions too; not for type checkers alone."""
    tree, names = ast.parse(path.read_text()), set()
    checking = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    skipped = {id(node) for block in checking for node in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def test_files_do_not_import_each_other_in_circles():
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}
    modules = {name.removesuffix(".__init__"): path for name, path in modules.items()}
    packages = {
        name for name, path in modules.items() if path.name == "__init__.py"
    }  # a package names its files' names
    graph = {name: (runtime_imports(path) & modules.keys()) - packages for name, path in modules.items()}
    sorter = TopologicalSorter({name: found for name, found in graph.items() if name not in packages})
    assert list(sorter.static_order())  # raises CycleError with the circle


@each(FILES)
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= LINES


@each([path for path in FILES if "cli" not in path.parts[-2]])
def test_only_the_command_line_prints(path):
    assert "print" not in called(path)


@each(FILES)
def test_nothing_from_a_file_is_run(path):
    """No code and no pickle comes out of a checkpoint or a recipe."""
    source = path.read_text()
    assert not {"pickle", "dill", "joblib"} & {name.split(".")[0] for name in imported(path)}
    assert "torch.load(" not in source
    assert "yaml.unsafe_load" not in source


def public():
    for module in (tenfold, tenfold.structure, tenfold.nn):
        for name in getattr(module, "__all__", None) or vars(module):
            value = getattr(module, name)
            if isinstance(value, type | FunctionType) and not name.startswith("_"):
                yield pytest.param(value, id=f"{module.__name__}.{name}")


@pytest.mark.parametrize("value", public())
def test_public_names_say_what_they_are(value):
    assert value.__doc__
    assert len(value.__doc__) > 20


@each(FILES)
def test_files_say_what_they_are(path):
    if path.read_text().strip():
        assert ast.get_docstring(ast.parse(path.read_text()))
