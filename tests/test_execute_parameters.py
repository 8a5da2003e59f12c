"""Parameters in the language of the kernel, kernels by their names, and the environments that have them."""

import json
import math
import shutil
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import pytest
from client import check_failure
from execution import (
    add_kernel,
    add_r,
    cells_of,
    code,
    printed,
    run_dirs,
    write_notebook,
)
from jupyters import STANDIN_KERNEL, environment, interpreters, nbclient_alone
from sides import Host, Laptop

pytestmark = pytest.mark.nbclient

RESULT = "p.executed.ipynb"


def options(values: Dict[str, str]) -> List[str]:
    """Return the -p options for these values."""
    return [word for name, value in values.items() for word in ("-p", "%s=%s" % (name, value))]


def injected(path: Path) -> str:
    """Return the source of the injected cell."""
    (cell,) = [cell for cell in cells_of(path) if "injected-parameters" in cell["metadata"].get("tags", [])]
    return "".join(cell["source"])


# -- G8: the kernel's language ----------------------------------------------------------------------------------------

TEXT = 'it\'s "q" $HOME `x` \\n é'


def test_parameters_for_r(laptop: Laptop, host: Host) -> None:
    """TRUE, NULL, list(), and numbers that have no end: what R calls them. (G8)"""
    values = {"epochs": "20", "name": TEXT, "l": '[1, "two"]', "d": '{"a b": 1}', "flag": "true", "none": "null"}
    values.update(inf="-Infinity", nan="NaN")
    setting = "\n".join("%s <- 0" % name for name in values)
    show = "cat(epochs, name, l[[2]], d[['a b']], isTRUE(flag), is.null(none), inf, nan, sep='|')"
    write_notebook(laptop.home / "p.ipynb", code(setting, "parameters"), show, kernelspec=add_r(host.home))
    run = laptop.run("host", "execute", "p.ipynb", *options(values))
    assert run.status == 0, run.text
    assert printed(laptop.home / RESULT)[-1].strip() == "20|%s|two|1|TRUE|TRUE|-Inf|NaN" % TEXT


LITERALS: List[Tuple[str, List[str]]] = [
    ("julia", ["# Parameters", "i = 3", "f = 1.5", 't = "it\'s \\"q\\""', "y = true", "n = nothing", 'l = [1, "a"]',
               'd = Dict("k" => 1)', 'c = "cost \\$5"', "u = -Inf", "b = 3000000000"]),
    ("R", ["# Parameters", "i = 3", "f = 1.5", 't = "it\'s \\"q\\""', "y = TRUE", "n = NULL", 'l = list(1, "a")',
           'd = list("k" = 1)', 'c = "cost $5"', "u = -Inf",
           "b = 3000000000"]),
]  # fmt: skip


def test_form_of_parameters(laptop: Laptop, host: Host) -> None:
    """papermill's forms, for languages whose kernels are not here; what papermill gets wrong is what the language has:
    `$` in a Julia string, and infinity. The language is that of the kernel which is taken. (G8)

    The kernel is Python's under another name, so the cell fails; it stands in the result as it was injected. The
    language is said by the notebook, by the kernel alone, or the kernel by --kernel.
    """
    values = {"i": "3", "f": "1.5", "t": 'it\'s "q"', "y": "true", "n": "null", "l": '[1, "a"]', "d": '{"k": 1}'}
    values.update(c="cost $5", u="-Infinity", b="3000000000")
    expected = {}
    for number, (language, lines) in enumerate(LITERALS):
        name = "other-1.%d" % number
        add_kernel(host.home, name, STANDIN_KERNEL, language=language)
        spec = {"name": name, "display_name": "Other", "language": language}
        write_notebook(laptop.home / (language + ".ipynb"), code("i = 0", "parameters"), "1", kernelspec=spec)
        expected[language] = lines
    alone = {"name": "other-1.0", "display_name": "Other"}
    write_notebook(laptop.home / "alone.ipynb", code("i = 0", "parameters"), "1", kernelspec=alone)
    write_notebook(laptop.home / "option.ipynb", code("i = 0", "parameters"), "1")
    laptop.run("host", "execute", "-j", "2", *[name + ".ipynb" for name in [*expected, "alone"]], *options(values))
    laptop.run("host", "execute", "option.ipynb", "--kernel", "other-1.0", *options(values))
    expected.update(alone=LITERALS[0][1], option=LITERALS[0][1])
    for name, lines in expected.items():
        assert injected(laptop.home / (name + ".executed.ipynb")).split("\n") == lines, name


def test_parameters_for_a_language_that_we_do_not_know(laptop: Laptop, host: Host) -> None:
    """Refused, with the language's name, before a cell runs; without -p the notebook runs as any. (G8)"""
    add_kernel(host.home, "swipl", STANDIN_KERNEL, language="prolog")
    spec = {"name": "swipl", "display_name": "Prolog", "language": "prolog"}
    write_notebook(laptop.home / "p.ipynb", "open('ran', 'w')", kernelspec=spec)
    run = laptop.run("host", "execute", "p.ipynb", "-p", "x=1")
    assert run.status in (1, 2), run.text
    check_failure(run, run.status, "prolog")
    assert not (host.home / "ran").exists()
    assert laptop.run("host", "execute", "p.ipynb").status == 0


# -- G9: parameters without effect ------------------------------------------------------------------------------------


def test_notebook_without_a_cell_for_parameters(laptop: Laptop, host: Host) -> None:
    """A line says that there is no cell tagged `parameters`, so the values stand at the top; the run goes on. (G9)"""
    write_notebook(laptop.home / "p.ipynb", "x = 1", "print(x)")
    run = laptop.run("host", "execute", "p.ipynb", "-p", "x=2")
    assert run.status == 0, run.text
    assert [line for line in run.stderr.splitlines() if "parameters" in line and "p.ipynb" in line], run.stderr
    assert printed(laptop.home / RESULT)[-1] == "1\n"
    run = laptop.run("host", "execute", "--json", "p.ipynb", "-p", "x=2")
    assert run.status == 0 and "parameters" in run.text


def test_parameter_that_the_notebook_does_not_set(laptop: Laptop, host: Host) -> None:
    """A line names it, as papermill warns of an unknown parameter; for those that are set there is none. (G9)

    Set is what the cell assigns, in any form; what stands in a comment, in text, or is compared is not.
    """
    lines = ["one: int = 1", "two = three = 2", "four, (five, *six) = 1, (2, 3)", "if True:", "    seven = 7"]
    lines += ["(eight := 8)", "# nine = 9", "'ten = 10'", "one == 1", "import os as eleven", "print(end='')"]
    write_notebook(laptop.home / "p.ipynb", code("\n".join(lines), "parameters"), "print(one)")
    known = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    unknown = ["nine", "ten", "end", "epohcs"]
    run = laptop.run("host", "execute", "p.ipynb", *options(dict.fromkeys(known + unknown, "0")))
    assert run.status == 0, run.text
    said = [line for line in run.stderr.splitlines() if "epohcs" in line]
    assert said, run.stderr
    words = " ".join(line for line in run.stderr.splitlines() if "parameter" in line.lower())
    assert [name for name in unknown if name not in words.replace(",", " ").split()] == [], words
    assert [name for name in known if name in words.replace(",", " ").split()] == [], words


# -- G10: names of kernels --------------------------------------------------------------------------------------------


def test_kernel_is_compared_as_jupyter_client_does(laptop: Laptop, host: Host) -> None:
    """Capitals do not count, in the notebook, in the name of the directory, and in --kernel. (G10)"""
    asked = {"MyEnv": "myenv", "Other": "Other", "third": "THIRD"}  # and how the directory is called
    for name, there in asked.items():
        add_kernel(host.home, there, STANDIN_KERNEL, WHICH="the one that is meant for " + name)
        spec = {"name": name, "display_name": name, "language": "python"}
        source = "import os; print(os.environ.get('WHICH'))"
        write_notebook(laptop.home / (name + ".ipynb"), source, kernelspec=spec)
    run = laptop.run("host", "execute", "-j", "3", *[name + ".ipynb" for name in asked])
    assert run.status == 0, run.text
    assert "no kernel" not in run.stderr
    for name in asked:
        said = printed(laptop.home / (name + ".executed.ipynb"))
        assert said == ["the one that is meant for %s\n" % name], name
    add_kernel(host.home, "my.env-3", STANDIN_KERNEL, WHICH="the one of the option")
    run = laptop.run("host", "execute", "Other.ipynb", "--kernel", "My.Env-3")
    assert run.status == 0 and "no kernel" not in run.stderr, run.text
    assert printed(laptop.home / "Other.executed.ipynb") == ["the one of the option\n"]


def test_kernel_of_r_with_a_capital_name(laptop: Laptop, host: Host) -> None:
    """IRkernel's own users write `IR`. (G10)"""
    spec = add_r(host.home)
    write_notebook(laptop.home / "p.ipynb", "cat(R.version$language)", kernelspec=dict(spec, name="IR"))
    run = laptop.run("host", "execute", "p.ipynb")
    assert run.status == 0, run.text
    assert printed(laptop.home / RESULT) == ["R"]


def test_kernel_that_was_asked_for_and_is_not_there(laptop: Laptop, host: Host) -> None:
    """--kernel is not a wish: without that kernel nothing runs; the names that there are, are said. (G10)"""
    write_notebook(laptop.home / "p.ipynb", "open('ran', 'w')")
    for name in ("nothere", "../python3", "python 3"):
        run = laptop.run("host", "execute", "p.ipynb", "--kernel", name)
        assert run.status in (1, 2), run.text
        check_failure(run, run.status, name, "python3")
    assert not (host.home / "ran").exists()


def asks_for(name: str, language: str = "", **metadata: Any) -> Dict[str, Any]:
    """Return a notebook's metadata that asks for a kernel, and says its language where one is given."""
    spec = {"name": name, "display_name": name, **({"language": language} if language else {})}
    return dict(metadata, kernelspec=spec)


WHICH = "import os; print(os.environ.get('WHICH'))"


def test_the_only_kernel_of_the_language_is_taken_with_a_line(laptop: Laptop, host: Host) -> None:
    """Under another version or name; where the notebook does not say its language, the name does."""
    for name, language in (("julia-1.10", "julia"), ("ir", "R"), ("xcpp14", "C++14")):
        add_kernel(host.home, name, STANDIN_KERNEL, language, WHICH=name)
    asked = {
        "a": ("julia-1.10", asks_for("julia-1.8", "julia")),
        "b": ("julia-1.10", asks_for("julia-1.8")),
        "c": ("ir", asks_for("ir33")),
        "d": ("ir", asks_for("r-4.3-conda", language_info={"name": "R"})),
        "e": ("xcpp14", asks_for("xcpp17")),
        "f": ("python3", {"kernelspec": {}}),
    }
    for name, (_, metadata) in asked.items():
        write_notebook(laptop.home / (name + ".ipynb"), WHICH, **metadata)
    run = laptop.run("host", "execute", "-j", "3", *[name + ".ipynb" for name in asked])
    assert run.status == 0, run.text
    for name, (taken, metadata) in asked.items():
        wanted = metadata["kernelspec"].get("name")
        assert printed(laptop.home / (name + ".executed.ipynb")) == [(taken if wanted else "None") + "\n"], name
        assert not wanted or "There is no kernel %s there; using %s." % (wanted, taken) in run.stderr


def test_one_of_several_kernels_and_another_language_are_not_taken(laptop: Laptop, host: Host) -> None:
    """Nothing runs: the list is said, and for several what chooses one of them."""
    for name in ("julia-1.10", "julia-1.9"):
        add_kernel(host.home, name, STANDIN_KERNEL, "julia", WHICH=name)
    add_kernel(host.home, "other", STANDIN_KERNEL, WHICH="other")
    cases = {
        "a": (asks_for("julia-1.8", "julia"), ["there are of its language: julia-1.10, julia-1.9", "--kernel NAME"]),
        "b": (asks_for("of-a-project", "python"), ["there are of its language: other, python3", "--kernel NAME"]),
        "c": (asks_for("scala212"), ["there is no kernel scala212", "julia-1.10, julia-1.9, other, python3"]),
        "d": (asks_for("sagemath", "sage"), ["written in sage", "julia-1.10, julia-1.9, other, python3"]),
    }
    for name, (metadata, words) in cases.items():
        write_notebook(laptop.home / (name + ".ipynb"), "open('ran', 'w')", **metadata)
        run = laptop.run("host", "execute", name + ".ipynb")
        check_failure(run, 1, "cannot be executed", *words)
        assert ("--kernel" in run.stderr) == ("--kernel NAME" in words)
    assert not (host.home / "ran").exists()
    write_notebook(laptop.home / "a.ipynb", WHICH, **cases["a"][0])
    assert laptop.run("host", "execute", "a.ipynb", "--kernel", "julia-1.9").status == 0
    assert printed(laptop.home / "a.executed.ipynb") == ["julia-1.9\n"]


MANAGER = """
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager

class OfEnvironments(KernelSpecManager):
    def find_kernel_specs(self):
        return dict(super().find_kernel_specs(), **{"conda-env-geo-py": "/nowhere"})

    def get_kernel_spec(self, name):
        if name != "conda-env-geo-py":
            return super().get_kernel_spec(name)
        return KernelSpec(argv=%r, display_name="geo", language="python", env={"WHICH": "geo"})

c.JupyterApp.kernel_spec_manager_class = OfEnvironments
c.KernelSpecManager.allowed_kernelspecs = {"ir"}
c.OfEnvironments.ensure_native_kernel = False
"""


@pytest.mark.parametrize("file", ["jupyter_config", "jupyter_server_config"])
def test_kernels_are_those_of_the_servers_configuration(laptop: Laptop, host: Host, file: str) -> None:
    """A manager that makes kernels of environments, as nb_conda_kernels is; and what the page does not offer."""
    add_kernel(host.home, "ir", STANDIN_KERNEL, "R")
    add_kernel(host.home, "closed", STANDIN_KERNEL)
    (host.home / ".jupyter").mkdir(exist_ok=True)
    text = MANAGER if file == "jupyter_config" else MANAGER.replace("JupyterApp", "NotebookApp")
    (host.home / (".jupyter/%s.py" % file)).write_text(text % (STANDIN_KERNEL,))
    write_notebook(laptop.home / "p.ipynb", WHICH, **asks_for("conda-env-geo-py", "python"))
    run = laptop.run("host", "execute", "p.ipynb")
    assert run.status == 0, run.text
    assert printed(laptop.home / RESULT) == ["geo\n"]
    check_failure(
        laptop.run("host", "execute", "p.ipynb", "--kernel", "closed"), 1, "there are: conda-env-geo-py, ir\n"
    )


# -- G11: an environment that can execute, and nothing else -----------------------------------------------------------


@pytest.mark.parametrize("is_on_path", [True, False])
def test_environment_with_nbclient_alone(
    laptop: Laptop, make_host: Callable[..., Host], directory: Path, is_on_path: bool
) -> None:
    """nbclient and a kernel are enough: no notebook, no lab. Nothing is installed for it. (G11)

    It is found on PATH, with the kernel of today; else by --python, by --env, and as .venv.
    """
    python = next((found for minor, found in sorted(interpreters().items()) if minor >= 9), "/usr/bin/python3")
    bare = environment("nbclient", python, ["nbclient", "ipykernel"]) if is_on_path else nbclient_alone()
    (directory / "bin").mkdir()
    (directory / "bin/python3").symlink_to(shutil.which("python3", path="/usr/bin:/usr/local/bin") or python)
    host = make_host(path="%s:%s" % (bare if is_on_path else directory / "bin", directory / "bin"))
    (host.home / "work").mkdir()
    write_notebook(laptop.home / "p.ipynb", "import sys; print(sys.prefix)")
    by_option = [["--python", str(bare / "python")], ["--env", str(bare.parent)]]
    for way in [[]] if is_on_path else [*by_option, []]:
        if not way and not is_on_path:
            (host.home / "work/.venv").symlink_to(bare.parent)
        run = laptop.run("--no-install", *way, "host:work", "execute", "p.ipynb")
        assert run.status == 0, (way, run.text)
        result = laptop.home / RESULT
        assert Path(printed(result)[0].strip()).resolve() == bare.parent.resolve(), way
        result.unlink()
    if not is_on_path:  # and where the notebook is there, beside it
        write_notebook(host.home / "work/q.ipynb", "import sys; print(sys.prefix)")
        run = laptop.run("--no-install", "host", "execute", ":work/q.ipynb")
        assert run.status == 0, run.text
        assert Path(printed(laptop.home / "q.executed.ipynb")[0].strip()).resolve() == bare.parent.resolve()


# -- G21: values ------------------------------------------------------------------------------------------------------

VALUES: List[Tuple[str, Any]] = [
    ("None", None), ("null", None), ("NaN", math.nan), ("Infinity", math.inf), ("-Infinity", -math.inf),
    ("true", True), ("False", False), ("20", 20), ("-3", -3), ("1.5", 1.5), ("1e3", 1000.0), ("", ""), ("a=b", "a=b"),
    ("[a, b]", ["a", "b"]), ("[]", []), ("{}", {}), ("[ a b , 2.5, null, true]", ["a b", 2.5, None, True]),
    ("[https://x.org:80/a, b]", ["https://x.org:80/a", "b"]), ("[1, 2]", [1, 2]), ('["a b", c]', ["a b", "c"]),
    ("2024-01-01", "2024-01-01"), ("a: b", "a: b"), ("yes", "yes"), ("1_000", "1_000"), ("x # y", "x # y"),
    ('"20"', "20"), ('"[INFO] x"', "[INFO] x"), ("1.2.3", "1.2.3"), ("it's", "it's"), ("~", "~"), (".5", ".5"),
    ('{"a": 1}', {"a": 1}), ('{"a":1,"b":[2]}', {"a": 1, "b": [2]}), ("[[], {}]", [[], {}]),
    ('{"a": [null, true, Infinity, "it\'s \\"é\\"\\n"], "b": {"c": -1.5e300}}',
     {"a": [None, True, math.inf, 'it\'s "é"\n'], "b": {"c": -1.5e300}}),
]  # fmt: skip


def test_values_as_json_has_them(laptop: Laptop, host: Host) -> None:
    """JSON, Python's own words, a list of words in brackets; the rest is text. (G21)"""
    write_notebook(laptop.home / "p.ipynb", "import json; print(json.dumps([globals()['v%d' % n] for n in range(" +
                   "%d)]))" % len(VALUES))  # fmt: skip
    values = {"v%d" % number: text for number, (text, _) in enumerate(VALUES)}
    run = laptop.run("host", "execute", "p.ipynb", *options(values))
    assert run.status == 0, run.text
    got = json.loads(printed(laptop.home / RESULT)[-1])
    wrong = [(words, value, said) for (words, value), said in zip(VALUES, got) if repr(value) != repr(said)]
    assert not wrong


QUOTED = {
    "[INFO] x": '"[INFO] x"',
    "[a, b": '"[a, b"',
    "{a: 1}": '"{a: 1}"',
    '"x" y': '"\\"x\\" y"',
    "'20'": "\"'20'\"",
}
NEITHER = ["[", "[,]", "[a b", "[a,]", "[[a, b]]", "{a: 1", "{1: a}", "['a]", '["a]', "['a', 'b']", "[a] b", "[" * 5000]


def test_value_that_is_not_what_it_begins_as(laptop: Laptop, host: Host) -> None:
    """Refused before anything is connected, with the same in quotes, which makes text of it. (G21)"""
    write_notebook(laptop.home / "p.ipynb", "print([globals()['v%%d' %% n] for n in range(%d)])" % len(QUOTED))
    for value in [*QUOTED, *NEITHER]:
        words = QUOTED.get(value, "begins like JSON, and is none")
        check_failure(laptop.run("host", "execute", "p.ipynb", "-p", "x=" + value), 2, words)
    assert host.sshd.logins() == 0
    quoted = {"v%d" % number: text for number, text in enumerate(QUOTED.values())}
    run = laptop.run("host", "execute", "p.ipynb", *options(quoted))
    assert run.status == 0, run.text
    assert printed(laptop.home / RESULT)[-1] == "%s\n" % list(QUOTED)
    assert len(run_dirs(host)) == 1
