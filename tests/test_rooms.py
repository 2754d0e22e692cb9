"""Who may import whom: the rooms of docs/architecture.md, and no circle of modules anywhere."""

import ast
import textwrap
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "ssod_imwa"

# A room, and the rooms that it may import beside itself. Nothing is above but tools and tests.
ROOMS = """
errors         :
averaging      :
engine         : averaging errors
config         : errors
data           : averaging engine config errors
task           : averaging engine config errors
detection      : averaging engine config data task errors
classification : averaging engine config data task errors
runs           : averaging engine config data task detection classification errors
visualization  : engine runs errors
papers         : engine config runs visualization errors
analysis       : averaging engine config data detection classification runs visualization errors
integrations   : averaging engine config data detection runs errors
cli            : errors
interruptible  :
"""
ALLOWED = {
    room.strip(): set(below.split())
    for room, below in (line.split(":") for line in ROOMS.strip().splitlines())
}


TASKS = ("detection", "classification")


def module_name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported_names(path):
    return names_in(ast.parse(path.read_text(encoding="utf-8")))


def names_in(tree):
    """Every module or name of a module that code imports, inside functions and strings, too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import of {node.module}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (x.value for x in node.args if isinstance(x, ast.Constant))


def imports_of(module):
    """The modules of ours that a module imports."""
    return {
        name if name in FILES else name.rpartition(".")[0]  # a name of a module
        for name in imported_names(FILES[module])
        if name.split(".")[0] == "ssod_imwa"
    } - {"ssod_imwa"}


IMPORTS = {module: imports_of(module) for module in FILES}


def room_of(module):
    return module.split(".")[1]


def in_words(first, second):
    return first.removeprefix("ssod_imwa."), second.removeprefix("ssod_imwa.")


def runs_before(module):
    """What is executed before a module is: its imports, and the packages that these are in."""
    names = IMPORTS[module]
    packages = {
        ".".join(name.split(".")[:n]) for name in names for n in range(2, name.count(".") + 1)
    }
    around = {package for package in packages if f"{module}.".startswith(f"{package}.")}
    return names | packages - around


def test_every_module_is_in_a_room():
    assert {room_of(module) for module in FILES if module != "ssod_imwa"} == ALLOWED.keys()


def test_imports_go_down():
    wrong = {
        in_words(module, other)
        for module, others in IMPORTS.items()
        for other in others
        if module == "ssod_imwa"
        or room_of(other) not in {room_of(module), *ALLOWED[room_of(module)]}
    }
    assert wrong == set()


def test_the_architecture_shows_the_table():
    page = (PACKAGE.parent / "docs/architecture.md").read_text(encoding="utf-8")
    assert textwrap.indent(ROOMS.strip(), "    ") in page


def test_of_what_is_below_runs_only_builders_read_the_configuration():
    readers = {
        module
        for module, path in FILES.items()
        if module != "ssod_imwa" and room_of(module) in ("averaging", "engine", "data", *TASKS)
        if any(name.endswith(".CfgNode") for name in imported_names(path))
    }
    stems = {module.rpartition(".")[2] for module in readers}
    builders = {"build", "networks", "task", "keys", "export"}
    assert {stem for stem in stems if not stem.startswith("detectron2")} <= builders


def test_rooms_have_an_order():
    order = list(TopologicalSorter(ALLOWED).static_order())  # raises at a circle
    assert order.index("detection") < order.index("runs")


def test_no_module_leads_back_to_itself():
    try:
        TopologicalSorter({module: runs_before(module) for module in FILES}).prepare()
    except CycleError as error:
        circle = " -> ".join(reversed(error.args[1]))
        raise AssertionError(f"a circle of imports: {circle}") from None


def test_only_what_needs_an_optional_package_is_imported_inside_a_function():
    inside = {
        name
        for path in FILES.values()
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(function, ast.FunctionDef)
        for name in names_in(function)
        if name.startswith("ssod_imwa")
    }
    assert all(".detectron2" in name for name in inside)


def reachable(module):
    """Every module that is executed when a module is imported."""
    seen, waiting = set(), [module]
    while waiting:
        for other in runs_before(waiting.pop()) - seen:
            seen.add(other)
            waiting.append(other)
    return seen


def test_pictures_and_plots_load_no_task():
    loaded = {
        in_words(module, other)
        for module in FILES
        if module.startswith("ssod_imwa.visualization.")
        for other in reachable(module)
        if room_of(other) in ("task", *TASKS)
    }
    assert loaded == set()


def test_detectron2_is_imported_where_it_is_meant_to_be():
    importing = {
        module.removeprefix("ssod_imwa.")
        for module, path in FILES.items()
        if any(name.split(".")[0] == "detectron2" for name in imported_names(path))
    }
    allowed = (
        "detection.data.detectron2",
        "detection.detectors.detectron2",
        "integrations.detectron2.",
    )
    assert {module for module in importing if not module.startswith(allowed)} == set()


def test_the_architecture_shows_these_arrows():
    page = (PACKAGE.parent / "docs/architecture.md").read_text(encoding="utf-8")
    assert "".join(f"    {line}\n" for line in ROOMS.strip().splitlines()) in page
