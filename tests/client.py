"""What a test does with a server that is open: ask it, compute in its kernels; and what rjupyter.py says."""

import json
import re
import ssl
import urllib.request
from typing import Any, Dict, List
from urllib.parse import parse_qs, urlsplit

import websocket
from sides import Laptop, Run, quiet_port, wait_until


def base_url(url: str) -> str:
    """Return the base_url in a printed URL: what comes before the page."""
    match = re.match(r"(/(?:[^/]+/)*?)(?:tree|lab|notebooks|edit)\b", urlsplit(url).path)
    assert match, url
    return match.group(1)


def api(url: str, path: str, method: str = "GET", body: Any = None) -> Any:
    """Ask the server behind a printed URL, with the token in it."""
    parts = urlsplit(url)
    token = token_of(url)
    request = urllib.request.Request(
        "%s://%s%sapi/%s" % (parts.scheme, parts.netloc, base_url(url), path), method=method
    )
    request.add_header("Authorization", "token " + token)
    if body is not None:
        request.data = json.dumps(body).encode()
    with urllib.request.urlopen(request, timeout=30, context=ssl._create_unverified_context()) as answer:
        return json.loads(answer.read() or b"null")


def wait_for_server(url: str) -> None:
    """Wait until a server answers: the test before may have cut the tunnel to it."""
    wait_until(lambda: is_up(url), "the server answers")


def token_of(url: str) -> str:
    """Return the token in a printed URL."""
    return parse_qs(urlsplit(url).query)["token"][0]


def connected(url: str, kernel: str) -> websocket.WebSocket:
    """Return a connection to the channels of a kernel, as a page has it."""
    parts = urlsplit(url)
    scheme = {"http": "ws", "https": "wss"}[parts.scheme]
    address = "%s://%s%sapi/kernels/%s/channels" % (scheme, parts.netloc, base_url(url), kernel)
    header = {"Authorization": "token " + token_of(url)} if parts.query else {}
    return websocket.create_connection(address, timeout=60, header=header, sslopt={"cert_reqs": ssl.CERT_NONE})


def send(url: str, code: str, kernel: str, *more: str) -> websocket.WebSocket:
    """Let a kernel run `code`, as message "1", and more of it, and return the connection to its channels."""
    connection = connected(url, kernel)
    for number, source in enumerate((code, *more), 1):
        content = {
            "code": source,
            "silent": False,
            "store_history": False,
            "user_expressions": {},
            "allow_stdin": False,
        }
        head = {"msg_id": str(number), "msg_type": "execute_request", "username": "", "session": "s"}
        message = {"header": head, "parent_header": {}, "metadata": {}, "content": content, "channel": "shell"}
        connection.send(json.dumps(message))
    return connection


def new_kernel(url: str) -> str:
    """Start a kernel, and return its id."""
    return str(api(url, "kernels", "POST", {})["id"])


def new_session(url: str, path: str = "train.ipynb", name: str = "python3") -> str:
    """Start a kernel as a page does for a notebook, and return its id."""
    body = {"path": path, "type": "notebook", "name": path, "kernel": {"name": name}}
    return str(api(url, "sessions", "POST", body)["kernel"]["id"])


def end_kernels(url: str) -> None:
    """End all kernels of a server."""
    for kernel in api(url, "kernels"):
        api(url, "kernels/" + kernel["id"], "DELETE")


def held(laptop: Laptop, *arguments: str) -> Run:
    """Open, on a port that no other test takes, until the tunnel is up."""
    run = laptop.start("--local-port", str(quiet_port()), *arguments, has_terminal=False)
    run.url()
    run.expect("To end it")
    return run


def compute(url: str, code: str, kernel: str = "") -> str:
    """Run `code` in a kernel, a new one without a name, over the websocket, and return what it printed."""
    connection = send(url, code, kernel or new_kernel(url))
    printed = ""
    ends = {"execute_reply", "idle"}  # of two channels, in any order
    while ends:
        answer = json.loads(connection.recv())
        if answer["parent_header"].get("msg_id") == "1":
            if answer["msg_type"] == "stream":
                printed += answer["content"]["text"]
            ends -= {answer["msg_type"], answer["content"].get("execution_state")}
    connection.close()
    return printed


def whereabouts(url: str) -> str:
    """Return on which node and in which directory the stand-in for Jupyter behind a printed URL runs."""
    status = api(url, "status")
    return "%s %s" % (status["node"], status["root_dir"])


def busy_kernel(url: str) -> None:
    """Let a new kernel be busy until it is killed, at no cost, and wait until the server says so."""
    kernel = new_kernel(url)
    connection = send(url, "import time\nwhile True: time.sleep(600)", kernel)
    wait_until(lambda: api(url, "kernels/" + kernel)["execution_state"] == "busy", "the kernel computes")
    connection.close()


def check_failure(run: Run, status: int, *words: str) -> None:
    """A failure is: its status, nothing on stdout, and what, why, try on stderr."""
    assert run.status == status, run.text
    assert run.stdout == ""
    assert re.search(r"^rjupyter: ", run.stderr, re.MULTILINE)
    for word in words:
        assert word in run.stderr, run.stderr


def is_up(url: str) -> bool:
    """True when the server behind a printed URL answers."""
    try:
        return bool(api(url, "status"))
    except OSError:
        return False


def events_of(run: Run) -> List[Dict[str, Any]]:
    """Return what a run with --json printed."""
    return [json.loads(line) for line in run.stdout.splitlines()]


def listed(laptop: Laptop, event: str = "server") -> List[Dict[str, Any]]:
    """Return what `list` has of the host's servers; or of its jobs, "job", or of its runs, "run"."""
    run = laptop.run("host", "list", "--json")
    assert run.status == 0, run.text
    return [thing for thing in events_of(run) if thing["event"] == event]
