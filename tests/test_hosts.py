"""Any environment on the host: where Jupyter is, which one, how the user configured it, and what the host lacks."""

import hashlib
import json
import os
import re
import shlex
import shutil
import ssl
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any, Callable, Dict, List
from urllib.parse import parse_qs, urlsplit

import pytest
from client import api, check_failure, compute
from execution import mounted
from jupyters import (
    AGES,
    interpreters,
    jupyter_for_everyone,
    jupyter_of,
    standin,
    standin_environment,
    standin_wheels,
)
from private_machines import find_namespaces_obstacle
from sides import (
    SCRIPT,
    SYSTEM_PATH,
    Host,
    Laptop,
    Run,
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


def environment_at(prefix: Path, is_real: bool = False) -> Path:
    """Put an environment with the stand-in, or with Jupyter, at `prefix`, as conda, venv or pixi would."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    prefix.symlink_to(jupyter_for_everyone().parent if is_real else standin_environment())
    return prefix


def conda_at(prefix: Path, script: str = "", **variables: str) -> Path:
    """Put an environment with the stand-in at `prefix` as conda has it: a package's script, and what the user set."""
    (prefix / "conda-meta").mkdir(parents=True)
    (prefix / "conda-meta/history").touch()
    (prefix / "conda-meta/state").write_text(json.dumps({"env_vars": variables}))
    if os.getuid() == 0:
        os.chown(prefix / "conda-meta/state", 65534, -1)  # as the administrator's is not ours
    (prefix / "etc/conda/activate.d").mkdir(parents=True)
    (prefix / "etc/conda/activate.d/package.sh").write_text(script)
    for entry in standin_environment().iterdir():
        (prefix / entry.name).symlink_to(entry)
    return prefix


def prefix_of_kernel(url: str) -> str:
    return compute(url, "import sys; print(sys.prefix)").strip()


def launched(laptop: Laptop, *arguments: str) -> Run:
    """Open, and end the server with the tunnel: what is told of the launch is in the run."""
    with laptop.opened("--no-install", "--new", "--stop-on-exit", *arguments) as run:
        pass
    assert "Stopped" in run.stderr, run.text
    return run


# -- where Jupyter is -------------------------------------------------------------------------------------------------


USUAL_PLACES = [
    "miniconda3",
    "anaconda3",
    "miniforge3",
    "mambaforge",
    ".pyenv/versions/3.11.0",
    "work/.venv",
    ".local",  # as pip install --user has it: scripts among other things
    ".local/share/rjupyter/venv",
]


def test_usual_places(laptop: Laptop, bare_host: Host) -> None:
    """Each is found where there is no other."""
    (bare_host.home / "work").mkdir()
    for place in USUAL_PLACES:
        if place == ".local":
            found = bare_host.home / ".local/bin/jupyter-notebook"
            found.parent.mkdir(parents=True)
            found.symlink_to(standin() / "jupyter-notebook")
        else:
            found = environment_at(bare_host.home / place)
        run = launched(laptop, "host:work")
        where = "our own environment" if "rjupyter" in place else "the usual places"
        how = "jupyter-notebook (%s)" % where if place != "work/.venv" else "python (the project's environment)"
        assert "Using %s/%s/bin/%s." % (bare_host.home, place, how) in run.stderr, (place, run.text)
        found.unlink()


def test_order_of_places(laptop: Laptop, make_host: Callable[..., Host], directory: Path) -> None:
    """What is taken away one by one, best first: PATH, the login shell's PATH, a usual place, our own."""
    path = bare_python(directory / "bin")
    on_path = directory / "bin" / "jupyter-notebook"
    on_path.symlink_to(standin() / "jupyter-notebook")
    host = make_host(path=path)
    of_shell = host.home / "of_shell" / "jupyter-notebook"
    of_shell.parent.mkdir()
    of_shell.symlink_to(on_path.resolve())
    (host.home / ".profile").write_text("PATH=%s:$PATH\n" % of_shell.parent)
    usual = environment_at(host.home / "miniconda3")
    environment_at(host.home / ".local/share/rjupyter/venv")
    for taken in (on_path, of_shell, usual, None):
        expected = taken or host.home / ".local/share/rjupyter/venv"
        assert "Using %s" % expected in launched(laptop, "-v", "host").stderr
        if taken:
            taken.unlink()


def test_env(laptop: Laptop, make_host: Callable[..., Host], directory: Path) -> None:
    """By its name, wherever conda, mamba or pixi has it, or by its path. The last one takes what it is asked for."""
    host = make_host(path=bare_python(directory / "bin"), CONDA_ENVS_DIRS="/nowhere:%s" % (directory / "shared"))
    block = "channels:\n  - conda-forge\nenvs_dirs:\n  - /nowhere   # gone\n  - ~/scratch/of ana\nalways_yes: false\n"
    cases = [
        ("miniconda3/envs/ml", "ml", "", ""),
        ("miniforge3", "base", "", ""),
        ("micromamba/envs/ml", "ml", "", ""),
        (".conda/envs/ml", "ml", "", ""),
        ("odd/place/ml", "ml", ".conda/environments.txt", "/nowhere\n{home}/odd/place/ml\n"),
        ("work/.pixi/envs/ml", "ml", "", ""),
        (str(directory / "shared/ml"), "ml", "", ""),
        ("scratch/of ana/ml", "ml", ".condarc", block),
        ("scratch/ml", "ml", ".condarc", 'envs_dirs: [/nowhere, "{home}/scratch"]\n'),
        ("data/ml", "ml", "miniconda3/.condarc", "envs_dirs:\n- $HOME/data\n"),
        ("site/conda", "base", ".conda/environments.txt", "{home}/site/conda/envs/gone\n"),
        ("apps/conda", "base", ".conda/environments.txt", "{home}/apps/conda\n{home}/proj/.conda\n"),
        ('envs/it\'s "ml" $x', '~/envs/it\'s "ml" $x', "", ""),
        ("envs/ml", "envs/ml", "", ""),
    ]
    (host.home / "work/deep").mkdir(parents=True)
    for prefix, argument, file, text in cases:
        place = host.home / prefix
        environment = conda_at(place) if argument == "base" else environment_at(place)
        (place / "envs").mkdir() if argument == "base" else None
        if file:
            (host.home / file).parent.mkdir(parents=True, exist_ok=True)
            (host.home / file).write_text(text.format(home=host.home))
        run = launched(laptop, "--env", argument, "host:work/deep")
        assert "Using %s/bin/python (--env %s)." % (environment, argument) in run.stderr, (prefix, run.text)
        shutil.rmtree(place) if argument == "base" else place.unlink()


def test_what_an_activation_sets_is_there(laptop: Laptop, make_host: Callable[..., Host], directory: Path) -> None:
    """Of conda's base in a usual place, after another one; of pixi's, with what the project sets if pixi tells."""
    (directory / "old/etc/conda/deactivate.d").mkdir(parents=True)
    (directory / "old/etc/conda/deactivate.d/gdal.sh").write_text("unset GDAL_DATA\n")
    of_old = {"CONDA_PREFIX": str(directory / "old"), "GDAL_DATA": "/old"}
    host = make_host(path=bare_python(directory / "bin"), **of_old)
    script = 'export PROJ_LIB="$CONDA_PREFIX/share/proj"\necho noise\n'
    (conda_at(host.home / "miniconda3", script, HF_HOME="/data of mine") / "condabin").mkdir()
    (conda_at(host.home / "proj/.pixi/envs/default", script, HF_HOME="/data") / "conda-meta/pixi").touch()
    pixi = host.home / ".pixi/bin/pixi"
    pixi.parent.mkdir(parents=True)
    hook = "#!/bin/sh\ntest \"$4 $5\" = '--environment default' && pwd | sed 's/.*/export WANDB_DIR=\"&\"/'\n"
    for path, name, program, expected in (
        ("work", "miniconda3", "", {"CONDA_DEFAULT_ENV": "base", "HF_HOME": "/data of mine"}),
        ("proj", "proj/.pixi/envs/default", "#!/bin/sh\nexit 1\n", {"HF_HOME": "/data"}),
        ("proj", "proj/.pixi/envs/default", hook, {"WANDB_DIR": "{prefix}", "HF_HOME": "/data"}),
    ):
        (host.home / path).mkdir(exist_ok=True)
        pixi.write_text(program)
        pixi.chmod(0o755)
        prefix = str(host.home / name)
        facts = {"CONDA_PREFIX": "{prefix}", "PROJ_LIB": "{prefix}/share/proj", "GDAL_DATA": None, **expected}
        with laptop.opened("--new", "--stop-on-exit", "--no-install", "host:" + path):
            (server,) = host.servers()
            words = Path("/proc/%d/environ" % server["pid"]).read_text().split("\0")
            environ = dict(word.partition("=")[::2] for word in words)
        for variable, value in facts.items():
            assert environ.get(variable) == (value and value.format(prefix=prefix)), (path, variable, environ)


@pytest.mark.jupyter
def test_kernel_is_of_the_environment_that_was_asked_for(laptop: Laptop, bare_host: Host) -> None:
    """By --env and by --python; and a server of another environment is not taken for it."""
    environment_at(bare_host.home / "miniconda3")
    asked_for = environment_at(bare_host.home / "miniforge3/envs/ml", is_real=True)
    odd = environment_at(bare_host.home / "odd name", is_real=True)
    assert "miniconda3" in laptop.start("host", has_terminal=False).expect(r"Using .*").group()
    with laptop.opened("--env", "ml", "--local-port", str(quiet_port()), "host") as asked:
        assert prefix_of_kernel(asked.url()) == str(asked_for)
    again = laptop.start("--env", "ml", "host", has_terminal=False)
    again.expect("Found Jupyter")
    assert again.url() == asked.url()
    by_python = laptop.start("--python", "~/odd name/bin/python", "host", has_terminal=False)
    assert prefix_of_kernel(by_python.url()) == str(odd)
    assert len(bare_host.servers()) == 3


def test_env_that_is_not_there(laptop: Laptop, bare_host: Host) -> None:
    environment_at(bare_host.home / "miniconda3")
    run = laptop.run("--env", "ml", "host")
    check_failure(run, 3, "no environment ml on the host", "%s/miniconda3/envs/ml" % bare_host.home)


def test_env_without_jupyter(laptop: Laptop, bare_host: Host) -> None:
    """Then its Python is another machine's, and is gone at last."""
    subprocess.run(["/usr/bin/env", "python3", "-m", "venv", "--without-pip", str(bare_host.home / "v")], check=True)
    check_failure(laptop.run("--env", "~/v", "host"), 3, "no Jupyter in this environment", "-m pip install notebook")
    python = bare_host.home / "v/bin/python"
    python.unlink()
    python.write_bytes(b"\xcf\xfa\xed\xfe\x07\x00\x00\x01")  # a Mac's
    python.chmod(0o755)
    run = laptop.run("--env", "~/v", "host")
    check_failure(run, 3, "the Python of this environment is gone", "a program of macOS", "python3 -m venv --clear ")
    for words in ("GLIBC_2.28 not found", "libpython3.11.so.1.0: cannot open shared object"):  # it works elsewhere
        python.write_text("#!/bin/sh\necho 'python: %s' >&2\nexit 127\n" % words)
        run = laptop.run("--env", "~/v", "host")
        check_failure(run, 3, "the Python of this environment does not run", words, "v/bin/python --version")
        assert "venv" not in run.stderr.partition("try:")[2].replace("~/v", ""), run.text
    python.unlink()
    python.symlink_to("/Users/ana/python")
    run = laptop.run("--env", "~/v", "host")
    check_failure(run, 3, "the Python of this environment is gone", "leads to /Users/ana/python", "-m venv --clear ")


def test_environment_whose_python_hangs_is_not_called_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system that is away for a while: what is said to help does not make the environment anew."""
    monkeypatch.setattr(rjupyter, "COMMAND_TIMEOUT_S", 0.2)
    python = tmp_path / "v/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\nexec sleep 60\n")
    python.chmod(0o755)
    (tmp_path / "v/pyvenv.cfg").write_text("home = /usr/bin\n")
    with pytest.raises(rjupyter.Failure, match="does not run") as failed:
        rjupyter.launcher_of_python(str(python), ["notebook"], "")
    assert failed.value.try_ == "%s --version" % python


def test_python_of_the_system_is_left_alone(laptop: Laptop, bare_host: Host) -> None:
    """What is closed by its owner (PEP 668) is not installed into: what is said to help makes an environment of it."""
    if not list(Path("/usr").glob("lib*/python3*/EXTERNALLY-MANAGED")):
        pytest.skip("this machine's Python is open")
    run = laptop.run("--python", "/usr/bin/python3", "host")
    check_failure(run, 3, "no Jupyter in this environment")
    command = run.stderr.partition("try: ")[2].strip()
    environment = {"PATH": SYSTEM_PATH, "HOME": str(bare_host.home), "PIP_NO_INDEX": "1"}
    environment["PIP_FIND_LINKS"] = str(standin_wheels())
    subprocess.run(["/bin/sh", "-c", command], check=True, env=environment)
    assert "Using %s/jupyter/bin/python" % bare_host.home in launched(laptop, "--env", "~/jupyter", "host").stderr


def test_python_that_is_not_there(laptop: Laptop, bare_host: Host) -> None:
    check_failure(laptop.run("--python", "/no/python", "host"), 3, "no Jupyter in this environment", "/no/python")
    home = str(bare_host.home)
    check_failure(laptop.run("--python", "~", "host"), 3, "no Python to run Jupyter with", "%s: a directory" % home)


def test_environment_in_place_of_its_python(laptop: Laptop, bare_host: Host) -> None:
    """What is said to help opens it: of an environment with a blank in its name, too."""
    environment_at(bare_host.home / "my env")
    run = laptop.run("--python", "~/my env", "host")
    check_failure(run, 3, "no Python to run Jupyter with", "my env: a directory", "--python '")
    option, python = shlex.split(run.stderr.partition("try: ")[2])
    assert launched(laptop, option, python, "host").status == 0


def test_lab_where_only_lab_is(laptop: Laptop, bare_host: Host, directory: Path) -> None:
    (directory / "bin/jupyter-lab").symlink_to(standin() / "jupyter-lab")
    run = laptop.start("host", has_terminal=False)
    assert urlsplit(run.url()).path == "/lab"
    assert "Launched JupyterLab 4." in run.stderr


def test_broken_command_leads_to_the_next(laptop: Laptop, bare_host: Host, directory: Path) -> None:
    command = directory / "bin/jupyter-notebook"
    environment_at(bare_host.home / "miniconda3")
    shim = "#!/bin/sh\necho 'pyenv: jupyter-notebook: not found'\nexit 127"
    gone = "#!/bin/sh\necho \"ModuleNotFoundError: No module named 'notebook'\" >&2\nexit 1"  # with the Python before
    for broken in ("#!/no/longer/there/python", shim, "no line that says what runs it", gone):
        command.write_text(broken + "\n")
        command.chmod(0o755)
        run = laptop.start("--no-install", "-v", "--new", "host", has_terminal=False)
        run.url()
        assert "Using %s/miniconda3" % bare_host.home in run.stderr, run.text
        assert "looked at %s: " % command in run.stderr, run.text
    assert len(bare_host.servers()) == 4


def test_environment_above_a_directory_that_is_not_in_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a cluster's scratch: up to where the user's own directories end."""
    for place in ("home", "scratch/.venv/bin", "scratch/ana/proj/.venv/bin", "scratch/ana/proj/nb"):
        (tmp_path / place).mkdir(parents=True)
    for python in tmp_path.glob("scratch/**/bin"):
        (python / "python").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    own = os.getuid() or 1000  # root's would be all there is
    for path in [tmp_path / "scratch/ana", *tmp_path.glob("scratch/ana/**/*")]:
        os.chown(str(path), own, -1)
    monkeypatch.setattr(os, "getuid", lambda: own)
    prefixes = [prefix for _, prefix in rjupyter.environments_of_project(str(tmp_path / "scratch/ana/proj/nb"))]
    assert prefixes[0] == str(tmp_path / "scratch/ana/proj/.venv")
    assert (len(prefixes) == 1) == (os.stat(str(tmp_path)).st_uid != own)


@pytest.mark.parametrize("place", [".direnv/python-3.11", ".devenv/state/venv"])
def test_environment_that_direnv_or_devenv_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    python = tmp_path / "proj" / place / "bin/python"
    python.parent.mkdir(parents=True)
    python.write_text("")
    (tmp_path / "proj/nb").mkdir()
    found = list(rjupyter.environments_of_project(str(tmp_path / "proj/nb")))
    assert found == [(str(tmp_path / "proj"), str(python.parent.parent))]


def test_pip_of_python_3_6_is_made_newer_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own takes no wheels of today; and that of RHEL 8, pip 9, knows no --no-user."""
    monkeypatch.setattr(rjupyter, "found_program", lambda name: "")
    for version, ends in (((3, 6, 8), ["--upgrade pip", "notebook jupyterlab"]), ((3, 8, 0), ["notebook jupyterlab"])):
        monkeypatch.setattr(sys, "version_info", version)
        _, *commands = [" ".join(words) for words in rjupyter.install_commands()]
        assert [words.partition("-version-check ")[2] for words in commands] == ends
        assert all("-m pip install " in words and "--no-user" not in words for words in commands)


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
        "the login shell's PATH: " + ", ".join([str(directory / "bin"), *of_shell.strip().split(":")]),
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
        told = compute(url, "import os, sys; print(sys.prefix); print(dict(os.environ))")
        assert told.splitlines()[0] == str(jupyter_of(age).parent)
        token = parse_qs(urlsplit(url).query)["token"][0]
        assert token not in told
        name = ("Lab", "3.2.") if "lab" in age else (" Notebook", age[-3:] + ".")
        assert "Launched Jupyter%s %s" % name in run.stderr
        with urllib.request.urlopen(url, timeout=30) as page:
            assert page.status == 200
        assert [entry["name"] for entry in api(url, "contents")["content"]] == ["x#y.ipynb"]
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
def test_what_the_user_configured_holds(laptop: Laptop, configured: Any) -> None:
    """All of it at once; but what would show the server to the network, or open a browser there, is ours to decide."""
    host, write = configured
    key, certificate = str(host.home / "key.pem"), str(host.home / "cert.pem")
    argv = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "1"]
    subprocess.run([*argv, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    port, token = quiet_port(), "my_own_token/&"
    browser = {"open_browser": True, "browser": "%s %%s" % stub_that_leaves(host.home / "was-opened")}
    write(base_url="/user/ana/", certfile=certificate, keyfile=key, port=port, token=token, ip="0.0.0.0", **browser)
    run = laptop.start("host", has_terminal=False)
    url = run.url()
    assert urlsplit(url).scheme == "https" and urlsplit(url).path == "/user/ana/tree"
    assert parse_qs(urlsplit(url).query)["token"] == [token]
    assert "port %d," % port in run.stderr
    assert compute(url, "print(1)") == "1\n"
    settings = dict(word.partition("=")[::2] for word in shlex.split(laptop.run("--gateway", "host").stdout)[1:])
    assert settings["JUPYTER_GATEWAY_URL"] == url.partition("tree")[0]
    assert (settings["JUPYTER_GATEWAY_AUTH_TOKEN"], settings["JUPYTER_GATEWAY_VALIDATE_CERT"]) == (token, "no")
    with urllib.request.urlopen(url, timeout=30, context=ssl._create_unverified_context()) as page:
        assert page.status == 200
    listening = Path("/proc/net/tcp").read_text()
    assert "0100007F:%04X" % port in listening
    assert " 00000000:%04X" % port not in listening
    assert not (host.home / "was-opened").exists()
    other = laptop.start("--new", "--port", str(port + 100), "host", has_terminal=False)
    other.url()
    assert "port %d," % port not in other.stderr  # the option wins


def stub_that_leaves(file: Path) -> Path:
    """Make a stand-in for a browser that leaves this file."""
    program = file.with_name("browser")
    program.write_text("#!/bin/sh\ntouch %s\n" % file)
    program.chmod(0o755)
    return program


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
    failed = laptop.run("--gateway", "host")
    assert (failed.status, failed.stdout) == (1, "false\n")  # so what follows `eval "$(...)" &&` is not run
    assert "no JupyterLab here can use the server\n  why: it takes a password" in failed.stderr


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
    with mounted(user.home, "-t", "tmpfs", "-o", "size=64k,mode=755,uid=%d" % user.uid, "tmpfs"):
        user.write(".profile", "PATH=%s:$PATH\n" % jupyter_for_everyone())
        user.write(".jupyter/migrated", "")  # as after a first start; without it, Jupyter may want to write it
        filler = os.open(str(user.home / "filler"), os.O_WRONLY | os.O_CREAT)
        with pytest.raises(OSError, match="No space"):
            while True:
                os.write(filler, bytes(4096))
        os.close(filler)
        make_host(user=user)
        check_two_runs_and_stop(laptop, "/tmp/rjupyter-%d" % user.uid)


@pytest.mark.jupyter
@pytest.mark.parametrize(
    "options",
    [["--chmod-ignore"], ["--chmod-deny"], ["--chmod-ignore", "--force-user=nobody"]],
    ids=["ignores modes", "refuses modes", "has another owner"],
)
def test_home_that_cannot_be_closed_to_others(
    laptop: Laptop,
    make_user: Callable[[str], User],
    make_host: Callable[..., Host],
    directory: Path,
    options: List[str],
) -> None:
    """As CIFS, Azure's files and WSL's drives are: what was asked of it is looked at."""
    if not shutil.which("bindfs"):
        pytest.skip("needs bindfs")
    user = make_user("/bin/bash")
    user.write(".profile", "PATH=%s:$PATH\n" % jupyter_for_everyone())
    below = directory / "below"
    user.home.rename(below)
    user.home.mkdir()
    bound = subprocess.run(["bindfs", "--perms=a=rwx", *options, str(below), str(user.home)], stderr=subprocess.PIPE)
    if bound.returncode:
        pytest.skip("bindfs mounts nothing here: %r" % bound.stderr)
    try:
        make_host(user=user)
        with laptop.opened("host") as run:
            assert compute(run.url(), "print(1)") == "1\n"
            token = parse_qs(urlsplit(run.url()).query)["token"][0].encode()
            assert not [path for path in below.rglob("*") if path.is_file() and token in path.read_bytes()]
        state = Path("/tmp/rjupyter-%d" % user.uid)
        assert [path.stat().st_mode & 0o077 for path in (state, state / "servers", state / "runtime")] == [0, 0, 0]
        assert "Stopped" in laptop.run("host", "stop").stderr
    finally:
        subprocess.run(["umount", "--lazy", str(user.home)], check=True)


def check_two_runs_and_stop(laptop: Laptop, state: str) -> None:
    """Everything works, with our state elsewhere; and it is ours alone."""
    with laptop.opened("--local-port", str(quiet_port()), "host") as run:
        url = run.url()
        assert compute(url, "print(1)") == "1\n"
    ours = [Path(state), Path(state, "servers"), Path(state, "runtime")]
    assert [path.stat().st_mode & 0o077 for path in ours] == [0, 0, 0]
    with laptop.opened("host") as again:
        assert again.url() == url
    assert "Stopped" in laptop.run("host", "stop").stderr
    assert all((kept / "stop").exists() for kept in Path(state, "servers").iterdir())  # for what its kernel printed


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


ODD = {  # one of the directories vanishes at logout, before the server does
    "TMPDIR": "/nowhere/at all",
    "XDG_RUNTIME_DIR": "/run/user/gone",
    "XDG_DATA_HOME": "",
    "LC_ALL": "xx_XX.nonsense",
    "http_proxy": "http://127.0.0.1:1",
    "PYTHONSTARTUP": "/nowhere/x.py",
    "IPYTHONDIR": "/nowhere/ipython",
}


@pytest.mark.jupyter
def test_odd_variables(laptop: Laptop, make_host: Callable[..., Host]) -> None:
    make_host(**ODD)
    url = laptop.start("host", has_terminal=False).url()
    assert compute(url, "import os; print('XDG_RUNTIME_DIR' in os.environ)") == "False\n"


def test_home_with_a_name_that_hurts(laptop: Laptop, bare_host: Host, directory: Path) -> None:
    home = directory / "an \"odd\" 'home' $x"
    (home / "work").mkdir(parents=True)
    bare_host.home = home
    bare_host.sshd.environment["HOME"] = str(home).replace('"', '\\"')  # sshd_config's own quoting
    bare_host.sshd.stop()
    bare_host.sshd.start()
    environment_at(home / "miniconda3")
    run = laptop.start("host:work", has_terminal=False)
    assert api(run.url(), "status")["kernels"] == 0
    assert "Using %s/miniconda3/bin/jupyter-notebook" % home in run.stderr
    (record,) = bare_host.servers()
    assert record["root_dir"] == str(home / "work") == os.readlink("/proc/%d/cwd" % record["pid"])


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


def in_namespace(setup: str) -> List[str]:
    """Return a command that starts sshd where the files of the system are others, after `setup`."""
    obstacle = find_namespaces_obstacle()
    if obstacle:
        pytest.skip(obstacle)
    return ["unshare", "--mount", "sh", "-c", setup + ' && exec "$@"', "sh"]


def test_busybox_only(laptop: Laptop, make_host: Callable[..., Host], directory: Path) -> None:
    """It is the login shell, /bin/sh, and all that is on PATH."""
    if not os.path.exists("/bin/busybox"):
        pytest.skip("this machine has no /bin/busybox")
    path = bare_python(directory / "bin")
    for applet in subprocess.check_output(["/bin/busybox", "--list"], text=True).split():
        if not (directory / "bin" / applet).exists():
            (directory / "bin" / applet).symlink_to("/bin/busybox")
    users = directory / "passwd"
    setup = "sed 's#:[^:]*$#:/bin/sh#' /etc/passwd >%s && mount --bind %s /etc/passwd" % (users, users)
    host = make_host(PATH=path, prefix=in_namespace(setup + " && mount --bind /bin/busybox /bin/sh"))
    assert "BusyBox" in host.sshd.ssh("exec /bin/sh --help").stderr
    environment_at(host.home / "miniconda3")
    with laptop.opened("host") as run:
        assert api(run.url(), "status")["kernels"] == 0
    assert "Stopped" in laptop.run("host", "stop").stderr


SMUGGLED = ["/x; touch pwned", "$(touch pwned)", "x' ; touch pwned; '", "-c", "~", "/x\ntouch pwned"]


def test_no_python_at_all(laptop: Laptop, make_host: Callable[..., Host], directory: Path) -> None:
    """It is said; where the user names where one is, that is taken; and what is named is never a command."""
    named = directory / "bin/python3.named"
    named.parent.mkdir()
    named.touch()
    setup = 'mount --bind "$(readlink -f /usr/bin/python3)" %s; ' % named
    setup += "for p in /usr/bin /usr/local/bin /opt/conda/bin; do "
    setup += "[ ! -e $p/python3 ] || mount --bind /dev/null $p/python3; done"
    make_host(path=str(named.parent), prefix=in_namespace(setup))
    check_failure(laptop.run("host"), 3, "no python3 on host", "needs Python 3.6 or newer")
    check_failure(laptop.run("--python", str(named), "host:nowhere"), 1, "no such directory on the host")
    for smuggled in SMUGGLED:
        assert "no python3 on host" in laptop.run("--python=" + smuggled, "host").stderr, smuggled
    assert not list(directory.rglob("pwned"))


# -- the laptop -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("minor", [minor for minor in sorted(interpreters()) if minor >= 8])
def test_client_under_python_3(laptop: Laptop, host: Host, minor: int) -> None:
    """It opens, asks, stops, and warns of nothing."""
    laptop.python = interpreters()[minor]
    laptop.environment["PYTHONWARNINGS"] = "error"
    with laptop.opened("--stop-on-exit", "host", has_terminal=True) as run:
        assert api(run.url(), "status")["kernels"] == 0
    assert "Warning" not in run.text
    assert "Stopped" in run.text and not host.servers()


@pytest.mark.parametrize("minor", [minor for minor in sorted(interpreters()) if minor < 8])
def test_client_under_a_python_that_is_too_old(laptop: Laptop, minor: int) -> None:
    laptop.python = interpreters()[minor]
    run = laptop.run("host")
    assert run.status == 1
    assert re.fullmatch(r"rjupyter needs Python 3.8 or newer on this side; this is 3\.%d\.\d+\n" % minor, run.text)


def test_ssh_config_that_replaces_the_command(laptop: Laptop, host: Host) -> None:
    with open(host.sshd.config, "a") as config:
        config.write("  RemoteCommand touch pwned\n  RequestTTY force\n  LocalForward 1 127.0.0.1:1\n")
    url = laptop.start("host", has_terminal=False).url()
    assert api(url, "status")["kernels"] == 0
    assert not (host.home / "pwned").exists()


def test_stub_of_an_ssh_without_remote_command(laptop: Laptop, host: Host) -> None:
    """OpenSSH before 7.6 does not know the option. The real ssh stands behind a wrapper that refuses it as that did."""
    wrapper = laptop.home / "ssh"
    refusal = "command-line: line 0: Bad configuration option: remotecommand"
    wrapper.write_text(
        '#!/bin/sh\ncase "$*" in *RemoteCommand*) echo \'%s\' >&2; exit 255 ;; esac\nexec /usr/bin/ssh "$@"\n' % refusal
    )
    wrapper.chmod(0o755)
    run = laptop.start("host", has_terminal=False, PATH="%s:%s" % (laptop.home, SYSTEM_PATH))
    assert api(run.url(), "status")["kernels"] == 0


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
    assert re.search(r'rjupyter\S*\.py", line %d, in list_all' % line, done.stderr)


def test_server_that_a_newer_version_wrote_down(laptop: Laptop, host: Host) -> None:
    """Its file has what a later version may add; it is ours all the same."""
    with laptop.opened("host") as run:
        url = run.url()
    (record,) = host.servers()
    file = host.home / ".local/state/rjupyter/servers" / record.pop("id") / "server.json"
    newer = dict(record, version=2, colour={"is": "red"}, request={"flavour": ["x"], "app": "notebook"})
    file.write_text(json.dumps(newer))
    with laptop.opened("host") as run:
        assert without_port(run.url()) == without_port(url)
        assert "Found Jupyter Notebook" in run.text
    assert "not started by rjupyter" not in laptop.run("host", "list").stdout
    assert laptop.run("host", "stop", "--all").stderr.count("Stopped Jupyter Notebook") == 1
