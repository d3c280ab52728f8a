"""The layout is the architecture: imports go one way, never in a circle, and a class name means one thing."""

import ast
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("unique_asr", "kernels", "app", "scripts", "benchmarks")

# Lower layers first. A module imports from its own layer and from lower ones.
LAYERS = [
    ["unique_asr.kernels"],
    ["unique_asr.attention"],
    [
        *("unique_asr.audio", "unique_asr.channels", "unique_asr.duration", "unique_asr.packets", "unique_asr.vad"),
        *("unique_asr.remote", "unique_asr.transcript", "unique_asr.sentences"),
    ],
    ["unique_asr.data", "unique_asr.subtitle_units", "unique_asr.subtitles", "unique_asr.writers"],
    ["unique_asr.decoding", "unique_asr.models"],
    ["unique_asr.generation", "unique_asr.longform"],
    ["unique_asr.transcribers"],
    ["unique_asr.pipeline"],
    ["unique_asr"],  # the public names
    ["unique_asr.application"],
    [
        "unique_asr.app",
        "unique_asr.benchmark",
        "unique_asr.distributed",
        "unique_asr.evaluation",
        "unique_asr.server",
        "unique_asr.training",
    ],
    ["scripts", "benchmarks"],
]
# Stricter than the layers: what these may import at all.
ALLOWED = {
    "unique_asr.kernels": {"unique_asr.kernels"},
    "unique_asr.attention": {"unique_asr.attention", "unique_asr.kernels"},
    "unique_asr.decoding": {"unique_asr.decoding", "unique_asr.attention"},
}


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] in ("kernels", "app"):  # inside the package once installed
        parts.insert(0, "unique_asr")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))}


def imported_modules(source: str, name: str, is_package: bool = False) -> set[str]:
    """Modules of this project that a source imports anywhere: in functions and under TYPE_CHECKING too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name.split(".") if is_package else name.split(".")[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            for alias in node.names:  # a submodule, or a name of the module
                found.add(f"{base}.{alias.name}" if f"{base}.{alias.name}" in SOURCES else base)
    return {module for module in found if module in SOURCES} - {name}


IMPORTS = {
    name: imported_modules(path.read_text(encoding="utf-8"), name, path.name == "__init__.py")
    for name, path in SOURCES.items()
}


def layer_of(module: str) -> int:
    """The layer of the longest prefix that has one."""
    matches = [
        (len(prefix), index)
        for index, layer in enumerate(LAYERS)
        for prefix in layer
        if module == prefix or (module.startswith(f"{prefix}.") and prefix != "unique_asr")
    ]
    assert matches, f"{module}: give it a layer in {__file__}"
    return max(matches)[1]


def test_no_import_circle():
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail("import circle: " + " <- ".join(error.args[1]))


def test_a_circle_would_be_found():
    imports = {"unique_asr.audio": imported_modules("def f():\n    import unique_asr.vad", "unique_asr.audio")}
    imports["unique_asr.vad"] = imported_modules("from .audio import load", "unique_asr.vad")
    assert imports == {"unique_asr.audio": {"unique_asr.vad"}, "unique_asr.vad": {"unique_asr.audio"}}
    with pytest.raises(CycleError):
        TopologicalSorter(imports).prepare()


def test_imports_go_down_the_layers():
    against = [
        f"{name} imports {module}"
        for name, modules in IMPORTS.items()
        for module in sorted(modules)
        if layer_of(module) > layer_of(name)
    ]
    assert not against


@pytest.mark.parametrize("package", ALLOWED)
def test_what_a_package_may_import(package):
    inside = [name for name in IMPORTS if name == package or name.startswith(f"{package}.")]
    assert inside
    strange = [
        f"{name} imports {module}"
        for name in inside
        for module in sorted(IMPORTS[name])
        if not any(module == allowed or module.startswith(f"{allowed}.") for allowed in ALLOWED[package])
    ]
    assert not strange


def test_a_class_name_means_one_thing():
    names = Counter(
        node.name
        for path in SOURCES.values()
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
    )
    assert not [name for name, count in names.items() if count > 1]
