"""House rules that a machine can hold. The reasons are in CONTRIBUTING.md."""

import ast
import builtins
import errno
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockvirt import errors, limits

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "blockvirt"
MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 70
GRAB_BAGS = {"utils", "util", "helpers", "helper", "common", "misc", "manager"}
BUILTIN_EXCEPTIONS = {
    name for name, value in vars(builtins).items() if isinstance(value, type) and issubclass(value, BaseException)
}
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|HACK|NotImplementedError)\b")

MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = sorted([*MODULES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])

Function = ast.FunctionDef | ast.AsyncFunctionDef


def named(path: Path) -> str:
    """The path as people write it."""
    return str(path.relative_to(ROOT))


def lines_of(node: Function) -> int:
    """How long a function is, its docstring and decorators included."""
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    assert node.end_lineno is not None
    return node.end_lineno - first + 1


def public_nodes(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.ClassDef | Function]]:
    """Public classes and functions, and the public methods of public classes, by their dotted names."""
    for node in body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
            continue
        decorators = {ast.unparse(decorator).split(".")[-1] for decorator in node.decorator_list}
        if decorators & {"overload", "setter", "override"}:
            continue  # what it is for is said where the name is first defined
        yield prefix + node.name, node
        if isinstance(node, ast.ClassDef):
            yield from public_nodes(node.body, f"{prefix}{node.name}.")


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_a_module_is_one_room(path: Path) -> None:
    """A module that does not fit in the head is two modules."""
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_MODULE_LINES
    assert path.stem not in GRAB_BAGS, "name it by what it holds"


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_functions_fit_on_a_screen(path: Path) -> None:
    """Longer ones hide a decision in the middle."""
    tree = ast.parse(path.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    too_long = {node.name: lines_of(node) for node in functions if lines_of(node) > MAX_FUNCTION_LINES}
    assert not too_long


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_what_is_public_says_what_it_is_for(path: Path) -> None:
    """Module, class, function, method: each public one has a docstring."""
    tree = ast.parse(path.read_text())
    silent = [name for name, node in public_nodes(tree.body) if not ast.get_docstring(node)]
    if not ast.get_docstring(tree):
        silent.append("the module itself")
    assert not silent


@pytest.mark.parametrize("path", [path for path in SOURCES if path != Path(__file__)], ids=named)
def test_nothing_is_left_open(path: Path) -> None:
    """What is not done is not in the code; it is an issue, or a sentence in the documents."""
    found = [line.strip() for line in path.read_text().splitlines() if UNFINISHED.search(line)]
    assert not found


@pytest.mark.parametrize("path", [path for path in MODULES if "cli" not in path.parts], ids=named)
def test_only_the_command_line_prints(path: Path) -> None:
    """A daemon logs; what it prints is lost or ends up in somebody's pipe."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert not [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]


# --- errors ----------------------------------------------------------------------------------------------------------


def error_classes() -> list[type[errors.BlockvirtError]]:
    """Every class of the tree."""
    return [
        value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, errors.BlockvirtError)
    ]


def test_every_error_has_a_code_of_its_own() -> None:
    """Programs tell errors apart by their codes; a code that two share tells them nothing."""
    classes = error_classes()
    assert len(classes) > 10
    codes = [vars(kind).get("code") for kind in classes]
    assert None not in codes, "each class states its own code"
    assert len(set(codes)) == len(codes)


@pytest.mark.parametrize("kind", error_classes(), ids=lambda kind: kind.__name__)
def test_an_error_can_be_said_on_every_edge(kind: type[errors.BlockvirtError]) -> None:
    """A code for programs, an errno for NBD, a status for HTTP."""
    assert re.fullmatch(r"[a-z]+(-[a-z]+)*", kind.code)
    assert kind.nbd_errno in errno.errorcode
    assert 400 <= kind.http_status <= 599


def exceptions_outside_the_tree() -> set[str]:
    """Dotted names of the classes that derive straight from a built-in exception, errors.py apart."""
    found = set()
    for path in MODULES:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and module != "blockvirt.errors":
                bases = {ast.unparse(base).split(".")[-1] for base in node.bases}
                if bases & BUILTIN_EXCEPTIONS:
                    found.add(f"{module}.{node.name}")
    return found


def test_exceptions_that_leave_their_room_are_in_the_tree() -> None:
    """The edges translate the tree and nothing else; a room's own control flow is its own business."""
    outsiders = exceptions_outside_the_tree()
    strangers = set()
    for path in MODULES:
        room = path.relative_to(PACKAGE).parts[0]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                names = {f"{node.module}.{alias.name}" for alias in node.names} & outsiders
                strangers |= {name for name in names if name.split(".")[1] != room}
    assert not strangers, "derive them in errors.py"


# --- limits ----------------------------------------------------------------------------------------------------------

UNIT_IN_NAME = re.compile(r"_(BYTES|S|CHARS|RATIO|DEPTH)$")
COUNT_IN_NAME = re.compile(r"(^|_)[A-Z]{2,}S(_PER_[A-Z]+)?$")  # a plural: MAX_VOLUMES, MAX_UNITS_PER_HOST


def limit_reasons() -> dict[str, str]:
    """Each constant of limits.py with the comment behind it."""
    text = (PACKAGE / "limits.py").read_text()
    comments = {
        token.start[0]: token.string
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT
    }
    assigned = [node for node in ast.parse(text).body if isinstance(node, ast.Assign)]
    return {ast.unparse(node.targets[0]): comments.get(node.end_lineno or 0, "") for node in assigned}


def test_every_limit_says_why() -> None:
    """A number without its reason can be neither trusted nor changed (I9)."""
    reasons = limit_reasons()
    assert len(reasons) > 20
    assert not [name for name, comment in reasons.items() if len(comment) < 8]


@pytest.mark.parametrize("name", sorted(limit_reasons()))
def test_a_limit_has_its_unit_in_its_name(name: str) -> None:
    """Bytes, seconds, a ratio, or a count of the things that its name is the plural of."""
    value = getattr(limits, name)
    assert value > 0
    if not UNIT_IN_NAME.search(name):
        assert COUNT_IN_NAME.search(name), "no unit, and no plural either"
        assert isinstance(value, int)


def test_every_limit_is_used() -> None:
    """A bound that nothing reads bounds nothing."""
    text = "\n".join(path.read_text() for path in MODULES if path != PACKAGE / "limits.py")
    text += "\n".join(line.split("=", 1)[-1] for line in (PACKAGE / "limits.py").read_text().splitlines())
    assert not [name for name in limit_reasons() if not re.search(rf"\b{name}\b", text)]
