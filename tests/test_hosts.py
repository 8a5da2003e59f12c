"""Any environment on the host: where Jupyter is, which one, how the user configured it, and what the host lacks."""

import hashlib
import json
import os
import re
import ssl
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any, Callable, Dict
from urllib.parse import parse_qs, urlsplit

import pytest
from client import api, check_failure, compute
from jupyters import AGES, interpreters, jupyter_for_everyone, jupyter_of
from sides import (
    SCRIPT,
    SYSTEM_PATH,
    Host,
    Laptop,
    User,
    bare_python,
    processes_with,
    quiet_port,
    wait_until,
    without_port,
)

import rjupyter


@pytest.fixture
def bare_host(make_host: Callable[..., Host], directory: Path) -> Host:
    """A host with Python and without Jupyter on PATH."""
    return make_host(path=bare_python(directory / "bin"))


def environment_at(prefix: Path) -> Path:
    """Put an environment with Jupyter at `prefix`, as conda, venv or pixi would."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    prefix.symlink_to(jupyter_for_everyone().parent)
    return prefix


def prefix_of_kernel(url: str) -> str:
    return compute(url, "import sys; print(sys.prefix)").strip()


# -- where Jupyter is -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place",
    [
        "miniconda3",
        "anaconda3",
        "miniforge3",
        "mambaforge",
        ".pyenv/versions/3.11.0",
        "work/.venv",
        ".local",
        ".local/share/rjupyter/venv",
    ],
)
def test_usual_place(laptop: Laptop, bare_host: Host, place: str) -> None:
    (bare_host.home / "work").mkdir()
    if place == ".local":  # as pip install --user has it: scripts among other things
        (bare_host.home / ".local/bin").mkdir(parents=True)
        (bare_host.home / ".local/bin/jupyter-notebook").symlink_to(jupyter_for_everyone() / "jupyter-notebook")
    else:
        environment_at(bare_host.home / place)
    run = laptop.start("--no-install", "host:work", has_terminal=False)
    run.url()
    where = "our own environment" if "rjupyter" in place else "the usual places"
    how = "jupyter-notebook (%s)" % where if place != "work/.venv" else "python (the project's environment)"
    assert "Using %s/%s/bin/%s." % (bare_host.home, place, how) in run.stderr


def test_order_of_places(laptop: Laptop, make_host: Callable[..., Host], directory: Path) -> None:
    """What is taken away one by one, best first: PATH, the login shell's PATH, a usual place, our own."""
    path = bare_python(directory / "bin")
    on_path = directory / "bin" / "jupyter-notebook"
    on_path.symlink_to(jupyter_for_everyone() / "jupyter-notebook")
    host = make_host(path=path)
    of_shell = host.home / "of_shell" / "jupyter-notebook"
    of_shell.parent.mkdir()
    of_shell.symlink_to(on_path.resolve())
    (host.home / ".profile").write_text("PATH=%s:$PATH\n" % of_shell.parent)
    usual = environment_at(host.home / "miniconda3")
    environment_at(host.home / ".local/share/rjupyter/venv")
    for taken in (on_path, of_shell, usual, None):
        with laptop.opened("--no-install", "-v", "--new", "--stop-on-exit", "host") as run:
            run.expect("ends the server")
            expected = taken or host.home / ".local/share/rjupyter/venv"
            assert "Using %s" % expected in run.stderr
        if taken:
            taken.unlink()


@pytest.mark.jupyter
@pytest.mark.parametrize(
    ("prefix", "argument"),
    [
        ("miniconda3/envs/ml", "ml"),
        ("miniforge3", "base"),
        ("micromamba/envs/ml", "ml"),
        (".conda/envs/ml", "ml"),
        ("odd/place/ml", "ml"),
        (".pixi/envs/ml", "ml"),
        ('envs/it\'s "ml" $x', '~/envs/it\'s "ml" $x'),
        ("envs/ml", "envs/ml"),
    ],
)
def test_env(laptop: Laptop, bare_host: Host, prefix: str, argument: str) -> None:
    environment = environment_at(bare_host.home / prefix)
    if prefix.startswith("odd"):
        (bare_host.home / ".conda").mkdir()
        (bare_host.home / ".conda/environments.txt").write_text("/nowhere\n%s\n" % environment)
    run = laptop.start("--env", argument, "host", has_terminal=False)
    assert prefix_of_kernel(run.url()) == str(environment)
    assert "Using %s/bin/python (--env %s)." % (environment, argument) in run.stderr


@pytest.mark.jupyter
def test_server_of_another_environment_is_not_the_one_that_was_asked_for(laptop: Laptop, bare_host: Host) -> None:
    environment_at(bare_host.home / "miniconda3")
    environment_at(bare_host.home / "miniforge3/envs/ml")
    assert "miniconda3" in laptop.start("host", has_terminal=False).expect(r"Using .*").group()
    with laptop.opened("--env", "ml", "--local-port", str(quiet_port()), "host") as asked:
        assert prefix_of_kernel(asked.url()).endswith("envs/ml")
    again = laptop.start("--env", "ml", "host", has_terminal=False)
    again.expect("Found Jupyter")
    assert again.url() == asked.url()
    assert len(bare_host.servers()) == 2


def test_env_that_is_not_there(laptop: Laptop, bare_host: Host) -> None:
    environment_at(bare_host.home / "miniconda3")
    run = laptop.run("--env", "ml", "host")
    check_failure(run, 3, "no environment ml on the host", "%s/miniconda3/envs/ml" % bare_host.home)


def test_env_without_jupyter(laptop: Laptop, bare_host: Host) -> None:
    subprocess.run(["/usr/bin/env", "python3", "-m", "venv", "--without-pip", str(bare_host.home / "v")], check=True)
    check_failure(laptop.run("--env", "~/v", "host"), 3, "no Jupyter in this environment", "-m pip install notebook")


@pytest.mark.jupyter
def test_python(laptop: Laptop, bare_host: Host) -> None:
    environment = environment_at(bare_host.home / "odd name")
    run = laptop.start("--python", "~/odd name/bin/python", "host", has_terminal=False)
    assert prefix_of_kernel(run.url()) == str(environment)


def test_python_that_is_not_there(laptop: Laptop, bare_host: Host) -> None:
    check_failure(laptop.run("--python", "/no/python", "host"), 3, "no Jupyter in this environment", "/no/python")


def test_lab_where_only_lab_is(laptop: Laptop, make_host: Callable[..., Host]) -> None:
    make_host(path=str(jupyter_of("lab-3.2")))
    run = laptop.start("host", has_terminal=False)
    assert urlsplit(run.url()).path == "/lab"
    assert "Launched JupyterLab 3.2" in run.stderr


@pytest.mark.parametrize(
    "broken", ["#!/no/longer/there/python", "#!/bin/sh\necho 'pyenv: jupyter-notebook: not found'\nexit 127"]
)
def test_broken_command_leads_to_the_next(
    laptop: Laptop, make_host: Callable[..., Host], directory: Path, broken: str
) -> None:
    path = bare_python(directory / "bin")
    (directory / "bin/jupyter-notebook").write_text(broken + "\n")
    (directory / "bin/jupyter-notebook").chmod(0o755)
    host = make_host(path=path)
    environment_at(host.home / "miniconda3")
    run = laptop.start("--no-install", "-v", "host", has_terminal=False)
    run.url()
    assert "Using %s/miniconda3" % host.home in run.stderr
    assert "looked at %s/jupyter-notebook: " % path in run.stderr
    assert len(host.servers()) == 1


def test_list_of_what_was_tried_is_true(laptop: Laptop, bare_host: Host, directory: Path) -> None:
    (bare_host.home / ".profile").write_text("PATH=$PATH:%s/extra\n" % bare_host.home)
    for name in ("extra", "miniconda3/bin", ".local/bin"):
        (bare_host.home / name).mkdir(parents=True)
    dead = bare_host.home / ".local/bin/jupyter-notebook"
    dead.write_text("#!/gone/python\n")
    dead.chmod(0o755)
    run = laptop.run("--no-install", "host")
    check_failure(run, 3, "no Jupyter on the host", "try: on the host:")
    tried = run.stderr.partition("looked at\n")[2].partition("  try:")[0].splitlines()
    of_shell = subprocess.check_output(
        ["/bin/bash", "-l", "-c", "echo $PATH"], text=True, env={"HOME": str(bare_host.home), "PATH": SYSTEM_PATH}
    )
    assert [line.strip() for line in tried] == [
        "PATH: " + ", ".join([str(directory / "bin"), *SYSTEM_PATH.split(":")]),
        "the login shell's PATH: " + of_shell.strip().replace(":", ", "),
        "%s: needs /gone/python, which is gone" % dead,
        "the usual places: %s, %s" % (bare_host.home / "miniconda3/bin", dead.parent),
        "our own environment: nothing there",
    ]


# -- which Jupyter ----------------------------------------------------------------------------------------------------


@pytest.mark.jupyter
@pytest.mark.parametrize("age", AGES)
def test_jupyter_of_another_age(laptop: Laptop, make_host: Callable[..., Host], age: str) -> None:
    host = make_host(path=str(jupyter_of(age)))
    (host.home / "a b").mkdir()
    notebook = {"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 4}
    (host.home / "a b/x#y.ipynb").write_text(json.dumps(notebook))
    with laptop.opened("--local-port", str(quiet_port()), "host:a b/x#y.ipynb") as run:
        url = run.url()
        assert prefix_of_kernel(url) == str(jupyter_of(age).parent)
        launched = ("Lab", "3.2.") if "lab" in age else (" Notebook", age[-3:] + ".")
        assert "Launched Jupyter%s %s" % launched in run.stderr
        with urllib.request.urlopen(url, timeout=30) as page:
            assert page.status == 200
        assert [entry["name"] for entry in api(url, "contents")["content"]] == ["x#y.ipynb"]
        token = parse_qs(urlsplit(url).query)["token"][0]
        assert token not in compute(url, "import os; print(dict(os.environ))")
    with laptop.opened("host") as again:
        assert urlsplit(again.url()).netloc == urlsplit(url).netloc
    assert laptop.run("host", "stop").status == 0
    wait_until(
        lambda: (
            not [w for w in processes_with("RJUPYTER_SIDE=host").values() if "ipykernel" in w and str(host.home) in w]
        ),
        "no kernel",
    )


# -- the user's own configuration -------------------------------------------------------------------------------------


def configure(host: Host, app: str, **settings: Any) -> None:
    lines = ["c.%s.%s = %r" % (app, name, value) for name, value in settings.items()]
    file = {"ServerApp": "jupyter_server_config.py", "NotebookApp": "jupyter_notebook_config.py"}[app]
    (host.home / ".jupyter").mkdir(exist_ok=True)
    (host.home / ".jupyter" / file).write_text("\n".join(lines) + "\n")


@pytest.fixture(params=["ServerApp", "NotebookApp"])
def configured(request: pytest.FixtureRequest, make_host: Callable[..., Host]) -> Any:
    """A host with today's server, or with the classic notebook, and a function that writes its configuration."""
    path = str(jupyter_for_everyone()) if request.param == "ServerApp" else str(jupyter_of("notebook-6.4"))
    host = make_host(path=path)
    return host, lambda **settings: configure(host, request.param, **settings)


@pytest.mark.jupyter
def test_configured_base_url(laptop: Laptop, configured: Any) -> None:
    configured[1](base_url="/user/ana/")
    url = laptop.start("host", has_terminal=False).url()
    assert urlsplit(url).path == "/user/ana/tree"
    assert compute(url, "print(1)") == "1\n"


@pytest.mark.jupyter
def test_configured_certificate_makes_it_https(laptop: Laptop, configured: Any) -> None:
    host, write = configured
    key, certificate = str(host.home / "key.pem"), str(host.home / "cert.pem")
    argv = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "1"]
    subprocess.run([*argv, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    write(certfile=certificate, keyfile=key)
    url = laptop.start("host", has_terminal=False).url()
    assert url.startswith("https://")
    assert compute(url, "print(1)") == "1\n"
    with urllib.request.urlopen(url, timeout=30, context=ssl._create_unverified_context()) as page:
        assert page.status == 200


def test_configured_port_holds_and_the_option_wins(laptop: Laptop, configured: Any) -> None:
    port = quiet_port()
    configured[1](port=port)
    run = laptop.start("host", has_terminal=False)
    run.url()
    assert "port %d," % port in run.stderr
    other = laptop.start("--new", "--port", str(port + 100), "host", has_terminal=False)
    other.url()
    assert "port %d," % port not in other.stderr


@pytest.mark.parametrize("beside", [{}, {"token": ""}])
def test_configured_password_is_said_and_no_token_shown(
    laptop: Laptop, configured: Any, beside: Dict[str, str]
) -> None:
    _, write = configured
    salted = hashlib.sha1(b"opensesame" + b"0123456789ab").hexdigest()
    write(password="sha1:0123456789ab:" + salted, **beside)  # jupyter_server.auth.passwd's form
    run = laptop.start("host", has_terminal=False)
    url = run.url()
    run.expect("The server has a password; the page asks for it.")
    assert urlsplit(url).query == ""
    with urllib.request.urlopen(url, timeout=30) as page:
        assert "/login" in page.url


@pytest.mark.jupyter
def test_configured_token_is_used(laptop: Laptop, configured: Any) -> None:
    configured[1](token="my_own_token/&")
    url = laptop.start("host", has_terminal=False).url()
    assert parse_qs(urlsplit(url).query)["token"] == ["my_own_token/&"]
    assert compute(url, "print(1)") == "1\n"


def test_configured_ip_and_browser_do_not_win(laptop: Laptop, configured: Any) -> None:
    """What would show the server to the network, or open a browser over there, is ours to decide."""
    configured[1](ip="0.0.0.0", open_browser=True, browser="/bin/false %s")
    run = laptop.start("host", has_terminal=False)
    run.url()
    port = int(run.expect(r"port (\d+),").group(1))
    listening = Path("/proc/net/tcp").read_text()
    assert "0100007F:%04X" % port in listening
    assert " 00000000:%04X" % port not in listening


# -- what the host lacks ----------------------------------------------------------------------------------------------


@pytest.mark.jupyter
def test_home_that_cannot_be_written(
    laptop: Laptop, make_user: Callable[[str], User], make_host: Callable[..., Host]
) -> None:
    user = make_user("/bin/bash")
    user.write(".profile", "PATH=%s:$PATH\n" % jupyter_for_everyone())
    os.chown(user.home, 0, 0)
    user.home.chmod(0o555)
    make_host(user=user)
    check_two_runs_and_stop(laptop, "/tmp/rjupyter-%d" % user.uid)


@pytest.mark.jupyter
def test_quota_is_full(laptop: Laptop, make_user: Callable[[str], User], make_host: Callable[..., Host]) -> None:
    user = make_user("/bin/bash")
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k,mode=755,uid=%d" % user.uid, "tmpfs", str(user.home)], check=True
    )
    try:
        user.write(".profile", "PATH=%s:$PATH\n" % jupyter_for_everyone())
        filler = os.open(str(user.home / "filler"), os.O_WRONLY | os.O_CREAT)
        with pytest.raises(OSError, match="No space"):
            while True:
                os.write(filler, bytes(4096))
        os.close(filler)
        make_host(user=user)
        check_two_runs_and_stop(laptop, "/tmp/rjupyter-%d" % user.uid)
    finally:
        subprocess.run(["umount", "--lazy", str(user.home)], check=True)


def check_two_runs_and_stop(laptop: Laptop, state: str) -> None:
    """Everything works, with our state elsewhere; and it is ours alone."""
    with laptop.opened("--local-port", str(quiet_port()), "host") as run:
        url = run.url()
        assert compute(url, "print(1)") == "1\n"
    assert [path.stat().st_mode & 0o077 for path in (Path(state), Path(state, "servers"), Path(state, "runtime"))] == [
        0,
        0,
        0,
    ]
    with laptop.opened("host") as again:
        assert again.url() == url
    assert "Stopped" in laptop.run("host", "stop").stderr
    assert not list(Path(state, "servers").iterdir())


def test_nowhere_to_write_is_named(
    laptop: Laptop, make_user: Callable[[str], User], make_host: Callable[..., Host]
) -> None:
    user = make_user("/bin/bash")
    user.write(".profile", "PATH=%s:$PATH\n" % jupyter_for_everyone())
    os.chown(user.home, 0, 0)
    user.home.chmod(0o555)
    theirs = Path("/tmp/rjupyter-%d" % user.uid)  # another user was here first
    theirs.mkdir(mode=0o777)
    make_host(user=user)
    run = laptop.run("host")
    check_failure(run, 1, "no place to keep", "Permission denied", "%s is not a directory of ours" % theirs)


ODD = {
    "TMPDIR": "/nowhere/at all",
    "XDG_RUNTIME_DIR": "/run/user/gone",
    "XDG_DATA_HOME": "",
    "LC_ALL": "xx_XX.nonsense",
    "http_proxy": "http://127.0.0.1:1",
    "PYTHONSTARTUP": "/nowhere/x.py",
    "IPYTHONDIR": "/nowhere/ipython",
}


@pytest.mark.jupyter
@pytest.mark.parametrize("name", ODD)
def test_odd_variable(laptop: Laptop, make_host: Callable[..., Host], name: str) -> None:
    make_host(**{name: ODD[name]})
    url = laptop.start("host", has_terminal=False).url()
    # The one directory vanishes at logout, before the server does.
    assert compute(url, "import os; print('XDG_RUNTIME_DIR' in os.environ)") == "False\n"


@pytest.mark.jupyter
def test_home_with_a_name_that_hurts(laptop: Laptop, make_host: Callable[..., Host], directory: Path) -> None:
    home = directory / "an \"odd\" 'home' $x"
    (home / "work").mkdir(parents=True)
    host = make_host(path=bare_python(directory / "bin"))
    host.home = home
    host.sshd.environment["HOME"] = str(home).replace('"', '\\"')  # sshd_config's own quoting
    host.sshd.stop()
    host.sshd.start()
    environment_at(home / "miniconda3")
    run = laptop.start("host:work", has_terminal=False)
    assert compute(run.url(), "import os; print(os.getcwd())") == "%s\n" % (home / "work")
    assert "Using %s/miniconda3/bin/jupyter-notebook" % home in run.stderr
    assert host.servers()[0]["root_dir"] == str(home / "work")


@pytest.mark.jupyter
def test_umask_000(laptop: Laptop, make_user: Callable[[str], User], make_host: Callable[..., Host]) -> None:
    user = make_user("/bin/bash")
    user.write(".bashrc", "umask 000\nPATH=%s:$PATH\n" % jupyter_for_everyone())
    user.write(".local/share/jupyter/runtime/old", "")  # made by an earlier Jupyter, open to all
    make_host(user=user)
    url = laptop.start("host", has_terminal=False).url()
    token = parse_qs(urlsplit(url).query)["token"][0]
    assert compute(url, "import os; print(os.umask(0))") == "0\n"
    for path in user.home.rglob("*"):
        if path.is_file() and token.encode() in path.read_bytes():
            closed = [p for p in [path, *path.parents] if user.home in p.parents and p.stat().st_mode & 0o077 == 0]
            assert closed, path


@pytest.mark.jupyter
def test_path_with_busybox_only(laptop: Laptop, make_host: Callable[..., Host], directory: Path) -> None:
    path = bare_python(directory / "bin")
    for applet in subprocess.check_output(["busybox", "--list"], text=True).split():
        if not (directory / "bin" / applet).exists():
            (directory / "bin" / applet).symlink_to("/bin/busybox")
    host = make_host(PATH=path)
    environment_at(host.home / "miniconda3")
    with laptop.opened("host") as run:
        assert compute(run.url(), "print(1)") == "1\n"
    assert "Stopped" in laptop.run("host", "stop").stderr


def test_prologue_in_busybox_sh(directory: Path) -> None:
    if not os.path.exists("/bin/busybox"):
        pytest.skip("this machine has no /bin/busybox")
    command = rjupyter.agent_command().replace("exec /bin/sh", "exec /bin/busybox sh")
    request = rjupyter.Request(nonce="n", action="open", path="nowhere")
    answer = subprocess.run(
        ["/bin/busybox", "sh", "-c", command],
        input=rjupyter.agent_input(command, rjupyter.AgentSource().of(request.action), request),
        capture_output=True,
        env={"HOME": str(directory), "PATH": bare_python(directory / "bin")},
    )
    assert b"no such directory on the host" in answer.stdout


def test_no_python_at_all(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    """A host without python3, as far as the prologue sees; then one where the user names where it is."""
    python3 = Path(bare_python(directory / "bin")) / "python3"
    named = str(python3.rename(python3.with_name("python3.named")))
    monkeypatch.setattr(rjupyter, "PYTHONS", ["no-such-python", "/no/such/python3"])
    request = rjupyter.Request(nonce="n", action="open", path="nowhere")
    for python, words in (("", b"rjupyter: no python3\n"), (named, b"no such directory")):
        command = rjupyter.agent_command(python)
        data = rjupyter.agent_input(command, rjupyter.AgentSource().of(request.action), request)
        answer = subprocess.run(["sh", "-c", command], input=data, capture_output=True, env={"HOME": str(directory)})
        assert words in answer.stdout


@pytest.mark.parametrize("smuggled", ["/x; touch pwned", "$(touch pwned)", "a b", "'", "-c", "/x'", "~", "/x\ny"])
def test_python_named_by_the_user_cannot_smuggle(smuggled: str) -> None:
    assert rjupyter.agent_command(smuggled) == rjupyter.agent_command()


# -- the laptop -------------------------------------------------------------------------------------------------------


@pytest.mark.jupyter
@pytest.mark.parametrize("minor", [minor for minor in sorted(interpreters()) if minor >= 8])
def test_client_under_python_3(laptop: Laptop, host: Host, minor: int) -> None:
    laptop.python = interpreters()[minor]
    laptop.environment["PYTHONWARNINGS"] = "error"
    with laptop.opened("host", has_terminal=True) as run:
        assert compute(run.url(), "print(1)") == "1\n"
    assert "Warning" not in run.text
    assert "Stopped" in laptop.run("host", "stop").stderr


@pytest.mark.parametrize("minor", [minor for minor in sorted(interpreters()) if minor < 8])
def test_client_under_a_python_that_is_too_old(laptop: Laptop, minor: int) -> None:
    laptop.python = interpreters()[minor]
    run = laptop.run("host")
    assert run.status == 1
    assert re.fullmatch(r"rjupyter needs Python 3.8 or newer on this side; this is 3\.%d\.\d+\n" % minor, run.text)


@pytest.mark.jupyter
def test_ssh_config_that_replaces_the_command(laptop: Laptop, host: Host) -> None:
    with open(host.sshd.config, "a") as config:
        config.write("  RemoteCommand touch pwned\n  RequestTTY force\n  LocalForward 1 127.0.0.1:1\n")
    url = laptop.start("host", has_terminal=False).url()
    assert compute(url, "print(1)") == "1\n"
    assert not (host.home / "pwned").exists()


@pytest.mark.jupyter
def test_stub_of_an_ssh_without_remote_command(laptop: Laptop, host: Host) -> None:
    """OpenSSH before 7.6 does not know the option. The real ssh stands behind a wrapper that refuses it as that did."""
    wrapper = laptop.home / "ssh"
    refusal = "command-line: line 0: Bad configuration option: remotecommand"
    wrapper.write_text(
        '#!/bin/sh\ncase "$*" in *RemoteCommand*) echo \'%s\' >&2; exit 255 ;; esac\nexec /usr/bin/ssh "$@"\n' % refusal
    )
    wrapper.chmod(0o755)
    run = laptop.start("host", has_terminal=False, PATH="%s:%s" % (laptop.home, SYSTEM_PATH))
    assert compute(run.url(), "print(1)") == "1\n"


# -- what is not as expected ------------------------------------------------------------------------------------------


def test_bug_in_the_agent_is_told_with_its_true_line(laptop: Laptop, host: Host) -> None:
    source = SCRIPT.read_text()
    words = "def list_all("
    line = source[: source.index(words)].count("\n") + 3
    copy = laptop.home / "rjupyter.py"
    copy.write_text(re.sub(r"(def list_all\(.*\n    \"\"\".*\n)", r"\1    request.nothing_of_this_name\n", source))
    argv = [sys.executable, str(copy), "-F", laptop.config, "host", "list"]
    done = subprocess.run(argv, env=laptop.environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "this is a bug of rjupyter" in done.stderr
    assert 'File "rjupyter.py", line %d, in list_all' % line in done.stderr


OF_0_1_0 = ("app", "created", "node", "pid", "identity", "local_port", "root_dir", "runtime_dir", "job", "port")


@pytest.mark.parametrize("age", ["0.1.0", "newer"])
def test_server_that_another_version_wrote_down(laptop: Laptop, host: Host, age: str) -> None:
    """Its file has the form of 0.1.0, or what a later version may add; it is ours all the same."""
    with laptop.opened("host") as run:
        url = run.url()
    (file,) = host.home.glob(".local/state/rjupyter/servers/*/server.json")
    facts = json.loads(file.read_text())
    if age == "newer":
        facts.update(version=2, colour={"is": "red"}, request={"flavour": ["x"], "app": "notebook"})
    else:
        facts = {name: facts[name] for name in OF_0_1_0}
        facts.update(version="7.0", has_answered=True, no_socket="", python=None, env=None, init=[])
    file.write_text(json.dumps(facts))
    with laptop.opened("host") as run:
        assert without_port(run.url()) == without_port(url)
        assert "Found Jupyter Notebook" in run.text
    assert "not started by rjupyter" not in laptop.run("host", "list").stdout
    assert "Stopped Jupyter Notebook" in laptop.run("host", "stop").stderr
