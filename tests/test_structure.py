"""The structure of the tree: rooms, and the folders inside a room, import in one direction; modules import in no circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("kernels", "plugins", "pipelines", "ui")  # a room imports from those before it
LOOSE_FILES = 10  # at most, in a room: more belong in folders

# What a folder holds: groups of its folders and files, lowest first. A group imports from those before it, not from one
# after it and not from a neighbor in its own group. A new folder or file must be put in its place here.
ORDER: dict[str, list[tuple[str, ...]]] = {
    "kernels": [("chips", "device", "errors"), ("plans",), ("selection",), ("attention",), ("fused",)],
    "plugins": [
        ("errors", "text_format", "torch_compat", "tuning"),
        ("diffusers_compat",),
        ("hooks",),
        ("autoencoders", "masks"),
        ("models",),
        ("methods",),
        ("context_parallel",),
        ("additions", "presets", "schedule", "step_caches"),
        ("config",),
        ("runtime",),
        ("patching",),
        ("guidance", "streaming"),
        ("explain", "summary", "watch"),
    ],
    "pipelines": [
        ("errors", "options"),
        ("media",),
        ("latent_spaces",),
        ("loading",),
        ("quality", "conditioning"),
        ("generation", "tuning"),
        ("calibration", "memory", "parallel"),
        ("streaming",),
        ("highres",),
        ("batch",),
        ("verification",),
    ],
    "plugins/methods": [
        ("head_part", "option_text"),
        ("base",),
        ("windows",),
        ("dynamic",),
        ("calibrated", "dense", "draft", "inward", "shifted_windows", "sta", "xattention"),
        ("auto", "neighborhood"),
        ("published",),
    ],
    "ui": [("common",), ("web",), ("cli",)],
    "ui/web": [("common",), ("jobs",), ("forms", "live"), ("tabs",), ("page",), ("server",)],
}


def module_of(path: Path, root: Path) -> str:
    """``kernels/plans/layout.py`` → ``kernels.plans.layout``; a package is called by its folder's name."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.Module, known: set[str], local: bool) -> set[str]:
    """The modules of ``known`` that a source file imports; those imported inside functions too if ``local``.

    Imports under ``if TYPE_CHECKING:`` do not happen at run time and do not count.
    """

    def nodes(node: ast.AST) -> Iterator[ast.AST]:
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            children: list[ast.AST] = list(node.orelse)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not local:
            children = []
        else:
            children = list(ast.iter_child_nodes(node))
        for child in children:
            yield from nodes(child)

    names: set[str] = set()
    for node in nodes(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            # The package, and the module that a name may be.
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return {name.removeprefix("tilewise.") for name in names if name.startswith("tilewise.")} & known


def import_graph(root: Path = ROOT, local: bool = True) -> dict[str, set[str]]:
    """Each module of the rooms → the modules that it imports."""
    files = {module_of(path, root): path for room in ROOMS for path in sorted((root / room).rglob("*.py"))}
    known = set(files)
    return {name: imports(ast.parse(path.read_text()), known, local) - {name} for name, path in files.items()}


def pointing_up(graph: dict[str, set[str]], folder: str, groups: list[tuple[str, ...]]) -> set[tuple[str, str]]:
    """Imports between what lies in ``folder`` that go to a later group or to a neighbor in the same one."""
    prefix = folder.replace("/", ".") + "."
    level = {place: i for i, group in enumerate(groups) for place in group}

    def place(module: str) -> str:
        return module.removeprefix(prefix).split(".")[0]

    return {
        (module, imported)
        for module, found in graph.items()
        for imported in found
        if module.startswith(prefix) and imported.startswith(prefix)
        if place(module) != place(imported) and level[place(module)] <= level[place(imported)]
    }


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or not: the strongly connected components, by Tarjan's algorithm."""
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = lowest[node] = len(index)
        stack.append(node)
        for after in sorted(graph[node]):
            if after not in index:
                visit(after)
                lowest[node] = min(lowest[node], lowest[after])
            elif after in stack:
                lowest[node] = min(lowest[node], index[after])
        if lowest[node] == index[node]:
            at = stack.index(node)
            component = sorted(stack[at:])
            del stack[at:]
            if len(component) > 1:
                found.append(component)

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    return import_graph()


def test_rooms_import_one_way(graph):
    for module, found in graph.items():
        for imported in found:
            room, other = module.split(".")[0], imported.split(".")[0]
            assert ROOMS.index(other) <= ROOMS.index(room), f"{module} imports {imported}"


@pytest.mark.parametrize("folder", ORDER)
def test_every_folder_and_file_has_its_place(folder):
    there = {p.stem for p in (ROOT / folder).glob("*.py")}
    there |= {p.name for p in (ROOT / folder).iterdir() if p.is_dir() and any(p.rglob("*.py"))}
    placed = {place for group in ORDER[folder] for place in group}
    assert there <= placed, f"{sorted(there - placed)} in {folder}/ have no place in ORDER"


@pytest.mark.parametrize("folder", ORDER)
def test_folders_import_one_way(graph, folder):
    """Imports inside functions count; those under ``TYPE_CHECKING`` do not."""
    up = pointing_up(graph, folder, ORDER[folder])
    assert not up, "\n".join(
        f"{module} imports {imported}, which is not below it in ORDER" for module, imported in sorted(up)
    )


def test_modules_import_in_no_circle():
    found = circles(import_graph(local=False))
    assert not found, "\n".join(" ↔ ".join(circle) for circle in found)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_has_few_loose_files(room):
    loose = sorted(path.name for path in (ROOT / room).glob("*.py"))
    assert len(loose) <= LOOSE_FILES, f"{len(loose)} loose files in {room}/: {loose}"


class TestOnATreeOfItsOwn:
    """The checks above see what they are for."""

    @pytest.fixture
    def tree(self, tmp_path):
        def write(name: str, source: str) -> None:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)

        write("plugins/low/a.py", "import torch\n")
        write("plugins/high/b.py", "from tilewise.plugins.low.a import name\n")
        return write

    def up(self, root: Path) -> set[tuple[str, str]]:
        return pointing_up(import_graph(root), "plugins", [("low",), ("high", "beside")])

    @pytest.mark.parametrize(
        "source",
        [
            "from tilewise.plugins.high.b import name\n",
            "from tilewise.plugins.high import b\n",
            "import tilewise.plugins.high.b\n",
            "def f():\n    from tilewise.plugins.high.b import name\n",
            "try:\n    import tilewise.plugins.high.b as b\nexcept ImportError:\n    pass\n",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    pass\nelse:\n    import tilewise.plugins.high.b\n",
        ],
        ids=["from", "module from", "import", "in a function", "in a try", "else of TYPE_CHECKING"],
    )
    def test_an_import_that_points_up(self, tree, tmp_path, source):
        assert self.up(tmp_path) == set()
        tree("plugins/low/a.py", source)
        assert self.up(tmp_path) == {("plugins.low.a", "plugins.high.b")}

    def test_an_import_of_a_neighbor(self, tree, tmp_path):
        tree("plugins/beside/c.py", "from tilewise.plugins.high.b import name\n")
        assert self.up(tmp_path) == {("plugins.beside.c", "plugins.high.b")}

    def test_imports_for_types_alone_do_not_count(self, tree, tmp_path):
        source = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from tilewise.plugins.high.b import name\n"
        tree("plugins/low/a.py", source)
        assert self.up(tmp_path) == set()

    def test_a_circle_of_three(self, tree, tmp_path):
        assert circles(import_graph(tmp_path, local=False)) == []
        tree("plugins/low/a.py", "from tilewise.plugins.low import c\n")
        tree("plugins/low/c.py", "from tilewise.plugins.high.b import name\n")
        three = ["plugins.high.b", "plugins.low.a", "plugins.low.c"]
        assert circles(import_graph(tmp_path, local=False)) == [three]
        # An import inside a function opens it: it happens when the function is called.
        tree("plugins/low/c.py", "def f():\n    from tilewise.plugins.high.b import name\n")
        assert circles(import_graph(tmp_path, local=False)) == []
