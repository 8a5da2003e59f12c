"""Code in a kernel that lives: `eval`. What it prints comes as it is printed, and nothing is sent twice."""

import re
import signal
import subprocess

import pytest
from client import api, check_failure, compute, events_of, held, new_session
from notebooks import write_notebook
from readme import readme_block
from sides import SCRIPT, Host, Laptop, Run, quiet_port, wait_until

pytestmark = pytest.mark.jupyter


@pytest.fixture
def run(laptop: Laptop, host: Host) -> Run:
    write_notebook(host.home / "it's here.ipynb")
    return held(laptop, "host")


@pytest.fixture
def kernel(run: Run) -> str:
    """The kernel of a notebook, in which x is 42."""
    kernel = new_session(run.url(), "it's here.ipynb")
    compute(run.url(), "x = 42; n = 0", kernel)
    return kernel


def test_code_runs_in_the_kernel_that_lives(laptop: Laptop, run: Run, kernel: str) -> None:
    said = laptop.run("host", "eval", "print('x is', x)\nimport sys; print('aside', file=sys.stderr)\nx + 1")
    assert said.status == 0, said.text
    assert said.stdout == "x is 42\n43\n"
    assert "aside\n" in said.stderr


@pytest.mark.parametrize("name", ["it's here.ipynb", "it's here", "id"])
def test_the_kernel_is_named_where_there_are_several(laptop: Laptop, run: Run, kernel: str, name: str) -> None:
    api(run.url(), "kernels", "POST", {})
    check_failure(laptop.run("host", "eval", "x"), 1, "several kernels could be meant")
    assert laptop.run("host", "eval", "-k", kernel[:8] if name == "id" else name, "x").stdout == "42\n"


def test_a_kernel_is_started_where_there_is_none_and_stays(laptop: Laptop, run: Run) -> None:
    assert laptop.run("host", "eval", "y = 7").status == 0
    assert laptop.run("host", "eval", "y").stdout == "7\n"
    assert len(api(run.url(), "kernels")) == 1


def test_an_error_is_on_stderr_and_in_the_status(laptop: Laptop, run: Run, kernel: str) -> None:
    said = laptop.run("host", "eval", "%xmode Minimal\nprint('before')\n1 / 0")
    assert said.status == 5
    assert said.stdout.endswith("before\n")
    assert "ZeroDivisionError: division by zero" in said.stderr
    assert "StdinNotImplementedError" in laptop.run("host", "eval", "input()").stderr


def test_code_from_stdin(laptop: Laptop, run: Run, kernel: str) -> None:
    argv = [laptop.python, str(SCRIPT), "-F", laptop.config, "host", "eval", "-"]
    code = "text = 'gr\u00fc\u00df, \u4e16\u754c'\nprint(text)\n"
    said = subprocess.run(argv, input=code, env=laptop.environment, capture_output=True, text=True, timeout=60)
    assert said.stdout == "gr\u00fc\u00df, \u4e16\u754c\n", said.stderr


def test_as_json(laptop: Laptop, run: Run, kernel: str) -> None:
    events = [e for e in events_of(laptop.run("--json", "host", "eval", "print(x); x")) if "cell" in e]
    assert [event["event"] for event in events] == ["input", "output", "output", "finished"]
    assert events[1]["content"] == {"name": "stdout", "text": "42\n"}
    assert events[2]["content"]["data"] == {"text/plain": "42"}
    assert events[3]["is_done"] is True


def test_20_mb_arrive_whole(laptop: Laptop, run: Run, kernel: str) -> None:
    said = laptop.run("host", "eval", "for i in range(200000): print('%08d' % i + 'x' * 91)").stdout
    assert [int(line[:8]) for line in said.splitlines()] == list(range(200000))


def test_nothing_is_sent_twice_when_the_connection_is_lost(laptop: Laptop, host: Host, run: Run, kernel: str) -> None:
    gate = host.home / "gate"
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


def test_ctrl_c_leaves_it_running_and_says_how_to_go_on(laptop: Laptop, host: Host, run: Run, kernel: str) -> None:
    code = "import time\nprint('begun', flush=True)\ntime.sleep(600)"
    asked = laptop.start("host", "eval", code, has_terminal=False)
    asked.expect("begun")
    asked.interrupt()
    assert asked.wait() == 130
    words = re.search(
        r"To follow it: \S+ .*(host output %s -f)   To interrupt it: .*(host eval .*)\n" % kernel[:8], asked.text
    )
    assert words, asked.text
    assert api(run.url(), "kernels/" + kernel)["execution_state"] == "busy"
    ended = laptop.run(*words.group(2).split())
    assert "Interrupted the kernel of it's here.ipynb" in ended.stderr, ended.text
    wait_until(lambda: api(run.url(), "kernels/" + kernel)["execution_state"] == "idle", "it is interrupted")


def test_a_kernel_that_dies_is_told(laptop: Laptop, run: Run, kernel: str) -> None:
    said = laptop.run("host", "eval", "import os; os._exit(1)")
    check_failure(said, 4, "the kernel died")


def test_no_server_and_no_record(laptop: Laptop, host: Host) -> None:
    check_failure(laptop.run("host", "eval", "1"), 1, "no server of yours runs there")
    check_failure(laptop.run("host", "eval"), 2, "eval takes CODE")
    with laptop.opened("--local-port", str(quiet_port()), "--no-record", "host") as run:
        api(run.url(), "kernels", "POST", {})
        check_failure(laptop.run("host", "eval", "1"), 1, "not recorded")


def test_ten_lines_of_the_readme(laptop: Laptop, host: Host, run: Run, kernel: str) -> None:
    """A program on the laptop works in the kernel, as the README shows it."""
    code = readme_block("def remote(code)").replace("rjupyter.py", str(SCRIPT)).replace("gpu1", "host")
    code = code.replace('["', '[%r, "' % laptop.python, 1).replace('"host"', '"-F", %r, "host"' % laptop.config)
    said = subprocess.run(
        [laptop.python, "-c", code], env=laptop.environment, capture_output=True, text=True, timeout=60
    )
    assert said.stdout.splitlines()[-1:] == ["42"], said
