"""The house: the source of rjupyter.py keeps the rules that stand at its head."""

import ast
import binascii
import builtins
import copy
import functools
import re
import shlex
import zlib
from pathlib import Path
from typing import Dict, Iterable, Iterator, List, Set, Tuple

import pytest
from readme import README, readme_events
from sides import TOP

import rjupyter

SOURCE = Path(rjupyter.__file__).read_text()
TREE = ast.parse(SOURCE)
ACTIONS = list(rjupyter.REQUESTS)


def has_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def rooms() -> Dict[str, int]:
    """Return the rooms, each with the line of its banner."""
    found = re.finditer(r"^# -{117}\n# (\w[\w ]*?)(?: \(an annex.*\))?\n#\n# [\w`]", SOURCE, re.MULTILINE)
    return {match.group(1): SOURCE[: match.start()].count("\n") + 1 for match in found}


def test_the_list_of_rooms_is_the_one_of_the_banners() -> None:
    head = SOURCE[: SOURCE.index("\nimport signal")]
    assert re.findall(r"^#   (\w[\w ]*?) {2,}\w", head, re.MULTILINE) == list(rooms())


def definitions(body: Iterable[ast.stmt] = tuple(TREE.body)) -> Dict[str, int]:
    """Return what is defined at the top of the file, with its first line."""
    found: Dict[str, int] = {}
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.setdefault(node.name, node.lineno)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name):
                    found.setdefault(target.id, node.lineno)
    return found


def names_in(node: ast.AST) -> Iterator[ast.Name]:
    """Yield the names that a definition uses, without those in its annotations."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.Name):
                yield child
            if isinstance(child, ast.AST):
                yield from names_in(child)


def own_names(block: ast.AST) -> Set[str]:
    """Return what a definition binds itself: parameters, local names, what it imports and defines."""
    own: Set[str] = set()
    for node in ast.walk(block):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            own.add(node.id)
        elif isinstance(node, ast.arg):
            own.add(node.arg)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            own.add(node.name)
        elif isinstance(node, ast.ExceptHandler):
            own.add(node.name or "")
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            own |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    return own


def test_no_room_uses_a_later_one() -> None:
    places = sorted((line, name) for name, line in rooms().items())

    def room_of(line: int) -> int:
        return sum(start <= line for start, _ in places)

    where = definitions()
    wrong = []
    for node in TREE.body:
        for name in names_in(node):
            later = name.id in where and room_of(where[name.id]) > room_of(node.lineno)
            if later and name.id not in own_names(node):
                wrong.append("%d: %s" % (name.lineno, name.id))
    assert not wrong, "\n".join(wrong)


def calls(names: Iterable[str]) -> Iterator[Tuple[str, ast.Call]]:
    """Yield the calls of methods of these names."""
    for node in ast.walk(TREE):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in names:
            yield node.func.attr, node


def test_every_event_is_one_of_the_table() -> None:
    seen: Set[Tuple[str, str]] = set()
    positions = {"step": 1, "result": 1, "event": 0}
    for method, call in calls(positions):
        arguments = [argument for argument in call.args if not isinstance(argument, ast.Starred)]
        if len(arguments) <= positions[method] or not has_text(arguments[positions[method]]):
            continue
        event = ast.literal_eval(arguments[positions[method]])
        keys = {keyword.arg for keyword in call.keywords if keyword.arg}
        assert keys <= set(rjupyter.EVENTS[event].keys), (call.lineno, event)
        seen.add((method, event))
    assert all(len([event for by, event in seen if by == method]) > 1 for method in positions)


def test_events_of_the_readme_are_the_rows() -> None:
    rows = [
        "| `%s` | %s | %s |" % (n, e.when, ", ".join(map("`{}`".format, e.keys))) for n, e in rjupyter.EVENTS.items()
    ]
    assert "\n".join(rows) in README
    assert readme_events() == {name: list(event.keys) for name, event in rjupyter.EVENTS.items()}


def test_actions_and_exit_statuses_of_the_readme_are_the_rows() -> None:
    actions = ["| `%s` | %s |" % (row.usage, row.help) for row in rjupyter.ACTIONS.values() if row.usage]
    exits = ["| %d | %s |" % row for row in rjupyter.EXITS.items()]
    assert "\n".join(actions) in README and "\n".join(exits) in README


def test_picture_of_the_readme_is_there() -> None:
    (name,) = re.findall(r"^!\[.+\]\((.*)\)$", README, re.MULTILINE)
    assert "rjupyter.py gpu1:work" in (TOP / name).read_text()


def test_help_fits_two_screens_and_has_topics(capsys: pytest.CaptureFixture[str]) -> None:
    text = rjupyter.build_parser().format_help()
    assert len(text.splitlines()) <= 90 and text.index("gpu1:work") < text.index("server:")
    assert rjupyter.main(["--help", "events"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == list(rjupyter.EVENTS)
    assert rjupyter.main(["--help", "status"]) == 0
    assert [int(line.split()[0]) for line in capsys.readouterr().out.splitlines()] == list(rjupyter.EXITS)


def test_examples_of_an_action_are_lines_that_are_taken() -> None:
    """What stands behind a wide gap in an example is a remark."""
    for name in filter(None, rjupyter.ACTIONS):
        for example in rjupyter.ACTIONS[name].examples:
            assert len("  rjupyter.py " + example) <= 80, example  # or it is broken in two in most terminals
            words = shlex.split(re.split(r" {3,}| && | <| \|", example)[0])
            assert rjupyter.parse_arguments(["--no-config", *words]).action == name, example


def test_unknown_fact_of_an_event_is_a_bug_at_once() -> None:
    with pytest.raises(TypeError, match="colour"):
        rjupyter.Messages().event("open", colour="red")


def test_actions_of_the_help_are_the_rows() -> None:
    text = rjupyter.build_parser().format_help()
    for name, action in rjupyter.ACTIONS.items():
        assert name is None or action.usage in text
        assert name is None or action.help


def test_what_ssh_says_as_it_ends_is_explained_by_its_own_row() -> None:
    """Its pattern takes its sample, and no row that comes before has one that takes it and tells more."""
    for ending in rjupyter.ENDINGS + rjupyter.ACCOUNTS:
        assert re.match(ending.pattern, ending.sample), ending.sample
    for ending in rjupyter.ENDINGS:
        first = next(
            row
            for row in rjupyter.ENDINGS
            if (row.is_telling and re.match(row.pattern, ending.sample)) or row is ending
        )
        assert first is ending or not ending.is_telling, ending.sample


@functools.lru_cache(maxsize=None)
def agent_blocks() -> List[ast.stmt]:
    """Return the definitions between "agent begins" and "agent ends"."""
    inside: Set[int] = set()
    is_agent = False
    for number, line in enumerate(SOURCE.split("\n"), 1):
        is_agent = (is_agent or line == "# agent begins") and line != "# agent ends"
        if is_agent:
            inside.add(number)
    return [node for node in TREE.body if node.lineno in inside]


def test_agent_uses_nothing_that_is_not_sent() -> None:
    """What the agent's functions name is a builtin, imported for the agent, or stands in its own parts."""
    blocks = agent_blocks()
    sent = {
        name for name, line in definitions().items() if any(b.lineno <= line <= (b.end_lineno or 0) for b in blocks)
    }
    known = sent | set(dir(builtins)) | set(re.findall(r"\w+", rjupyter.AGENT_IMPORTS)) | {"__name__"}
    for block in blocks:
        unknown = {name.id for name in names_in(block)} - own_names(block) - known
        assert not unknown, (getattr(block, "name", block.lineno), unknown)


@functools.lru_cache(maxsize=None)
def sent(action: str) -> Tuple[str, ...]:
    """Return the lines that the host gets for an action."""
    text = zlib.decompress(binascii.a2b_base64(SENT.of(action))).decode()
    return tuple(text.split("\n"))


SENT = rjupyter.AgentSource()


def without_words(node: ast.AST) -> str:
    """Return what a definition does, without docstrings and without the types of arguments and results."""
    node = copy.deepcopy(node)
    for part in ast.walk(node):
        if isinstance(part, (ast.FunctionDef, ast.ClassDef)):
            is_documented = ast.get_docstring(part) is not None
            part.body = part.body[is_documented:] or [ast.Pass()]
        if isinstance(part, ast.FunctionDef):
            part.returns = None
        if isinstance(part, ast.arg):
            part.annotation = None
    return ast.dump(node)


def members(node: ast.ClassDef) -> Dict[int, ast.stmt]:
    """Return what stands in a class, by line."""
    return {part.lineno: part for part in node.body[ast.get_docstring(node) is not None :]}


class Piece:
    """A definition as it is sent: what it names, and the attributes in it."""

    def __init__(self, text: str, line: int) -> None:
        (self.node,) = ast.parse(text).body
        ast.increment_lineno(self.node, line - 1)
        self.names = {name.id for name in names_in(self.node)} - own_names(self.node)
        self.attributes = {node.attr for node in ast.walk(self.node) if isinstance(node, ast.Attribute)}


# Most actions are sent the same of a definition, and all of it: each is read, and compared, once.
piece_of = functools.lru_cache(maxsize=None)(Piece)


def pieces(action: str) -> List[Piece]:
    """Return the definitions that are sent for an action; there is nothing else, but for the imports."""
    lines = sent(action)
    found = []
    rest = set(range(3, len(lines) + 1)) - {number for number, line in enumerate(lines, 1) if not line}
    for node in agent_blocks():
        first = min([node.lineno, *(part.lineno for part in getattr(node, "decorator_list", []))])
        inside = range(first, (node.end_lineno or 0) + 1)
        if rest & set(inside):
            found.append(piece_of("\n".join(lines[first - 1 : node.end_lineno]), first))
            rest -= set(inside)
    assert not rest, (action, rest)
    return found


def test_what_is_sent_is_what_stands_here_line_for_line() -> None:
    """For each action."""
    ours = {node.lineno: node for node in agent_blocks()}
    for piece in {piece for action in ACTIONS for piece in pieces(action)}:
        node, original = piece.node, ours[piece.node.lineno]
        if isinstance(node, ast.ClassDef) and isinstance(original, ast.ClassDef):
            methods = members(original)
            for line, part in members(node).items():
                assert isinstance(part, ast.Pass) or without_words(part) == without_words(methods[line]), node.name
            left = {part for line, part in methods.items() if line not in members(node)}
            assert all(isinstance(part, ast.FunctionDef) for part in left), node.name
        else:
            assert without_words(node) == without_words(original), ast.dump(node)[:100]


def test_an_action_is_sent_all_that_it_comes_to_and_not_what_others_do() -> None:
    """No name in what is sent, and no method that it calls, is one of those that stayed here."""
    all_names, all_methods = set(definitions(agent_blocks())), methods_in(agent_blocks())
    for action in ACTIONS:
        there = pieces(action)
        body = [piece.node for piece in there]
        absent = all_names - set(definitions(body))
        for piece in there:
            assert not absent & piece.names, (action, ast.dump(piece.node)[:80])
        attributes = set().union(*[piece.attributes for piece in there])
        absent_methods = all_methods - methods_in(body)
        unsent = {pair for pair in absent_methods if pair[0] not in absent and pair[1] in attributes}
        assert not unsent, (action, unsent)
    texts = {action: "\n".join(sent(action)) for action in ACTIONS}
    assert "SCHEDULERS = {" in texts["list"]  # it tells of jobs
    assert "def open_server" not in texts["list"]
    assert "def open_server" in texts["open"]


def methods_in(body: Iterable[ast.stmt]) -> Set[Tuple[str, str]]:
    """Return the class and the name of each method."""
    classes = [node for node in body if isinstance(node, ast.ClassDef)]
    return {(node.name, part.name) for node in classes for part in node.body if isinstance(part, ast.FunctionDef)}
