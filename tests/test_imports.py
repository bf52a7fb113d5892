"""The layers of the package: what each may import, in the order in which the data flows, without cycles."""

import ast
from pathlib import Path

import pytest

import hf_offline_compress

PACKAGE = Path(hf_offline_compress.__file__).parent
# From the bottom up: a module imports from its own layer and from those before it. A root module is a layer by itself.
LAYERS = (
    ("errors", "version"),
    ("runtime",),
    ("foundation",),
    ("structures",),
    ("architectures",),
    ("registration",),
    ("adapters",),
    ("base",),
    ("request",),
    ("plan",),
    ("measure",),
    ("vocabulary",),
    ("solvers",),
    ("artifact",),
    ("metrics",),
    ("solve",),
    ("allocate",),
    ("card",),
    ("verifying",),
    ("hub",),
    ("compressor",),
    ("export",),
    ("evaluate",),
    ("",),  # the package itself: the public names
    ("cli",),
    ("__main__",),
)
FLOOR = {layer: floor for floor, layers in enumerate(LAYERS) for layer in layers}


def modules():
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), file


MODULES = dict(modules())


def layer_of(module):
    return module.partition(".")[0]


def imports_of(module):
    """Give the modules of the package that one imports, those within functions included."""
    file = MODULES[module]
    here = module.split(".") if module else []
    package = here if file.name == "__init__.py" else here[:-1]
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith(PACKAGE.name)):
            if node.level:
                base = [*package[: len(package) - node.level + 1], *(node.module.split(".") if node.module else [])]
            else:
                base = node.module.split(".")[1:]
            for name in node.names:
                inner = ".".join([*base, name.name])
                yield inner if inner in MODULES else ".".join(base)


def test_every_module_has_a_layer():
    assert {layer_of(module) for module in MODULES} == set(FLOOR)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    own = FLOOR[layer_of(module)]
    above = [name for name in imports_of(module) if layer_of(name) != layer_of(module) and FLOOR[layer_of(name)] >= own]
    assert not above, f"{module} imports {above}, which {'are' if len(above) > 1 else 'is'} not below it"


def test_no_cycles():
    graph = {module: {name for name in imports_of(module) if name != module} for module in MODULES}
    done, path = set(), []

    def visit(module):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            path.append(module)
            for name in sorted(graph[module]):
                visit(name)
            path.pop()
            done.add(module)

    for module in graph:
        visit(module)
    assert any(graph.values())


def test_the_runtime_is_alone():
    assert not {name for module in MODULES if layer_of(module) == "runtime" for name in imports_of(module)} - {
        name for name in MODULES if layer_of(name) == "runtime"
    }
