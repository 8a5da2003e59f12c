"""A JupyterLab here, with its notebooks here and its kernels there, and the one line that starts it: `--gateway`."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import uuid
from pathlib import Path
from typing import Iterator

import pytest
import websocket
from client import api, events_of, new_session
from jupyters import CACHE
from sides import SCRIPT, VENV_BIN, Host, Laptop, processes_with, quiet_port, ssh_of, wait_until

pytestmark = pytest.mark.jupyter


@contextlib.contextmanager
def lab(laptop: Laptop, log: Path, before: str) -> Iterator[str]:
    """Start a JupyterLab here as a person does, in a shell, after another line; yield its address."""
    port = quiet_port()
    line = "jupyter lab --no-browser --port %d --ServerApp.port_retries=0 --IdentityProvider.token=ours" % port
    line += " --allow-root" if os.getuid() == 0 else ""
    path = "%s:%s" % (VENV_BIN, laptop.environment["PATH"])
    with open(log, "wb") as stream:
        started = subprocess.Popen(
            ["bash", "-c", "%s && exec %s" % (before, line)],
            env={**laptop.environment, "PATH": path},
            cwd=laptop.home,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
    url = "http://127.0.0.1:%d/lab?token=ours" % port

    def answers() -> bool:
        assert started.poll() is None, log.read_text()
        with contextlib.suppress(OSError):
            return bool(api(url, "status"))
        return False

    try:
        wait_until(answers, "JupyterLab answers here")
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGTERM)
        started.wait(30)


class Page:
    """What a page has of a kernel: one connection to the server that it came from."""

    def __init__(self, url: str, kernel: str) -> None:
        address = url.replace("http", "ws").replace("/lab?", "/api/kernels/%s/channels?session_id=page&" % kernel)
        self.connection = websocket.create_connection(address, timeout=5)

    def run(self, code: str) -> str:
        """Run a cell, and return what it printed; nothing when there is no answer within a few seconds."""
        identity = uuid.uuid4().hex
        head = {"msg_id": identity, "msg_type": "execute_request", "username": "", "session": "page"}
        content = {"code": code, "silent": False, "store_history": True, "user_expressions": {}, "allow_stdin": False}
        message = {"header": head, "parent_header": {}, "metadata": {}, "content": content, "channel": "shell"}
        self.connection.send(json.dumps(message))
        printed = ""
        with contextlib.suppress(websocket.WebSocketTimeoutException):
            while True:
                answer = json.loads(self.connection.recv())
                if answer["parent_header"].get("msg_id") == identity:
                    printed += answer["content"]["text"] if answer["msg_type"] == "stream" else ""
                    if answer["content"].get("execution_state") == "idle":
                        return printed
        return ""


def test_a_jupyterlab_here_has_its_kernels_there(laptop: Laptop, host: Host, mark: str, tmp_path: Path) -> None:
    (host.home / "work").mkdir()
    (laptop.home / "here.ipynb").write_text('{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}')
    ours = "%s %s -F %s --local-port %d" % (laptop.python, SCRIPT, laptop.config, quiet_port())
    with lab(laptop, tmp_path / "log", 'settings=$(%s --gateway host:work) && eval "$settings"' % ours) as url:
        kernel = new_session(url, "here.ipynb")
        page = Page(url, kernel)
        where = "import os; n = 42; print(os.getcwd(), os.environ['RJUPYTER_SIDE'])"
        assert page.run(where) == "%s host\n" % (host.home / "work")
        os.kill(ssh_of(mark), signal.SIGKILL)
        wait_until(lambda: host.sshd.logins() == 2, "the tunnel has connected again")
        # The page sees nothing of that: the JupyterLab behind it connects again, a second later.
        assert wait_until(lambda: page.run("print(n)"), "the next cell is done") == "42\n"
        page.connection.close()
        assert [found.name for found in host.home.rglob("*.ipynb")] == []
        assert api(url, "contents/here.ipynb?content=0")["type"] == "notebook"
        again = laptop.run("--gateway", "host:work")
        words = r"export JUPYTER_GATEWAY_URL=http://127\.0\.0\.1:\d+/ JUPYTER_GATEWAY_AUTH_TOKEN=(\w+)"
        token = re.fullmatch(words + r"( JUPYTER_GATEWAY_\w+=\w+)+\n", again.stdout)
        assert token and token.group(1), again.text
        assert not [words for words in processes_with(mark).values() if token.group(1) in words]
        api(url, "kernels/" + kernel, "DELETE")
    assert laptop.run("host:work", "close").status == 0


def test_no_jupyterlab_starts_where_the_line_or_the_configuration_is_wrong(laptop: Laptop) -> None:
    file = laptop.home / ".config/rjupyter/config"
    file.parent.mkdir(parents=True)
    for words, text in ((["gpu1"], "[*]\nlabb = yes\n"), (["gpu1", "--nwe"], "")):
        file.write_text(text)
        run = laptop.run("--gateway", *words)
        assert run.status == 2 and run.stdout == "false\n", run.text
    file.write_text("[*]\njson = yes\n")
    (event,) = events_of(laptop.run("--gateway", "nohost.invalid"))
    assert event["event"] == "failure"


# What VS Code and others do, and a page: they speak to a server through this library.
CLIENT = """
console.debug = console.log = console.warn = () => {};  // its own words
const { ServerConnection, KernelManager } = require('@jupyterlab/services');
async function main() {
  const printed = new URL(process.env.PRINTED);
  const serverSettings = ServerConnection.makeSettings({
    baseUrl: printed.origin + printed.pathname.replace(/tree$/, ''),
    token: printed.searchParams.get('token'),
    appendToken: true,
  });
  const kernel = await new KernelManager({ serverSettings }).startNew({ name: 'python3' });
  const run = async code => {
    const future = kernel.requestExecute({ code });
    future.onIOPub = message => process.stdout.write(message.content.text || '');
    await future.done;
  };
  await run("n = 42; print('begun')");
  await new Promise(resolve => process.stdin.once('data', resolve));
  await run('print(n)');
  await kernel.shutdown();
}
main().then(() => process.exit(0), error => { console.error(error); process.exit(1); });
"""


def services() -> Path:
    """Return a directory in which node finds @jupyterlab/services; the first test brings it, with npm."""
    kept = CACHE / "services-7"
    if not shutil.which("node") or not shutil.which("npm"):
        pytest.skip("there is no node with npm on this machine")
    if not kept.exists():
        making = Path(tempfile.mkdtemp(prefix="services-", dir=CACHE))
        npm = ["npm", "install", "--no-audit", "--no-fund", "--loglevel=error", "@jupyterlab/services@7", "ws@8"]
        if subprocess.run(npm, cwd=making, stdin=subprocess.DEVNULL, timeout=300).returncode:
            shutil.rmtree(making)
            pytest.skip("npm cannot install @jupyterlab/services here")
        with contextlib.suppress(OSError):  # another test process has brought it
            making.rename(kept)
    return kept


def test_the_address_is_one_for_what_is_built_on_jupyterlab_services(laptop: Laptop, host: Host, mark: str) -> None:
    """Its own reconnect finds the same port, and the same kernel."""
    with laptop.opened("--local-port", str(quiet_port()), "host") as run:
        environment = {**laptop.environment, "PRINTED": run.url()}
        pipe = subprocess.PIPE
        with subprocess.Popen(
            ["node", "-e", CLIENT], cwd=services(), env=environment, stdin=pipe, stdout=pipe, text=True
        ) as client:
            assert client.stdin and client.stdout
            assert client.stdout.readline() == "begun\n"
            os.kill(ssh_of(mark), signal.SIGKILL)
            run.expect("Connected to host again")
            client.stdin.write("go on\n")
            client.stdin.flush()
            assert client.stdout.readline() == "42\n"
            assert client.wait(30) == 0
