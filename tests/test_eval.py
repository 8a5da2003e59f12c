"""Code in a kernel that lives: `eval`. What it prints comes as it is printed, and nothing is sent twice."""

import os
import re
import signal
import subprocess
import sys
import uuid
from functools import partial
from pathlib import Path
from typing import Callable

import pytest
from client import api, check_failure, compute, end_kernels, events_of, new_session, send, wait_for_server
from execution import add_bash, add_kernel, add_r
from notebooks import write_notebook
from readme import readme_block
from sides import SCRIPT, Host, Laptop, Run, process_of, wait_until

pytestmark = [pytest.mark.jupyter, pytest.mark.shared]


@pytest.fixture
def run(tunnel: Run, host: Host) -> Run:
    write_notebook(host.home / "it's here.ipynb")
    wait_for_server(tunnel.url())
    return tunnel


@pytest.fixture
def kernel(run: Run) -> str:
    """The only kernel, that of a notebook, in which x is 42: the one of the test before, where that is idle."""
    sessions = api(run.url(), "sessions")
    ours = [(session["kernel"]["id"], "idle") for session in sessions if session["path"] == "it's here.ipynb"]
    if ours != [(each["id"], each["execution_state"]) for each in api(run.url(), "kernels")] or not ours:
        end_kernels(run.url())
        ours = [(new_session(run.url(), "it's here.ipynb"), "")]
    kernel = str(ours[0][0])
    compute(run.url(), "%xmode Minimal\nx = 42; n = 0", kernel)  # the word that begins the usual form is for failures
    return kernel


@pytest.fixture
def gate(host: Host) -> Path:
    """A file for which code in a kernel can wait."""
    return host.home / ("gate-" + uuid.uuid4().hex)


@pytest.fixture
def wait_until_sent(host: Host) -> Callable[[int], None]:
    """Waits until so many pieces of code are in a kernel's queue."""

    def sent() -> int:
        return len(list(host.home.glob(".local/state/rjupyter/servers/*/cells/*.asked")))

    before = sent()
    return lambda count: wait_until(lambda: sent() >= before + count, "the kernel was asked")


def test_code_runs_in_the_kernel_that_lives(laptop: Laptop, run: Run, kernel: str) -> None:
    said = laptop.run("host", "eval", "print('x is', x)\nimport sys; print('aside', file=sys.stderr)\nx + 1")
    assert said.status == 0, said.text
    assert said.stdout == "x is 42\n43\n"
    assert "aside\n" in said.stderr


def test_the_kernel_is_named_where_there_are_several(laptop: Laptop, run: Run, kernel: str) -> None:
    api(run.url(), "kernels", "POST", {})
    check_failure(laptop.run("host", "eval", "x"), 1, "several kernels could be meant")
    for name in ("it's here.ipynb", "it's here", kernel[:8]):
        assert laptop.run("host", "eval", "-k", name, "x").stdout == "42\n", name


def test_a_name_that_is_whole_comes_first(laptop: Laptop, run: Run) -> None:
    """Each directory may have an Untitled.ipynb: the path of one means it, and no other."""
    end_kernels(run.url())
    for name in ("Untitled.ipynb", "sub/Untitled.ipynb"):
        compute(run.url(), "name = %r\nprint(name)" % name, new_session(run.url(), name))
    for asked in ("Untitled.ipynb", "Untitled", "sub/Untitled"):
        name = asked.replace(".ipynb", "") + ".ipynb"
        assert laptop.run("host", "eval", "-k", asked, "print(name)").stdout == name + "\n", asked
    laptop.run("host", "eval", "-k", "sub/Untitled", "print(name)")  # it is the newest
    for asked in ("Untitled.ipynb", "Untitled"):
        assert "\nUntitled.ipynb\n" in laptop.run("host", "output", asked).stdout, asked
    assert "\nsub/Untitled.ipynb\n" in laptop.run("host", "output").stdout
    end_kernels(run.url())


def test_a_kernel_is_started_where_there_is_none_and_stays(laptop: Laptop, run: Run) -> None:
    end_kernels(run.url())
    assert laptop.run("host", "eval", "y = 7").status == 0
    assert laptop.run("host", "eval", "y").stdout == "7\n"
    assert len(api(run.url(), "kernels")) == 1


def test_an_error_is_on_stderr_and_in_the_status(laptop: Laptop, run: Run, kernel: str) -> None:
    said = laptop.run("host", "eval", "%xmode Minimal\nprint('before')\n1 / 0")
    assert said.status == 5
    assert said.stdout.endswith("before\n")
    assert "ZeroDivisionError: division by zero" in said.stderr
    assert laptop.run("host", "eval", "!echo one; echo two").stdout == "one\ntwo\n"  # of a terminal, with \r\n
    assert "StdinNotImplementedError" in laptop.run("host", "eval", "input()").stderr


def test_code_from_stdin(laptop: Laptop, run: Run, kernel: str) -> None:
    argv = [laptop.python, str(SCRIPT), "-F", laptop.config, "host", "eval", "-"]
    code = "text = 'gr\u00fc\u00df, \u4e16\u754c'\n%s\nprint(text)\n" % ("#" * 100_000)
    said = subprocess.run(argv, input=code, env=laptop.environment, capture_output=True, text=True, timeout=60)
    assert said.stdout == "gr\u00fc\u00df, \u4e16\u754c\n", said.stderr
    raw = [os.fsencode(word) for word in argv]
    for words, given in ((raw, b"'gr\xfc\xdf'"), ([*raw[:-1], b"'gr\xfc\xdf'"], b"")):
        wrong = subprocess.run(words, input=given, env=laptop.environment, capture_output=True, timeout=60)
        assert (wrong.returncode, wrong.stderr.splitlines()[0]) == (1, b"rjupyter: the code is not UTF-8"), wrong.stderr


def test_as_json(laptop: Laptop, run: Run, kernel: str) -> None:
    events = [e for e in events_of(laptop.run("--json", "host", "eval", "print(x); x")) if "cell" in e]
    assert [event["event"] for event in events] == ["input", "output", "output", "finished"]
    assert events[1]["content"] == {"name": "stdout", "text": "42\n"}
    assert events[2]["content"]["data"] == {"text/plain": "42"}
    assert events[3]["is_done"] is True


def test_help_is_printed(laptop: Laptop, host: Host, run: Run, kernel: str) -> None:
    """It comes beside the outputs, in what the kernel replies; a page shows it in a pager."""
    (host.home / "loaded.py").write_text("loaded = 'from a file'\n")
    laptop.run("host", "eval", "def twice(n):\n    'Twice as much.'\n    return 2 * n")
    for code, words in {
        "twice?": "Docstring: Twice as much.",
        "twice??": "return 2 * n",
        "%pinfo twice": "Signature: twice(n)",
        "print(x)\ntwice?": "42\n",
        "%load loaded.py": "loaded = 'from a file'",
    }.items():
        said = laptop.run("host", "eval", code)
        assert said.status == 0 and words in said.stdout, (code, said.text)
        assert "\x1b" not in said.stdout
    assert laptop.run("host", "eval", "twice(2)").stdout == "4\n"


def test_help_of_r_is_printed(laptop: Laptop, host: Host, run: Run) -> None:
    kernel = new_session(run.url(), "r.ipynb", add_r(host.home)["name"])
    said = laptop.run("host", "eval", "-k", kernel[:8], "?lm")
    assert "Fitting Linear Models" in said.stdout, said.text  # with no bold by overstriking
    end_kernels(run.url())


def test_a_display_that_is_updated_is_printed_as_it_is_at_last(laptop: Laptop, run: Run, kernel: str) -> None:
    code = "shown = display('loading', display_id=True)\nfor n in range(3): shown.update('acc %d' % n)"
    assert laptop.run("host", "eval", code).stdout == "'loading'\n'acc 2'\n"


PICTURES = """
from IPython.display import HTML, SVG, Image, display
import base64
dot = base64.b64decode('iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==')
shown = display(Image(dot), display_id=True)
display(SVG('<svg xmlns="http://www.w3.org/2000/svg"/>'), HTML('<b>text</b>'))
display({'application/x-odd': 'odd'}, raw=True)
shown.update(Image(dot))
"""


def test_displays_are_written_where_that_is_asked_for(laptop: Laptop, run: Run, kernel: str) -> None:
    said = laptop.run("host", "eval", "--save-images", "new/plots", PICTURES)
    names = re.findall(r"^\[(\S+): new/plots/cell-(\d+)(\S+)\]$", said.stdout, re.MULTILINE)
    png, svg, odd = "image/png", "image/svg+xml", "application/x-odd"
    assert [(kind, end) for kind, _, end in names] == [
        (png, ".png"),
        (svg, ".svg"),
        (odd, ".bin"),
        (png, "-2.png"),
    ], said.text
    assert "<IPython.core.display.HTML object>" in said.stdout
    plots = laptop.home / "new/plots"
    count = names[0][1]
    assert (plots / ("cell-%s.png" % count)).read_bytes().startswith(b"\x89PNG")
    assert (plots / ("cell-%s.svg" % count)).read_text().startswith("<svg")
    (plots / ("cell-%d.png" % (int(count) + 1))).write_text("of mine")
    events = events_of(laptop.run("--json", "host", "eval", "--save-images", "new/plots", "Image(dot)"))
    (image,) = [event for event in events if event["event"] == "image"]
    assert image == {"event": "image", "type": png, "path": "new/plots/cell-%d-2.png" % (int(count) + 1)}
    assert (plots / ("cell-%d.png" % (int(count) + 1))).read_text() == "of mine"
    (laptop.home / "a file").write_text("")
    failed = laptop.run("host", "eval", "--save-images", "a file", "ran = 1")
    check_failure(failed, 1, "cannot write into a file")
    assert "NameError" in laptop.run("host", "eval", "ran").stderr


def test_no_longer_than_it_may(laptop: Laptop, run: Run, kernel: str, gate: Path) -> None:
    """What was begun goes on, and so does what waits for it."""
    said = laptop.run("host", "eval", "--timeout", "1s", "print('begun', flush=True)\n" + waits_for(gate, "n = 7"))
    assert (said.status, said.stdout) == (6, "begun\n")
    form = r"after 1 s\n  why: It keeps running\.\n +To follow it: .*\n +To interrupt it: .*(host .*)\n"
    words = re.search(form, said.stderr)
    assert words and words.group(1) == "host eval --interrupt -k %s" % kernel[:8], said.stderr
    waiting = laptop.run("host", "eval", "--timeout", "1", "n = n + 1")
    check_failure(waiting, 6, "it is not done after 1 s", "It waits for a cell before it.\n", "To follow it: ")
    assert "--interrupt" not in waiting.stderr  # that would be the other cell's
    gate.write_text("")
    assert laptop.run("host", "eval", "--timeout", "1h", "n").stdout == "8\n"


def test_20_mb_arrive_whole(laptop: Laptop, run: Run, kernel: str) -> None:
    said = laptop.run("host", "eval", "for i in range(200000): print('%08d' % i + 'x' * 91)").stdout
    assert [int(line[:8]) for line in said.splitlines()] == list(range(200000))
    end_kernels(run.url())  # `output` would show all of it in the tests that come


def test_what_is_lost_on_the_way_is_told(laptop: Laptop, host: Host, run: Run, kernel: str, gate: Path) -> None:
    """One output that is too large, and more of them than are kept until a link that stalls takes them."""
    said = laptop.run("host", "eval", "print('x' * 40_000_000, flush=True)\nprint('after')")
    assert said.stdout == "after\n"
    assert "[an output of 38 MB was not kept]\n" in said.stderr
    printing = waits_for(gate, "for i in range(150): print(f'{i} ' + 'x' * 1_000_000, flush=True)")
    asked = laptop.start("--json", "host", "eval", "print('begun', flush=True)\n" + printing, has_terminal=False)
    asked.expect("begun")
    os.kill(asked.pid, signal.SIGSTOP)
    gate.write_text("")
    wait_until(lambda: api(run.url(), "kernels/" + kernel)["execution_state"] == "idle", "it is done")
    os.kill(asked.pid, signal.SIGCONT)
    assert asked.wait() == 0, asked.text[-2000:]
    assert "older output was dropped" in asked.stdout
    assert re.search(r"149 x+", asked.stdout)  # at least the newest half of what is kept
    end_kernels(run.url())


def test_nothing_is_sent_twice_when_the_connection_is_lost(
    laptop: Laptop, host: Host, run: Run, kernel: str, gate: Path
) -> None:
    code = (
        "import os, time\nn += 1\nprint('begun', flush=True)\nwhile not os.path.exists(%r): time.sleep(.05)\nprint(n)"
    )
    asked = laptop.start("host", "eval", code % str(gate), has_terminal=False)
    asked.expect("begun")
    host.sshd.end_connections(signal.SIGKILL)
    asked.expect("Connected to host again")
    gate.write_text("")
    assert asked.wait() == 0, asked.text
    assert asked.stdout == "begun\n1\n"


def test_ctrl_c_leaves_it_running_and_says_how_to_go_on(laptop: Laptop, run: Run, kernel: str) -> None:
    code = "import time\nprint('begun', flush=True)\ntime.sleep(600)"
    asked = laptop.start("host", "eval", code, has_terminal=False)
    asked.expect("begun")
    asked.interrupt()
    assert asked.wait() == 130
    pattern = r"\nTo follow it: \S+ .*(host output %s -f)\nTo interrupt it: .*(host eval .*)\n" % kernel[:8]
    words = re.search(pattern, asked.text)
    assert words, asked.text
    assert api(run.url(), "kernels/" + kernel)["execution_state"] == "busy"
    ended = laptop.run(*words.group(2).split())
    assert "Interrupted the kernel of it's here.ipynb" in ended.stderr, ended.text
    wait_until(lambda: api(run.url(), "kernels/" + kernel)["execution_state"] == "idle", "it is interrupted")


def test_interrupted_is_said_of_a_kernel_that_takes_it(laptop: Laptop, run: Run, kernel: str, gate: Path) -> None:
    deaf = "import signal; heard = signal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('deaf')\n"
    page = send(run.url(), deaf + waits_for(gate, "signal.signal(signal.SIGINT, heard)"), kernel)
    wait_until(lambda: "deaf" in laptop.run("host", "output", kernel[:8]).stdout, "it computes")
    check_failure(laptop.run("host", "eval", "--interrupt"), 1, "the kernel was not interrupted", "computes on")
    gate.write_text("")
    page.close()


@pytest.mark.parametrize("how", ["deaf", "behind a runner", "idle"])
def test_interrupted_is_said_only_where_it_is_so(laptop: Laptop, host: Host, run: Run, gate: Path, how: str) -> None:
    """Of a kernel that no page has come to, which Jupyter calls "starting" whatever it does."""
    name = "python3"
    if how == "behind a runner":  # which keeps to itself what is for the kernel
        runner = "trap '' INT; exec setsid --wait %s -m ipykernel_launcher -f \"$0\"" % sys.executable
        name = "behind"
        add_kernel(host.home, name, ["sh", "-c", runner, "{connection_file}"])
    end_kernels(run.url())
    kernel = api(run.url(), "kernels", "POST", {"name": name})["id"]
    if how == "idle":
        assert laptop.run("host", "eval", "1").stdout == "1\n"
        said = laptop.run("host", "eval", "--interrupt")
        assert said.status == 0 and "Nothing to interrupt: no notebook (%s) is idle." % kernel[:8] in said.stderr
        return
    deaf = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n" if how == "deaf" else ""
    asked = laptop.start(
        "host", "eval", deaf + "print('begun', flush=True)\n" + waits_for(gate, ""), has_terminal=False
    )
    asked.expect("begun")
    check_failure(laptop.run("host", "eval", "--interrupt"), 1, "the kernel was not interrupted", "computes on")
    gate.write_text("")
    assert asked.wait() == 0
    end_kernels(run.url())


def test_interrupted_is_said_where_the_next_cell_begins(laptop: Laptop, run: Run, kernel: str, gate: Path) -> None:
    asked = laptop.start(
        "host", "eval", "%xmode Minimal\nprint('begun')\nimport time; time.sleep(600)", has_terminal=False
    )
    asked.expect("begun")
    page = send(run.url(), waits_for(gate, ""), kernel)
    ended = laptop.run("host", "eval", "--interrupt")
    assert "Interrupted the kernel of it's here.ipynb" in ended.stderr, ended.text
    assert asked.wait() == 5, asked.text
    gate.write_text("")
    page.close()


def test_a_kernel_that_tells_an_interrupt_in_its_reply_alone(laptop: Laptop, host: Host, run: Run) -> None:
    """As bash and R do: it was not done."""
    add_bash(host.home)
    bash = new_session(run.url(), "bash.ipynb", "bash")
    asked = laptop.start("host", "eval", "-k", bash[:8], "echo begun; sleep 600", has_terminal=False)
    asked.expect("begun")
    laptop.run("host", "eval", "-k", bash[:8], "--interrupt")
    assert asked.wait() == 5, asked.text
    api(run.url(), "kernels/" + bash, "DELETE")


def test_a_kernel_that_dies_is_told(laptop: Laptop, run: Run, kernel: str) -> None:
    said = laptop.run("host", "eval", "import os; os._exit(1)")
    check_failure(said, 4, "the kernel died")


# -- behind what others asked for -------------------------------------------------------------------------------------


def waits_for(gate: Path, then: str) -> str:
    """Code that computes until a file is there, and then does something."""
    return "import os, time\nwhile not os.path.exists(%r): time.sleep(.05)\n%s" % (str(gate), then)


def test_code_behind_a_cell_that_fails_ends_at_once(
    laptop: Laptop, run: Run, kernel: str, gate: Path, wait_until_sent: Callable[[int], None]
) -> None:
    page = send(run.url(), "%xmode Minimal\n" + waits_for(gate, "1 / 0"), kernel)
    asked = [laptop.start("host", "eval", "print('ran')", has_terminal=False) for _ in range(2)]
    wait_until_sent(2)
    gate.write_text("")
    for run_of in asked:
        run_of.wait()
        check_failure(run_of, 1, "it was not run: a cell before it failed")
    page.close()
    assert laptop.run("host", "eval", "print(x)").stdout == "42\n"
    assert "ran\n" not in laptop.run("host", "output", kernel[:8]).stdout


def test_code_behind_a_cell_that_is_interrupted(
    laptop: Laptop, run: Run, kernel: str, wait_until_sent: Callable[[int], None]
) -> None:
    page = send(run.url(), "print('begun')\nimport time; time.sleep(600)", kernel)
    asked = laptop.start("host", "eval", "print('ran')", has_terminal=False)
    wait_until_sent(1)
    assert laptop.run("host", "eval", "--interrupt").status == 0
    asked.wait()
    check_failure(asked, 1, "it was not run: a cell before it failed")
    page.close()


@pytest.mark.parametrize("how", ["restarted", "killed"])
@pytest.mark.parametrize("meanwhile", ["connected", "away"])
def test_code_in_the_queue_of_a_kernel_that_goes(
    laptop: Laptop,
    host: Host,
    run: Run,
    kernel: str,
    wait_until_sent: Callable[[int], None],
    how: str,
    meanwhile: str,
) -> None:
    """Whoever comes back to it later finds another kernel, which has never heard of it."""
    # Jupyter interrupts a kernel before it restarts it: a cell that fails by that would be another reason.
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)"
    page = send(run.url(), deaf, kernel)
    pid = process_of(kernel)
    asked = laptop.start("host", "eval", "print('ran')", has_terminal=False)
    wait_until_sent(1)
    if meanwhile == "away":
        host.sshd.stop()
        host.sshd.end_connections(signal.SIGKILL)
    there = re.sub(r":\d+/", ":%d/" % host.servers()[0]["port"], run.url())  # past the tunnel
    if how == "restarted":
        api(there, "kernels/%s/restart" % kernel, "POST", {})
    else:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: process_of(kernel) != pid, "another one")
    if meanwhile == "away":
        host.sshd.start()
    asked.wait()
    check_failure(asked, 4, "the kernel died")
    page.close()


def test_the_page_interrupts_it_as_a_cell_of_its_own(laptop: Laptop, run: Run, kernel: str) -> None:
    code = "%xmode Minimal\nprint('begun', flush=True)\nimport time; time.sleep(600)"
    asked = laptop.start("host", "eval", code, has_terminal=False)
    asked.expect("begun")
    api(run.url(), "kernels/%s/interrupt" % kernel, "POST", {})
    assert asked.wait() == 5, asked.text
    assert "KeyboardInterrupt" in asked.stderr


def test_an_error_does_not_cancel_what_the_page_has_asked_for(
    laptop: Laptop, run: Run, kernel: str, gate: Path, wait_until_sent: Callable[[int], None]
) -> None:
    code = "%xmode Minimal\nprint('begun', flush=True)\n" + waits_for(gate, "1 / 0")
    asked = laptop.start("host", "eval", code, has_terminal=False)
    asked.expect("begun")
    pages = [send(run.url(), "print('page', %d)" % number, kernel) for number in (1, 2)]
    other = laptop.start("host", "eval", "print('second')", has_terminal=False)
    wait_until_sent(2)
    gate.write_text("")
    assert asked.wait() == 5, asked.text
    assert other.wait() == 0, other.text
    assert other.stdout == "second\n"
    for cell in ("page 1\n", "page 2\n"):  # each came by a connection of its own, one of them late perhaps
        wait_until(partial(lambda said: said in laptop.run("host", "output", kernel[:8]).stdout, cell), cell)
    for page in pages:
        page.close()


def test_ten_lines_of_the_readme(laptop: Laptop, run: Run, kernel: str) -> None:
    """A program on the laptop works in the kernel, as the README shows it."""
    code = readme_block("def remote(code)").replace("rjupyter", str(SCRIPT)).replace("gpu1", "host")
    code = code.replace('["', '[%r, "' % laptop.python, 1).replace('"host"', '"-F", %r, "host"' % laptop.config)
    said = subprocess.run(
        [laptop.python, "-c", code], env=laptop.environment, capture_output=True, text=True, timeout=60
    )
    assert said.stdout.splitlines()[-1:] == ["42"], said
