"""The layout, enforced by reading the source: who imports whom, how much code there is, what has a docstring."""

import ast
import graphlib
import io
import sys
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from conftest import REPOSITORY

PACKAGE = "hubmodels"

# Room -> the rooms it may import, most basic first. A room is a module or a subpackage; modules of one room may import
# each other, but for the families, of which none knows another.
ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "packing": {"errors"},
    "catalog": {"errors"},
    "checkpoint.tensors": {"errors"},
    "checkpoint.report": {"checkpoint.tensors"},
    "checkpoint.keymap": {"checkpoint.report", "checkpoint.tensors", "errors"},
    "checkpoint.config": {"checkpoint.keymap", "errors"},
    "checkpoint.torch_file": {"checkpoint.tensors", "errors"},
    "checkpoint.tensorflow_file": {"checkpoint.tensors", "errors"},
    "checkpoint.readers": {"checkpoint.torch_file", "checkpoint.tensorflow_file", "checkpoint.tensors", "errors"},
    "checkpoint.dialects": {"checkpoint.torch_file", "checkpoint.report", "checkpoint.tensors", "errors"},
    "checkpoint": set(),
    "cache": {"packing", "errors"},
    "products": set(),
    "kernels": {"products", "cache", "packing"},
    "layers": {"products", "kernels", "cache", "packing", "errors"},
    "graphs": {"layers", "cache", "packing"},
    "steps": {"cache"},
    "transformer": {"layers", "cache", "packing", "errors"},
    "maps": {"kernels", "layers", "products"},
    "fused": {"maps", "layers", "kernels", "cache", "packing"},
    "compiled": {"fused", "steps", "cache", "packing", "errors"},
    "convolution": {"maps", "products"},
    "prepack": {
        "compiled",
        "fused",
        "convolution",
        "maps",
        "graphs",
        "layers",
        "products",
        "kernels",
        "cache",
        "packing",
        "errors",
    },
    "generation": {"prepack", "steps", "cache", "errors"},
    "heads": {"transformer", "layers", "errors"},
    "language_model": {"heads", "generation", "steps", "transformer", "layers", "cache", "packing", "errors"},
    "families": {
        "language_model",
        "heads",
        "transformer",
        "layers",
        "checkpoint.config",
        "checkpoint.keymap",
        "errors",
    },
    "tokenizers": {"errors"},
    "store": {"catalog", "errors"},
    "local": {"catalog", "tokenizers", "errors"},
    "loading": {
        "local",
        "store",
        "catalog",
        "checkpoint.config",
        "checkpoint.keymap",
        "checkpoint.readers",
        "checkpoint.report",
        "checkpoint.tensors",
        "checkpoint.dialects",
        "tokenizers",
        "heads",
        "transformer",
        "layers",
        "errors",
    },  # no family: an entry point hands its own over
    "saving": {"loading", "local", "checkpoint.config", "tokenizers", "heads", "errors"},
    "tasks": {"language_model", "generation", "heads", "transformer", "tokenizers", "errors"},
    "hub": {
        "tasks",
        "transformer",
        "loading",
        "families",
        "catalog",
        "cache",
        "checkpoint.config",
        "tokenizers",
        "errors",
    },
    "vocabulary": {"loading", "errors"},
    "conversion": {
        "vocabulary",
        "hub",
        "saving",
        "loading",
        "local",
        "catalog",
        "checkpoint.keymap",
        "checkpoint.report",
        "tokenizers",
        "heads",
        "errors",
    },
    "verification": {"hub", "store", "catalog", "errors"},
    "kit": {"store", "catalog", "errors"},
    "pinning": {"hub", "local", "store", "catalog", "errors"},
    "": {"hub", "conversion", "vocabulary", "saving", "prepack", "verification"},  # hubmodels/__init__.py
    "training": {
        "",
        "conversion",
        "vocabulary",
        "hub",
        "saving",
        "loading",
        "local",
        "families",
        "heads",
        "layers",
        "products",
        "tokenizers",
        "store",
        "checkpoint.config",
        "errors",
    },
    "bench": {"", "hub", "maps", "compiled", "catalog", "errors"},
    "cli": {
        "",
        "bench",
        "conversion",
        "saving",
        "checkpoint.report",
        "verification",
        "kit",
        "pinning",
        "training",
        "vocabulary",
        "hub",
        "tasks",
        "generation",
        "store",
        "catalog",
        "errors",
    },
    "__main__": {"cli"},
}
AT_START = {"torch", "typing_extensions"}  # third-party packages that may be imported before they are needed
AT_TRAINING = {"numpy"}  # and those for training, which nothing else imports
# Six afternoons: what one reads to understand the models, from a name to a number; the formats of files; what becomes
# of whole checkpoints; how the bytes got here; how a machine is made the most of; and how that is measured. Training is
# none of them.
FORMATS = {f"checkpoint.{name}" for name in ("tensors", "readers", "torch_file", "tensorflow_file", "dialects")}
STORE = {"store", "kit", "verification", "pinning", "cli"}
CHECKPOINTS = {"local", "saving", "conversion", "vocabulary"}
MOST_CODE_LINES = {
    "models": 3260,
    "formats": 900,
    "checkpoints": 700,
    "store and commands": 2100,
    "acceleration": 1140,
    "benchmark": 1000,
}
SIDES = {
    "store and commands": STORE,
    "formats": FORMATS,
    "checkpoints": CHECKPOINTS,
    "acceleration": {"kernels", "products", "maps", "convolution", "prepack", "fused", "graphs", "steps", "compiled"},
    "benchmark": {"bench"},
}
LONGEST_FUNCTION = 60


@cache
def modules() -> dict[str, Path]:
    """Name within the package -> file; "" is the package itself."""
    root = REPOSITORY / PACKAGE
    names = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


@cache
def syntax(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def room_of(module: str) -> str | None:
    """The longest entry of the table that the module is or lies in."""
    parts = module.split(".") if module else []
    names = [".".join(parts[:length]) for length in range(len(parts), 0, -1)] or [""]
    return next((name for name in names if name in ROOMS), None)


def absolute(module: str, path: Path, node: ast.ImportFrom) -> str:
    """The full name that `from … import` starts from."""
    if node.level == 0:
        return node.module or ""
    here = [PACKAGE, *module.split(".")] if module else [PACKAGE]
    if path.name != "__init__.py":
        here = here[:-1]
    base = here[: len(here) - node.level + 1]
    return ".".join([*base, *([node.module] if node.module else [])])


def imports(module: str, path: Path, nodes: Iterator[ast.AST]) -> Iterator[str]:
    """Full names of the modules that the import statements among `nodes` name."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = absolute(module, path, node)
            for alias in node.names:  # `from . import store` names a module, `from .store import fetch` does not
                inner = f"{source}.{alias.name}"
                yield inner if inner.removeprefix(f"{PACKAGE}.") in modules() else source


def ours(names: Iterator[str]) -> set[str]:
    """Those in the package, by their names within it."""
    return {n.removeprefix(PACKAGE).removeprefix(".") for n in names if n.split(".")[0] == PACKAGE}


@cache
def our_imports(module: str) -> frozenset[str]:
    path = modules()[module]
    return frozenset(ours(imports(module, path, ast.walk(syntax(path)))))


def outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    """What runs when the module is imported."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from outside_functions(child)


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    yield from (n for n in ast.walk(syntax(path)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


def test_every_module_has_a_room():
    assert [module for module in modules() if room_of(module) is None] == []


def test_every_room_is_lived_in_and_stands_on_those_before_it():
    inhabited = {room_of(module) for module in modules()}
    assert set(ROOMS) == inhabited
    names = list(ROOMS)
    assert [(room, low) for room in ROOMS for low in ROOMS[room] if names.index(low) > names.index(room)] == []


def test_imports_run_downwards():
    wrong = []
    for module, imported in sorted((name, low) for name in modules() for low in our_imports(name)):
        room, low_room = room_of(module), room_of(imported)
        between_families = room == low_room == "families" and imported != module
        if between_families or low_room not in ROOMS[room] | {room}:
            wrong.append(f"{module or PACKAGE} imports {imported or PACKAGE}")
    assert wrong == []


def test_no_module_imports_itself_in_a_circle():
    graphlib.TopologicalSorter({m: our_imports(m) for m in modules()}).prepare()  # raises CycleError, which shows it


def test_hubconf_imports_the_entry_points_and_the_standard_library():
    found = set(imports("", REPOSITORY / "hubconf.py", ast.walk(syntax(REPOSITORY / "hubconf.py"))))
    others = {name for name in found if name.split(".")[0] not in sys.stdlib_module_names}
    assert others
    assert [name for name in others if not f"{name}.".startswith(f"{PACKAGE}.hub.")] == []


def test_the_start_needs_torch_alone():
    found = {
        f"{module} imports {name}"
        for module, path in modules().items()
        for name in imports(module, path, outside_functions(syntax(path)))
        if name.split(".")[0]
        not in sys.stdlib_module_names
        | {PACKAGE}
        | AT_START
        | (AT_TRAINING if room_of(module) == "training" else set())
    }
    assert found == set()


def test_our_own_modules_are_imported_at_the_start():
    """Later, another version loaded through torch.hub may stand under the name: half of each would run."""
    later = [
        f"{module}.{function.name}"
        for module, path in modules().items()
        if room_of(module) != "cli"  # a process of its own
        for function in functions(path)
        if ours(imports(module, path, ast.walk(function)))
    ]
    assert later == []


def code_lines(path: Path) -> int:
    """Lines with code on them: no blank lines, comments or docstrings."""
    text = path.read_text(encoding="utf-8")
    no_code = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in no_code:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(syntax(path)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                lines -= set(range(first.lineno, first.end_lineno + 1))
    return len(lines)


def test_code_lines_are_counted_without_comments_and_docstrings(tmp_path):
    path = tmp_path / "sample.py"
    path.write_text(
        '"""Two\nlines."""\n\n# why\nx = (\n    1  # one\n)\n\n\ndef f():\n    """Doc."""\n    return """a\nb"""\n'
    )
    assert code_lines(path) == 3 + 3


def test_each_side_of_the_package_can_be_read_in_an_afternoon():
    counts = dict.fromkeys(MOST_CODE_LINES, 0)
    for module, path in modules().items():
        if room_of(module) != "training":
            room = room_of(module)
            side = next((side for side, rooms in SIDES.items() if room in rooms), "models")
            counts[side] += code_lines(path)
    assert {side: count for side, count in counts.items() if count > MOST_CODE_LINES[side]} == {}


def test_no_function_is_long():
    lengths = {
        f"{module}:{function.name}": function.end_lineno - function.lineno + 1
        for module, path in modules().items()
        for function in functions(path)
    }
    assert {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION} == {}


def test_modules_and_public_functions_have_a_docstring():
    """A class may be said by its name, a method by its class, and a function of one statement by its name."""
    missing = []
    for module, path in modules().items():
        tree = syntax(path)
        if not ast.get_docstring(tree):
            missing.append(module)
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and len(node.body) > 1:
                missing += [] if ast.get_docstring(node) else [f"{module}.{node.name}"]
    assert missing == []
