"""The house: the source of rjupyter.py keeps the rules that stand at its head."""

import ast
import re
import shlex
from html import unescape
from pathlib import Path
from typing import Dict, Iterable, Iterator, Set, Tuple

import pytest
from readme import README
from sides import TOP

import rjupyter

SOURCE = Path(rjupyter.__file__).read_text()
TREE = ast.parse(SOURCE)


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


def test_readme_names_every_action_and_the_tables_of_the_help() -> None:
    for name in filter(None, rjupyter.ACTIONS):
        assert re.search(r"[` ]%s\b" % name, README), name
    assert "`rjupyter --help events`" in README and "`rjupyter --help status`" in README
    assert len(README.splitlines()) <= 350


def test_picture_of_the_readme_is_its_first_transcript() -> None:
    (name,) = re.findall(r"^!\[.+\]\((.*)\)$", README, re.MULTILINE)
    drawn = re.findall(r"<text [^>]*>(.*?)</text>", (TOP / name).read_text())
    assert "".join("    %s\n" % unescape(line) for line in drawn) in README


def test_help_fits_two_screens_and_has_topics(capsys: pytest.CaptureFixture[str]) -> None:
    text = rjupyter.help_text()
    assert len(text.splitlines()) <= 90 and text.index("gpu1:work") < text.index("server:")
    assert rjupyter.main(["--help", "events"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == list(rjupyter.EVENTS)
    assert rjupyter.main(["--help", "status"]) == 0
    assert [int(line.split()[0]) for line in capsys.readouterr().out.splitlines()] == list(rjupyter.EXITS)


def test_examples_of_an_action_are_lines_that_are_taken() -> None:
    """What stands behind a wide gap in an example is a remark."""
    for name in filter(None, rjupyter.ACTIONS):
        for example in rjupyter.EXAMPLES.get(name, ()):
            assert len("  rjupyter " + example) <= 80, example  # or it is broken in two in most terminals
            words = shlex.split(re.split(r" {3,}| && | <| \|", example)[0])
            assert rjupyter.Args(rjupyter.CommandLine(["--no-config", *words])).action == name, example


def test_unknown_fact_of_an_event_is_a_bug_at_once() -> None:
    with pytest.raises(TypeError, match="colour"):
        rjupyter.Messages().event("open", colour="red")


def test_actions_of_the_help_are_the_rows() -> None:
    text = rjupyter.help_text()
    for name, action in rjupyter.ACTIONS.items():
        assert name is None or action.usage in text
        assert name is None or action.help
