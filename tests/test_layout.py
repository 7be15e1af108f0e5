"""The layout of docs/architecture.md: which file may import which, and how large the core is."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CORE = ("model", "vit", "abstractor", "llama", "generate", "lora", "weights")
LAYERS = {  # package: what it may import besides itself and common/
    "common": set(),
    "core": set(),
    "data": {"core"},
    "inference": {"core", "data"},
    "training": {"core", "data"},
    "evaluation": {"core", "data", "inference", "training"},  # of training only training.distributed
    "serving": {"core", "data", "inference"},
    "commands": {"core", "data", "inference", "training", "evaluation", "serving"},
    "experiments": {"core", "data", "inference", "training", "evaluation", "commands", "tools"},
    "tools": {"core", "data", "inference", "training", "evaluation", "commands"},
}
FILES = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path for path in ROOT.glob("*.py")}
FILES |= {
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path
    for package in ("common", "data", "training", "inference", "evaluation", "serving", "tools", "experiments")
    for path in (ROOT / package).rglob("*.py")
}


def layer(module: str) -> str:
    package = module.split(".")[0]
    return "core" if module in CORE else package if package in LAYERS else "commands"


def imports(module: str) -> set[str]:
    """The modules of this project that a module imports, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return (found & set(FILES)) - {module}


def test_each_layer_imports_only_the_layers_below():
    for module in FILES:
        for other in imports(module):
            if other == "command" and "__main__" in FILES[module].read_text(encoding="utf-8"):
                continue  # a module that is also a command: python -m data.check
            allowed = LAYERS[layer(module)] | {layer(module), "common"}
            assert layer(other) in allowed, f"{module} imports {other}"
            if layer(module) == "evaluation" and layer(other) == "training":
                assert other == "training.distributed", f"{module} imports {other}"


def test_no_import_cycles():
    list(TopologicalSorter({module: imports(module) for module in FILES}).static_order())


def test_the_core_stays_small():
    assert len(list(ROOT.glob("*.py"))) <= 15
    assert sum(len(FILES[module].read_text(encoding="utf-8").splitlines()) for module in CORE) <= 1400
