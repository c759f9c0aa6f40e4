"""Imports point left only: data <- models <- training <- diagnosis <- session <- state <- views <- widgets <- app <- cli."""

import ast
import sys
from pathlib import Path

import pytest

from sdl_explorer import _HOME

ROOT = Path(__file__).resolve().parent.parent / "sdl_explorer"

ENGINE = {"data", "models", "training", "diagnosis"}
RECORDS = {f"training.{name}" for name in ("commits", "history", "interventions", "plan", "state")} | {"data.activations", "data.anchors"}
LAYERS = {
    "data": set(),
    "models": {"data"},
    "training": {"data", "models"},
    "diagnosis": {"data", "models", "training"},
    "archive": ENGINE,
    "comparison": ENGINE,
    "control": ENGINE,
    "trial": ENGINE | {"control"},
    "labels": set(),
    "repair": ENGINE | {"control"},
    "settings": ENGINE | {"archive"},
    "survey": ENGINE,
    "running": ENGINE | {"labels", "settings"},
    "studies": ENGINE | {"archive", "comparison", "control", "labels", "repair", "running", "settings", "survey", "trial"},
    "session": ENGINE | {"archive", "labels", "running", "settings", "studies"},
    "state": ENGINE | {"session"},
    "views": {"diagnosis", "labels", "repair", "trial", *RECORDS},
    "widgets": ENGINE | {"labels", "repair", "session", "state", "trial", "views"},
    "app": ENGINE | {"labels", "repair", "session", "state", "studies", "trial", "views", "widgets"},
    "experiments": ENGINE | {"session", "views"},
    "cli": ENGINE | {"session", "app", "doctor", "experiments"},
    "doctor": set(),
    "registry": set(),
    "__init__": set(),  # by name alone, when asked for
    "__main__": {"cli"},
}
EVERYWHERE = {"registry", "__init__", "__version__"}  # they import no other module of ours

GUI = {"widgets", "app"}
AT_HOME = {
    "panel": GUI,
    "panel_material_ui": GUI,
    "bokeh": GUI,
    "ipywidgets": GUI,
    "jupyter_bokeh": GUI,
    "holoviews": GUI | {"views"},
    "datashader": GUI | {"views"},
    "sklearn": {"diagnosis", "models.methods.classical"},
}
INSIDE_FUNCTIONS = {"transformers", "datasets", "sentence_transformers", "sae_lens"}


def module_of(path: Path) -> str:
    """data/bench.py -> "data.bench", data/__init__.py -> "data"."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def imports(tree: ast.AST) -> list[tuple[str, int, bool]]:
    """(dotted name, line, at module level) of every import, those inside functions too."""
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    inside = {id(node) for function in functions for node in ast.walk(function)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno, id(node) not in inside) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            found += [(f"{node.module}.{alias.name}", node.lineno, id(node) not in inside) for alias in node.names]
    return found


def within(name: str, places: set[str]) -> bool:
    return any(name == place or name.startswith(place + ".") for place in places)


def wrong_imports(module: str, source: str) -> list[str]:
    """The imports of a module's source that its layer does not allow."""
    layer, wrong = module.partition(".")[0], []
    for name, line, top in imports(ast.parse(source)):
        package, _, rest = name.partition(".")
        if package == "sdl_explorer":
            target = _HOME.get(rest, name).removeprefix("sdl_explorer").strip(".") or "__init__"
            if not within(target, {layer} | EVERYWHERE | LAYERS[layer]):
                wrong.append(f"line {line}: {module} imports {name}")
        elif package in AT_HOME and not within(module, AT_HOME[package]):
            wrong.append(f"line {line}: {module} imports {package}, which belongs in {', '.join(sorted(AT_HOME[package]))}")
        elif package in INSIDE_FUNCTIONS and top:
            wrong.append(f"line {line}: {module} imports {package} outside a function")
    return wrong


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=module_of)
def test_imports_point_left(path):
    assert path.relative_to(ROOT).parts[0].removesuffix(".py") in LAYERS, f"{path.name} is in no layer: add it to LAYERS"
    assert not wrong_imports(module_of(path), path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("data.bench", "from sdl_explorer.models.dictionary import SparseDictionary"),
        ("models.terms", "def f():\n    from sdl_explorer.training import loop"),
        ("diagnosis.health", "import sdl_explorer.views.health"),
        ("views.health", "from sdl_explorer.session import Session"),
        ("views.health", "from sdl_explorer import Session"),
        ("views.health", "from sdl_explorer.state import ExplorerState"),
        ("views.health", "import panel as pn"),
        ("views.health", "from sdl_explorer.models import dictionary"),
        ("views.health", "from sdl_explorer.training.loop import train"),
        ("session", "from sdl_explorer.app.explorer import Explorer"),
        ("state", "import holoviews as hv"),
        ("training.loop", "from sklearn.decomposition import PCA"),
        ("data.minilm", "import transformers"),
        ("registry", "from sdl_explorer.data.sources import Source"),
    ],
)
def test_a_wrong_import_is_seen(module, source):
    assert wrong_imports(module, source)


def test_engine_modules_do_not_depend_on_the_platform():
    """Modules of one operating system only are imported inside functions, so the library loads everywhere."""
    unix_only = {"fcntl", "grp", "pwd", "resource", "termios"} & set(sys.stdlib_module_names)
    for path in ROOT.rglob("*.py"):
        top = {name.partition(".")[0] for name, _, at_top in imports(ast.parse(path.read_text(encoding="utf-8"))) if at_top}
        assert not top & unix_only, f"{module_of(path)} imports {top & unix_only}"
