"""The same notebooks by `execute` and by `nbconvert --execute`, compared cell by cell.

RJUPYTER_NOTEBOOKS=DIRECTORY compares the notebooks below a directory of yours. Without it, those that are written here:
of every format, and of the kinds that people have.
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import pytest
from execution import add_bash, add_r, code, notebook_of, stream, text, write_notebook
from jupyters import STANDIN_KERNEL, nbclient_alone
from sides import VENV_BIN, Host, Laptop

DIRECTORY = os.environ.get("RJUPYTER_NOTEBOOKS", "")
TIMEOUT_S = 600
DISPLAY = "from IPython.display import display, HTML, clear_output\n"
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def format_3(path: Path, host: Host) -> None:
    cell = {"cell_type": "code", "collapsed": False, "language": "python", "metadata": {}, "prompt_number": 3}
    shown = {"output_type": "pyout", "prompt_number": 3, "text": ["2"], "metadata": {}}
    error = {"output_type": "pyerr", "ename": "E", "evalue": "v", "traceback": ["t"]}
    cells: List[Dict[str, Any]] = [
        {"cell_type": "heading", "level": 2, "metadata": {}, "source": ["Title"]},
        dict(cell, input=["x = 1\n", "x + 1"], outputs=[shown, error]),
        {"cell_type": "markdown", "metadata": {}, "source": "text"},
        {"cell_type": "raw", "metadata": {}, "source": "raw"},
        dict(cell, input=["print(x)\n", "import sys; print(2, file=sys.stderr)"], outputs=[]),
    ]
    sheets = [{"metadata": {}, "cells": cells[:3]}, {"metadata": {}, "cells": cells[3:]}]
    whole = {"metadata": {"name": "old", "signature": "sha256:00"}, "nbformat": 3, "nbformat_minor": 0}
    path.write_text(json.dumps(dict(whole, worksheets=sheets)))


def format_4(minor: int) -> Callable[[Path, Host], None]:
    def write(path: Path, host: Host) -> None:
        picture = {"x.png": {"image/png": PIXEL}}
        attached: Dict[str, Any] = {"attachments": picture} if minor else {}
        with_picture = text("![x](attachment:x.png)", **attached)
        old = {"outputs": [stream("of last year\n")], "execution_count": 9}
        cells = [text("# Title\n\nit's é"), with_picture, code("x = 1\nx", **old), code("", **old), text("raw", "raw")]
        write_notebook(path, *cells, "print(x)\n\n# comment\nx + 1", " \n", minor=minor)

    write.__name__ = "format_4_%d" % minor
    return write


def tags(path: Path, host: Host) -> None:
    cells = [code("print(1)", "hide-input", "parameters"), code("print(2)", "skip-execution", outputs=[stream("old")])]
    cells += [code("1 / 0", "raises-exception"), code("raise SystemExit(2)", "raises-exception"), code("print(3)")]
    write_notebook(path, *cells)


def displays(path: Path, host: Host) -> None:
    first = DISPLAY + "h = display(HTML('<b>0</b>'), display_id='one'); display(HTML('also'), display_id='one')"
    loop = "for n in range(5):\n    clear_output(wait=True)\n    print(n)"
    mixed = "print('a'); display({'text/html': 'b', 'text/plain': 'c'}, raw=True); print('d')\n'e'"
    picture = "import base64\nfrom IPython.display import Image\nImage(base64.b64decode('%s'))" % PIXEL
    gone = "print('gone'); display(HTML('gone'), display_id='gone'); clear_output(); print('stays')"
    late = "h.update(HTML('<b>2</b>')); display(HTML('x'), display_id='gone', update=True)"
    data = "display({'application/json': {'a': [1, None]}, 'application/vnd.x+json': {'b': 'c'}}, raw=True)"
    svg = "from IPython.display import SVG\nSVG('<svg xmlns=\"http://www.w3.org/2000/svg\"/>')"
    empty = "clear_output(wait=True)\nprint(end='')"
    cleared = "print('one'); display(HTML('two')); clear_output()"
    twice = "print('one')\nclear_output()\nprint('two')\nclear_output()\nprint('one')"
    write_notebook(
        path, first, loop, mixed, picture, gone, "h.update(HTML('<b>1</b>'))", late, data, svg, empty, cleared, twice
    )


def widgets(path: Path, host: Host) -> None:
    model = {"model_name": "M", "model_module": "x", "model_module_version": "1", "state": {"value": 1}}
    state = {"state": {"a" * 32: model}, "version_major": 2, "version_minor": 0}
    comm = (
        "from comm import create_comm\n"
        "state = {'_model_name': 'IntModel', '_model_module': 'x', '_model_module_version': '1', 'value': 3}\n"
        "c = create_comm(target_name='jupyter.widget', data={'state': state}, comm_id='b' * 32)\n"
        "c.send({'method': 'update', 'state': {'value': 4}})"
    )
    kept: Dict[str, Any] = {"application/vnd.jupyter.widget-state+json": state}
    write_notebook(path, "print(1)", comm, "print(2)", widgets=kept)


def asynchronous(path: Path, host: Host) -> None:
    task = "async def later():\n    await asyncio.sleep(0.1)\n    print('later')\nt = asyncio.create_task(later())"
    write_notebook(path, "import asyncio", "await asyncio.sleep(0); 1", task, "await t; print('after')")


def shells_and_magics(path: Path, host: Host) -> None:
    write_notebook(path, "!echo one; echo two >&2", "%%bash\nprintf 'a\\nb'", "%precision 3", "x = !echo 3\nx", "%who")


def long_output(path: Path, host: Host) -> None:
    bar = "for n in range(300): print('\\r%3d' % n, end='', flush=True)"
    write_notebook(path, "for n in range(20000): print(n)", "print('x' * 3000000)", bar, "print('a\\r\\nb\\bc')")


def fails(path: Path, host: Host) -> None:
    write_notebook(path, "print('before')", "raise ValueError('one\\ntwo')", "print('never')")


def exits(path: Path, host: Host) -> None:
    write_notebook(path, "print('before')", "raise SystemExit", "print('never')")


def no_kernel_is_named(path: Path, host: Host) -> None:
    """Nor is there a widget, but the state of those of last year."""
    model = {"model_name": "M", "model_module": "x", "model_module_version": "1", "state": {"value": 1}}
    state = {"state": {"a" * 32: model}, "version_major": 2, "version_minor": 0}
    write_notebook(path, "print(1)", "'é日\U0001f600'")
    notebook = notebook_of(path)
    notebook["metadata"] = {"widgets": {"application/vnd.jupyter.widget-state+json": state}, "title": "é", "x": [None]}
    path.write_text(json.dumps(notebook))


def many_cells(path: Path, host: Host) -> None:
    write_notebook(path, *["print(%d)" % number for number in range(200)])


def bash(path: Path, host: Host) -> None:
    write_notebook(path, "x=1", "echo $x; echo two >&2", "ls / | head -2", kernelspec=add_bash(host.home))


def r(path: Path, host: Host) -> None:
    cells = ["x <- 1", "x + 1", "cat('é\\n'); message('note')", "data.frame(a = 1:2, b = c('x', 'y'))", "invisible(3)"]
    write_notebook(path, *cells, kernelspec=add_r(host.home))


Kind = Callable[[Path, Host], None]
FORMATS: List[Kind] = [format_3, *[format_4(minor) for minor in range(6)], many_cells]
TOGETHER: List[Kind] = [tags, displays, asynchronous, shells_and_magics, long_output, widgets]


def all_in_one(path: Path, host: Host) -> None:
    """The kinds that can be one notebook are: each kernel takes a second."""
    cells: List[Dict[str, Any]] = []
    for kind in TOGETHER:
        kind(path, host)
        cells += notebook_of(path)["cells"]
    write_notebook(path, *cells, **notebook_of(path)["metadata"])


PYTHONS: List[Kind] = [all_in_one, fails, exits, no_kernel_is_named]
THEIRS = sorted(str(path.relative_to(DIRECTORY)) for path in Path(DIRECTORY).rglob("*.ipynb")) if DIRECTORY else []


def by_nbconvert(paths: List[Path], home: Path, **environment: str) -> List[Path]:
    """Let nbconvert execute notebooks, errors allowed, and return the results."""
    argv = [str(VENV_BIN / "jupyter"), "nbconvert", "--execute", "--allow-errors", "--to", "notebook"]
    environment.update(HOME=str(home), PATH="%s:/usr/local/bin:/usr/bin:/bin" % VENV_BIN, LANG="C.UTF-8")
    there = home.parent / "by_nbconvert"
    for _ in range(3):
        answer = subprocess.run(
            [*argv, "--output-dir", str(there), *map(str, paths)],
            capture_output=True,
            text=True,
            env=environment,
            timeout=TIMEOUT_S,
        )
        if "Kernel died before replying" not in answer.stderr:  # of a port that another kernel took meanwhile
            break
    if answer.returncode and THEIRS:
        pytest.skip("nbconvert does not execute it: " + answer.stderr[-500:])
    assert not answer.returncode, answer.stderr
    return [there / path.name for path in paths]


def plain(output: Dict[str, Any]) -> Dict[str, Any]:
    """Return an output without what differs from one execution to the next: addresses, places of temporary files."""
    words = json.dumps({name: value for name, value in output.items() if name != "traceback"}, sort_keys=True)
    words = re.sub(r"0x[0-9a-f]{6,}", "0x", words)
    return dict(json.loads(re.sub(r"(ipykernel_|/tmp/[a-zA-Z]+)\d+\w*", r"\1", words)))


def joined(outputs: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """Join what a kernel printed on one stream in several messages, and put stdout first: both are chance."""
    whole: List[Dict[str, Any]] = []
    for output in outputs:
        said = "".join(output.get("text", ""))
        same = [other for other in whole if other["output_type"] == "stream" == output["output_type"]]
        same = [other for other in same if other["name"] == output["name"] and other in whole[-2:]]
        if same:
            same[0]["text"] += said
        else:
            whole.append(dict(output, text=said) if output["output_type"] == "stream" else plain(output))
    return whole


def comparable(cell: Dict[str, Any]) -> Tuple[Any, ...]:
    """Return what must be the same of a cell."""
    metadata = {name: value for name, value in cell["metadata"].items() if name != "execution"}
    parts = (cell["cell_type"], "".join(cell["source"]), metadata, cell.get("attachments"), cell.get("execution_count"))
    return (*parts, joined(cell.get("outputs", [])))


def is_failure(cell: Dict[str, Any]) -> bool:
    has_error = any(output["output_type"] == "error" for output in cell.get("outputs", []))
    return has_error and "raises-exception" not in cell["metadata"].get("tags", [])


def write_all(kinds: List[Kind], laptop: Laptop, host: Host) -> List[Path]:
    paths = [laptop.home / (kind.__name__ + ".ipynb") for kind in kinds]
    for kind, path in zip(kinds, paths):
        kind(path, host)
    return paths


def compare(laptop: Laptop, host: Host, paths: List[Path], **environment: str) -> None:
    """Cell by cell, to the first that fails: type, source, metadata, number, outputs; and the notebook's metadata.

    Behind a cell that failed nothing is executed; nbconvert, which goes on, is not asked there.
    """
    all_theirs = by_nbconvert(paths, host.home, **environment)
    run = laptop.start("host", "execute", "-j", "2", *[path.name for path in paths], has_terminal=False)
    status = run.wait(TIMEOUT_S)
    expected = 0
    for path, theirs_path in zip(paths, all_theirs):
        ours, theirs = notebook_of(path.with_name(path.stem + ".executed.ipynb")), notebook_of(theirs_path)
        assert len(ours["cells"]) == len(theirs["cells"]), path.stem
        # An error of a magic leaves no error output: which cell that was, our message says.
        said = re.search(r"cell (\d+) of \d+ failed in " + re.escape(path.name), run.stderr)
        code_cells = [
            number
            for number, cell in enumerate(theirs["cells"])
            if cell["cell_type"] == "code" and "".join(cell["source"]).strip()
        ]
        silent = code_cells[int(said.group(1)) - 1] if said else -1
        failed = False
        for number, (our, their) in enumerate(zip(ours["cells"], theirs["cells"])):
            where = "%s, cell %d" % (path.stem, number)
            if failed:
                assert (our["source"], our.get("outputs", [])) == (their["source"], []), where
            else:
                assert comparable(our) == comparable(their), where
            failed = failed or is_failure(their) or number == silent
        is_exit = "raise SystemExit" in json.dumps(theirs["cells"]) and not said  # with success: no failure
        assert bool(said) == (failed and not is_exit), run.text
        expected = 5 if said else expected
        if not failed:
            for part in ("metadata", "nbformat", "nbformat_minor"):
                assert ours[part] == theirs[part], "%s: %s" % (path.stem, part)
    assert status == expected, run.text


@pytest.mark.nbclient
def test_each_format_is_the_same_as_by_nbconvert(laptop: Laptop, host: Host, tmp_path: Path) -> None:
    """The formats of notebooks, and one of 200 cells; the kernel is the stand-in, in nbconvert's hands as in ours."""
    kernel = tmp_path / "kernels/python3/kernel.json"
    kernel.parent.mkdir(parents=True)
    argv = [str(nbclient_alone() / "python"), *STANDIN_KERNEL[1:]]  # nbconvert's own Python does not have it
    kernel.write_text(json.dumps({"argv": argv, "display_name": "Python 3", "language": "python"}))
    compare(laptop, host, write_all(FORMATS, laptop, host), JUPYTER_PATH=str(tmp_path))


@pytest.mark.jupyter
def test_what_python_shows_is_the_same_as_by_nbconvert(laptop: Laptop, host: Host) -> None:
    compare(laptop, host, write_all(PYTHONS, laptop, host))


@pytest.mark.jupyter
@pytest.mark.parametrize("kind", [bash, r])
def test_other_kernels_say_the_same_as_by_nbconvert(laptop: Laptop, host: Host, kind: Kind) -> None:
    compare(laptop, host, write_all([kind], laptop, host))


if THEIRS:

    @pytest.mark.jupyter
    @pytest.mark.parametrize("name", THEIRS)
    def test_notebook_of_yours_is_the_same_as_by_nbconvert(laptop: Laptop, host: Host, name: str) -> None:
        for home in (laptop.home, host.home):
            shutil.copytree(Path(DIRECTORY, name).parent, home, dirs_exist_ok=True)
        path = laptop.home / "a.ipynb"
        shutil.copy(Path(DIRECTORY, name), path)
        compare(laptop, host, [path])
