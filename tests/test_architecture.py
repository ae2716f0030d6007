"""The house (docs/architecture.md): a floor for each room, imports go down only, no private name leaves its room, and
what the Spaces share with the package is copied by one table. No test file imports another."""

import ast
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "grm_hf"
# From the ground up. A room is a file or a folder of the package; it imports from rooms below it.
FLOORS = (
    *("version", "heads_grm", "configuration_grm", "modeling_grm"),
    *("metrics", "losses", "logprobs", "encoding", "chats", "signals", "pairs", "folders", "devices", "products"),
    *("attention", "layouts"),
    "native",
    *("base", "scoring", "rewards", "hub", "evaluation", "preferences", "training", "serving", "lab", "demo"),
    *("cli", "__init__"),
)
# Who may import what is no dependency of the core.
ONLY_IN = {"trl": {"training", "rewards", "lab", "cli"}, "gradio": set(), "evaluate": set(), "vllm": {"serving"}}


def imports(source: str, parts: tuple[str, ...]):
    """Dotted module and imported name of each import in a file at `parts` below the package (`name` is None for
    `import module`)."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                above = ["grm_hf", *parts[:-1]][: len(parts) + 1 - node.level]
                module = ".".join([*above, module] if module else above)
            yield from ((module, alias.name) for alias in node.names)


def faults(source: str, parts: tuple[str, ...], floors=FLOORS) -> list[str]:
    """What a file of the package imports against the order of the house."""
    room, found = parts[0], []
    if room not in floors:
        return [f"{room} has no floor"]
    for module, name in imports(source, parts):
        names = module.split(".")
        if names[0] in ONLY_IN and room not in ONLY_IN[names[0]]:
            found.append(f"imports {names[0]}")
        if names[0] != "grm_hf":
            continue
        if len(names) == 1:  # `from .. import losses`: a room, or a name of the package itself
            target = name if name in floors else "__init__"
        else:
            target = names[1]
        if target == room:
            continue
        if target not in floors or floors.index(target) > floors.index(room):
            found.append(f"imports upwards: {module} {name}")
        if name is not None and name.startswith("_") and not name.startswith("__"):
            found.append(f"imports a private name: {module} {name}")
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_go_down_and_take_no_private_names(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    assert not faults(path.read_text(encoding="utf-8"), parts)


def test_the_check_sees_each_kind_of_fault():
    assert faults("", ("attic", "boxes")) == ["attic has no floor"]
    assert faults("from ..hub import push_folder", ("scoring", "scorer")) == [
        "imports upwards: grm_hf.hub push_folder"
    ]
    assert faults("from .. import GRMScorer", ("hub", "card")) == ["imports upwards: grm_hf GRMScorer"]
    assert faults("from ..encoding import _text", ("hub", "card")) == ["imports a private name: grm_hf.encoding _text"]
    assert faults("def f():\n    import trl", ("hub", "card")) == ["imports trl"]
    assert faults("import vllm", ("scoring", "scorer")) == ["imports vllm"]
    assert not faults("from .card import _join\nfrom ..scoring import GRMScorer\nfrom .. import losses", ("hub", "x"))


def test_the_map_names_every_room_in_order():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = [line.split("`")[1] for line in page.splitlines() if line.startswith("| `")]
    rooms = {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in FILES}
    assert rows == [room for room in FLOORS if room in rooms] and len(rows) == len(rooms)
    drawing = page.split("```")[1]
    assert all(room == "cli" or f"{room}" in drawing for room in rooms - {"__init__"})


def attributes_of_modules(source: str, parts: tuple[str, ...]):
    """Private attributes that a file takes from modules of other rooms (`card._join`)."""
    rooms = {
        name
        for module, name in imports(source, parts)
        if name and module.startswith("grm_hf") and module.split(".")[1:2] not in ([], [parts[0]])
    }
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in rooms:
            if node.attr.startswith("_") and not node.attr.startswith("__"):
                yield f"{node.value.id}.{node.attr}"


def test_no_private_attribute_of_another_room_is_used():
    found = {
        path.relative_to(PACKAGE).as_posix(): used
        for path in FILES
        if (used := list(attributes_of_modules(path.read_text("utf-8"), path.relative_to(PACKAGE).parts)))
    }
    assert not found
    assert list(attributes_of_modules("from ..hub import card\ncard._join()", ("training", "x.py"))) == ["card._join"]


# --------------------------------------------------------------------------------------------------------------- tests


def test_no_test_file_is_imported_by_another_file():
    """What two of them need lies in a module named by its subject (tests/tiny.py, ...). Scripts in strings count."""
    imported = {
        (path.name, name)
        for folder in ("tests", "benchmarks", "examples")
        for path in (ROOT / folder).rglob("*.py")
        for name in re.findall(r"^\s*(?:from|import) +(test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        if name != path.stem
    }
    assert not imported


# -------------------------------------------------------------------------------------------------------------- copies


def copies():
    lines = (ROOT / "spaces" / "copies.txt").read_text(encoding="utf-8").splitlines()
    return [tuple(line.split()) for line in lines]


@pytest.mark.parametrize(("source", "copy"), copies())
def test_what_spaces_share_with_the_package_is_equal(source, copy):
    assert (ROOT / source).read_bytes() == (ROOT / copy).read_bytes(), "run `make copies`"


def test_every_copy_stands_in_the_table():
    """A file of a Space that is named like one of the package, or like one of another Space, is its copy."""
    files = [path for path in (ROOT / "spaces").rglob("*.py") if path.name != "app.py"]
    names = [path.name for path in [*PACKAGE.glob("*.py"), *files]]
    there = {path.relative_to(ROOT).as_posix() for path in files if names.count(path.name) > 1}
    assert there - {source for source, _ in copies()} == {copy for _, copy in copies()}
