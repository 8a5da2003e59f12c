"""The user's own settings: what ssh_config, directories, Jupyter's configuration and start-up files do to our calls."""

import contextlib
import gzip
import hashlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

import pytest
from client import api, check_failure, compute, is_up
from execution import add_kernel
from jupyters import jupyter_for_everyone, jupyter_of, standin
from notebooks import write_notebook
from private_slurm import PrivateSlurm
from sides import (
    BOTH_MODES,
    ON_HOST,
    SCRIPT,
    SYSTEM_PATH,
    VENV_BIN,
    Host,
    Laptop,
    Run,
    User,
    processes_with,
    quiet_port,
    wait_until,
    wait_until_gone,
)


def of_ssh(laptop: Laptop, *lines: str) -> None:
    """Add to the host's block of ssh's configuration."""
    with open(laptop.config, "a") as config:
        config.write("".join("  %s\n" % line for line in lines))


def of_jupyter(host: Host, text: str) -> None:
    (host.home / ".jupyter").mkdir(exist_ok=True)
    (host.home / ".jupyter/jupyter_server_config.py").write_text(text)


def ended(run: Run) -> None:
    run.interrupt()
    assert run.wait(30) == 0


def nothing_on_the_laptop(mark: str) -> None:
    wait_until_gone(mark, "nothing is left on the laptop", 15, without=ON_HOST)


# -- ssh_config(5) ----------------------------------------------------------------------------------------------------

HOSTILE = {
    "tunnel alias": ["SessionType none", "ForkAfterAuthentication yes", "StdinNull yes"],
    "subsystem, local command, terminal": [
        "SessionType subsystem",
        "PermitLocalCommand yes",
        "LocalCommand echo hello",
        "RequestTTY force",
        "EscapeChar ~",
        "EnableEscapeCommandline yes",
    ],
    "shared, quiet": ["ControlMaster auto", "ControlPath ~/%C", "ControlPersist yes", "LogLevel QUIET"],
    "device, not known here": [
        "Tunnel point-to-point",
        "ExitOnForwardFailure yes",
        "IgnoreUnknown UseKeychain,ChannelTimeout",
        "UseKeychain yes",
        "ChannelTimeout *=2s",
    ],
}


@BOTH_MODES
@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_setting_of_ssh_does_not_change_what_a_call_is(
    laptop: Laptop, host: Host, mark: str, name: str, mode: List[str]
) -> None:
    of_ssh(laptop, *HOSTILE[name])
    run = laptop.start("--local-port", str(quiet_port()), *mode, "host", has_terminal=False)
    url = run.url()
    run.expect("To end it")
    assert is_up(url)
    logins = host.sshd.logins()
    host.sshd.end_connections()
    run.expect("Connected to host again", 40)
    assert is_up(url)
    assert host.sshd.logins() - logins <= 4
    ended(run)
    nothing_on_the_laptop(mark)


@BOTH_MODES
def test_alias_of_a_tunnel_serves_each_action(laptop: Laptop, host: Host, mark: str, mode: List[str]) -> None:
    run = laptop.start("host", has_terminal=False)
    run.url()
    run.expect("To end it")
    ended(run)
    of_ssh(laptop, *HOSTILE["tunnel alias"])
    for action in ("list", "logs", "doctor", "stop"):
        done = laptop.start(*mode, "host", action, has_terminal=False)
        assert done.wait(60) == 0, (action, done.text)
        assert done.text.strip(), action
        nothing_on_the_laptop(mark)


def test_stub_of_an_ssh_without_these_options_is_asked_for_none(laptop: Laptop, host: Host) -> None:
    """OpenSSH before 8.7 knows none of them. The real ssh stands behind a wrapper that refuses them as that did."""
    refusal = "command-line: line 0: Bad configuration option: $name"
    wrapper = laptop.home / "ssh"
    wrapper.write_text(
        "#!/bin/sh\nfor name in sessiontype stdinnull forkafterauthentication channeltimeout; do\n"
        '  if printf "%%s\\n" "$@" | grep -qi "^$name[= ]"; then echo "%s" >&2; exit 255; fi\ndone\n'
        'exec /usr/bin/ssh "$@"\n' % refusal
    )
    wrapper.chmod(0o755)
    run = laptop.start("host", has_terminal=False, PATH="%s:%s" % (laptop.home, SYSTEM_PATH))
    assert is_up(run.url())


def test_stub_of_an_ssh_that_would_end_what_is_quiet_is_told_not_to(laptop: Laptop, host: Host) -> None:
    """OpenSSH 9.6 and later know ChannelTimeout; where the config has it, our calls take it away."""
    wrapper = laptop.home / "ssh"
    told = laptop.home / "told"
    wrapper.write_text(
        "#!/bin/sh\nfor word; do\n  case $word in\n    -G) echo channeltimeout session=1s ;;\n"
        "    ChannelTimeout=*) echo $word >>%s; word=LogLevel=INFO ;;\n  esac\n"
        '  set -- "$@" "$word"; shift\ndone\nexec /usr/bin/ssh "$@"\n' % told
    )
    wrapper.chmod(0o755)
    for mode, times in (([], 2), (["--no-mux"], 2)):
        told.write_text("")
        with laptop.opened(*mode, "host", PATH="%s:%s" % (laptop.home, SYSTEM_PATH)):
            assert told.read_text().split().count("ChannelTimeout=none") >= times


# What each keyword of ssh_config(5) is to us. Ours: a value that would change our calls, and what `ssh -G` must say
# instead, for a session, and for the connection itself (`ssh -N`).
OURS = {
    "SessionType": ("subsystem", "default", "none"),
    "StdinNull": ("yes", "no", ""),
    "ForkAfterAuthentication": ("yes", "no", "no"),
    "RemoteCommand": ("echo no", "", ""),
    "RequestTTY": ("force", "false", "false"),
    "ControlPersist": ("yes", "no", "no"),
    "ForwardAgent": ("yes", "no", "no"),
    "ForwardX11": ("yes", "no", "no"),
    "ControlMaster": ("ask", "false", ""),
    "Tunnel": ("ethernet", "", "false"),
    "PermitLocalCommand": ("yes", "no", ""),
}
# Set by us in one call or another, as the tests above and test_staying.py show.
OURS_SOMETIMES = """
BatchMode ChannelTimeout ClearAllForwardings ConnectTimeout ControlPath DynamicForward ExitOnForwardFailure LocalCommand
LocalForward LogLevel RemoteForward ServerAliveCountMax ServerAliveInterval
"""
USERS = """
Host Match Include AddKeysToAgent AddressFamily BindAddress BindInterface CanonicalDomains
CanonicalizeFallbackLocal CanonicalizeHostname CanonicalizeMaxDots CanonicalizePermittedCNAMEs
CASignatureAlgorithms CertificateFile CheckHostIP Ciphers Compression ConnectionAttempts EnableSSHKeysign
GlobalKnownHostsFile GSSAPIAuthentication GSSAPIDelegateCredentials HostbasedAcceptedAlgorithms
HostbasedAuthentication HostKeyAlgorithms HostKeyAlias HostName Hostname IdentitiesOnly IdentityAgent
IdentityFile IgnoreUnknown IPQoS KbdInteractiveAuthentication KbdInteractiveDevices KexAlgorithms
KnownHostsCommand MACs NoHostAuthenticationForLocalhost NumberOfPasswordPrompts PasswordAuthentication
PKCS11Provider Port PreferredAuthentications ProxyCommand ProxyJump ProxyUseFdpass PubkeyAcceptedAlgorithms
PubkeyAuthentication RefuseConnection RekeyLimit RequiredRSASize RevokedHostKeys SecurityKeyProvider SendEnv
SetEnv StrictHostKeyChecking Tag UpdateHostKeys User UserKnownHostsFile VerifyHostKeyDNS WarnWeakCrypto
GSSAPIKeyExchange GSSAPIClientIdentity GSSAPIServerIdentity GSSAPIRenewalForcesRekey GSSAPITrustDns
GSSAPIKexAlgorithms
"""
HARMLESS = """
EnableEscapeCommandline EscapeChar FingerprintHash ForwardX11Timeout ForwardX11Trusted GatewayPorts
HashKnownHosts LogVerbose ObscureKeystrokeTiming PermitRemoteOpen StreamLocalBindMask StreamLocalBindUnlink
SyslogFacility TCPKeepAlive TunnelDevice VersionAddendum VisualHostKey XAuthLocation
"""


def keywords_of_the_manual() -> List[str]:
    """Return the keywords of the ssh_config(5) that is installed here."""
    for page in (Path("/usr/share/man/man5/ssh_config.5.gz"), Path("/usr/share/man/man5/ssh_config.5")):
        if page.exists():
            text = gzip.decompress(page.read_bytes()) if page.suffix == ".gz" else page.read_bytes()
            head = text.decode().split("\n.Sh PATTERNS")[0]
            return re.findall(r"^\.It Cm (\w+)$", head, re.MULTILINE)
    pytest.skip("ssh_config(5) is not installed")


def test_each_keyword_of_the_manual_has_a_verdict() -> None:
    found = keywords_of_the_manual()
    assert len(found) > 80
    assert not set(found) - {*OURS, *(OURS_SOMETIMES + USERS + HARMLESS).split()}


def is_known(keyword: str) -> bool:
    ask = ["ssh", "-G", "-F", "/dev/null", "-o", "%s=%s" % (keyword, OURS[keyword][0]), "x"]
    return b"Bad configuration option" not in subprocess.run(ask, capture_output=True).stderr


@BOTH_MODES
def test_keywords_that_are_ours_are_set_in_each_call(laptop: Laptop, host: Host, mode: List[str]) -> None:
    """Each ssh that -v prints is given to `ssh -G`, with a configuration that says something else."""
    with laptop.opened(*mode, "-v", "--no-browser", "host", has_terminal=False) as run:
        text = run.text
    known = [keyword for keyword in OURS if is_known(keyword)]
    assert len(known) > 6
    of_ssh(laptop, *["%s %s" % (keyword, OURS[keyword][0]) for keyword in known])
    calls = [shlex.split(line.partition("ssh ")[2]) for line in text.splitlines() if re.search(r"(^|[ +$])ssh ", line)]
    asked = 0
    for words in calls:
        if {"-O", "-G", "-V"} & set(words):
            continue
        is_session = "-N" not in words and "-W" not in words
        said = subprocess.run(["ssh", "-G", *words], capture_output=True, text=True)
        assert said.returncode == 0, said.stderr
        asked += 1
        for keyword in known:
            expected = OURS[keyword][1 if is_session else 2]
            lines = [line.partition(" ") for line in said.stdout.splitlines()]
            values = [value for name, _, value in lines if name == keyword.lower()]
            if expected:
                assert values == [expected], (keyword, words)
            elif keyword == "RemoteCommand":
                assert values in ([], ["none"]), words
    assert asked >= 2, text


# -- no code from a directory -----------------------------------------------------------------------------------------


@pytest.fixture
def ana(make_user: Callable[[str], User], make_host: Callable[..., Host]) -> User:
    user = make_user("/bin/bash")
    user.write(".profile", "PATH=%s:$PATH\n" % standin())
    make_host(user=user)
    return user


MODULES = """
shutil webbrowser subprocess socket json random argparse shlex threading http contextlib tempfile queue
platform usercustomize sitecustomize re zlib binascii importlib notebook jupyterlab jupyter_client nbformat
nbclient
"""


def plant(directory: Path) -> Path:
    """Put modules into a directory that write down that they were executed; return where."""
    told = directory.parent / ("executed in " + directory.name)
    told.write_text("")
    told.chmod(0o666)
    for name in MODULES.split():
        text = "import os, sys\nfd = os.open(%r, os.O_WRONLY | os.O_APPEND)\n" % str(told)
        text += "os.write(fd, (%r + repr(sys.argv) + chr(10)).encode())\nraise ImportError(%r)\n" % (name, name)
        (directory / (name + ".py")).write_text(text)
    return told


def browser(laptop: Laptop) -> str:
    """Make a browser that fetches its page and says so; return it as --browser takes it."""
    program = laptop.directory / "browser"
    script = "import sys, urllib.request as r; print(r.urlopen(sys.argv[1], timeout=20).url, file=open(%r, 'w'))"
    program.write_text("#!%s -I\n%s\n" % (sys.executable, script % str(laptop.directory / "browsed")))
    program.chmod(0o755)
    return str(program) + " %s"


def check_browser(laptop: Laptop, run: Run, told: Path) -> None:
    run.url()
    wait_until(
        lambda: (laptop.directory / "browsed").exists() or told.read_text(), "the browser came, or a stranger", 20
    )
    assert not told.read_text(), told.read_text()
    run.expect("To end it")


def test_no_module_of_the_laptops_current_directory_is_executed(laptop: Laptop, host: Host) -> None:
    told = plant(laptop.home)
    check_browser(laptop, laptop.start("--browser", browser(laptop), "host", has_terminal=False), told)


def test_no_module_beside_a_copy_of_the_file_is_executed(laptop: Laptop, host: Host) -> None:
    """Copied into a project, which is how it is used: Python itself puts a script's directory first."""
    told = plant(laptop.home)
    shutil.copy(SCRIPT, laptop.home)
    wrapper = laptop.directory / "python"
    wrapper.write_text('#!/bin/sh\nshift\nexec %s rjupyter.py "$@"\n' % sys.executable)
    wrapper.chmod(0o755)
    laptop.python = str(wrapper)
    check_browser(laptop, laptop.start("--browser", browser(laptop), "host", has_terminal=False), told)


@pytest.mark.parametrize("arguments", [[], ["-f"]], ids=["", "background"])
def test_no_module_of_pythonpath_reaches_what_we_start(laptop: Laptop, host: Host, arguments: List[str]) -> None:
    """What PYTHONPATH adds is the user's for their programs, not for the one that gets the one-time address."""
    (laptop.home / "library").mkdir()
    told = plant(laptop.home / "library")
    for name in MODULES.split():
        if name != "webbrowser":
            (laptop.home / "library" / (name + ".py")).unlink()
    run = laptop.start(
        *arguments, "--browser", browser(laptop), "host", has_terminal=False, PYTHONPATH=str(laptop.home / "library")
    )
    check_browser(laptop, run, told) if not arguments else run.url()
    assert laptop.run("host", "close").status == 0 or not arguments
    assert not told.read_text(), told.read_text()


@pytest.mark.parametrize("way", ["path", "python", "env"])
def test_no_module_of_the_hosts_directories_is_executed(laptop: Laptop, ana: User, way: str) -> None:
    """A real user, whose sessions start in the home that the account names."""
    ana.write(".profile", "PATH=%s:$PATH\n" % jupyter_for_everyone())
    (ana.home / "work").mkdir()
    places = [plant(ana.home), plant(ana.home / "work")]
    prefix = jupyter_for_everyone().parent
    arguments = {"path": [], "python": ["--python", str(prefix / "bin/python")], "env": ["--env", str(prefix)]}[way]
    run = laptop.start(*arguments, "host:work", has_terminal=False)
    found = run.expect(r"^http\S+|^rjupyter: .*").group()
    assert [told.read_text() for told in places] == ["", ""]
    assert found.startswith("http"), run.text
    for action in (["list"], ["doctor"], ["stop", "--yes"]):
        laptop.run("host", *action)
    assert [told.read_text() for told in places] == ["", ""]


# -- environments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", ["notebook/", "notebook.py", "jupyterlab/", "jupyterlab/__init__.py"])
@pytest.mark.parametrize("option", ["--env", "--python"])
def test_directory_of_that_name_is_no_jupyter(laptop: Laptop, ana: User, entry: str, option: str) -> None:
    (ana.home / entry).parent.mkdir(exist_ok=True)
    (ana.home / entry).mkdir(exist_ok=True) if entry.endswith("/") else (ana.home / entry).write_text("")
    bare = ana.home / "bare"
    subprocess.run(["/usr/bin/python3", "-m", "venv", "--without-pip", str(bare)], check=True)
    named = str(bare if option == "--env" else bare / "bin/python")
    run = laptop.start("--start-timeout", "20", option, named, "host", has_terminal=False)
    assert run.wait() == 3, run.text
    assert "no Jupyter in this environment" in run.stderr and "-m pip install" in run.stderr
    assert not list(ana.home.glob(".local/state/rjupyter/servers/*"))


def conda_environment(host: Host) -> Path:
    """Make an environment as conda has it, of today's Jupyter: what is sourced at its activation, and what is set."""
    base = jupyter_for_everyone().parent
    prefix = host.home / "miniconda3/envs/geo"
    (prefix / "etc/conda/activate.d").mkdir(parents=True)
    (prefix / "etc/conda/deactivate.d").mkdir()
    (prefix / "conda-meta").mkdir()
    for entry in base.iterdir():
        if entry.name != "etc":
            (prefix / entry.name).symlink_to(entry)
        else:
            for inner in entry.iterdir():
                (prefix / "etc" / inner.name).symlink_to(inner)
    script = 'export GDAL_DATA="$CONDA_PREFIX/share/gdal"\nexport PROJ_LIB="$CONDA_PREFIX/share/proj"\necho noise\n'
    (prefix / "etc/conda/activate.d/geo.sh").write_text(script)
    (prefix / "conda-meta/history").write_text("")
    (prefix / "conda-meta/state").write_text(json.dumps({"env_vars": {"MY_DATA": "/data of mine"}}))
    (prefix / "etc/conda/env_vars.d").mkdir()
    (prefix / "etc/conda/env_vars.d/geo.json").write_text(json.dumps({"GEO_VERSION": "7"}))
    return prefix


ACTIVATED = ["CONDA_PREFIX", "CONDA_DEFAULT_ENV", "GDAL_DATA", "PROJ_LIB", "MY_DATA", "GEO_VERSION"]


def activated_in(prefix: Path) -> List[str]:
    return [str(prefix), "geo", "%s/share/gdal" % prefix, "%s/share/proj" % prefix, "/data of mine", "7"]


def test_what_conda_activates_is_there_in_the_kernel(laptop: Laptop, host: Host) -> None:
    prefix = conda_environment(host)
    url = laptop.start("--env", "geo", "host", has_terminal=False).url()
    source = "import json, os, sys; print(json.dumps([sys.prefix] + [os.environ.get(n) for n in %r]))"
    assert json.loads(compute(url, source % ACTIVATED)) == [str(prefix), *activated_in(prefix)]


def test_what_conda_activates_is_there_in_an_execution(laptop: Laptop, host: Host) -> None:
    prefix = conda_environment(host)
    source = "import json, os; print(json.dumps([os.environ.get(n) for n in %r]))" % ACTIVATED
    cell: Dict[str, Any] = {
        "cell_type": "code",
        "id": "a",
        "metadata": {},
        "execution_count": None,
        "outputs": [],
        "source": source,
    }
    (laptop.home / "n.ipynb").write_text(
        json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5})
    )
    assert laptop.run("--env", "geo", "host", "execute", "n.ipynb").status == 0
    (cell,) = json.loads((laptop.home / "n.executed.ipynb").read_text())["cells"]
    assert json.loads("".join(cell["outputs"][0]["text"])) == activated_in(prefix)


def test_an_environment_of_venv_is_named_in_the_kernel(laptop: Laptop, host: Host) -> None:
    prefix = host.home / "v"
    prefix.symlink_to(jupyter_for_everyone().parent)
    url = laptop.start("--env", "~/v", "host", has_terminal=False).url()
    assert compute(url, "import os; print(os.environ.get('VIRTUAL_ENV'))") == "%s\n" % prefix


# -- Jupyter's configuration ------------------------------------------------------------------------------------------


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.mark.jupyter
@pytest.mark.parametrize("ending", ["py", "json"])
def test_port_without_retries_that_is_taken_is_the_first_refusal(
    laptop: Laptop, host: Host, taken: int, ending: str
) -> None:
    of_jupyter(host, "c.ServerApp.port = %d\nc.ServerApp.port_retries = 0\n" % taken)
    if ending == "json":
        of_jupyter(host, "")
        settings = {"ServerApp": {"port": taken, "port_retries": 0}}
        (host.home / ".jupyter/jupyter_server_config.json").write_text(json.dumps(settings))
    run = laptop.start("--start-timeout", "60", "host", has_terminal=False)
    assert run.wait(40) == 4, run.text
    assert "%d is already in use" % taken in run.stderr, run.stderr
    assert "start-timeout" not in run.stderr
    assert not host.servers()


@pytest.mark.jupyter
def test_socket_in_the_configuration_that_is_taken_is_the_first_refusal(laptop: Laptop, host: Host) -> None:
    path = str(host.home / "s")
    of_jupyter(host, "c.ServerApp.sock = %r\n" % path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        run = laptop.start("--start-timeout", "60", "host", has_terminal=False)
        assert run.wait(40) == 4, run.text
    assert path in run.stderr or "sock" in run.stderr, run.stderr
    assert "start-timeout" not in run.stderr and "(empty)" not in run.stderr
    assert not host.servers()


SETTINGS = {
    "token with a space": ("c.IdentityProvider.token = 'two words'", "token"),
    "token beyond ASCII": ("c.IdentityProvider.token = 'schlüssel'", "token"),
    "token that ends a line": ("c.IdentityProvider.token = 'a\\nb'", "token"),
    "base_url with a colon": ("c.ServerApp.base_url = '/a:b/'", "base_url"),
    "base_url with a space": ("c.ServerApp.base_url = '/a b/'", "base_url"),
    "base_url beyond ASCII": ("c.ServerApp.base_url = '/über/'", "base_url"),
    "preferred_dir outside": ("c.FileContentsManager.preferred_dir = '/etc'", "preferred_dir"),
    "preferred_dir that is gone": ("c.ServerApp.preferred_dir = '/no/where'", "preferred_dir"),
}


@pytest.mark.jupyter
@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_setting_of_jupyter_is_opened_or_refused_by_its_name(laptop: Laptop, host: Host, name: str, mark: str) -> None:
    text, setting = SETTINGS[name]
    of_jupyter(host, "# -*- coding: utf-8 -*-\n%s\n" % text)
    (host.home / "work").mkdir()
    run = laptop.start("host:work", has_terminal=False)
    found = run.expect(r"^http\S+|^rjupyter: .*").group()
    if found.startswith("http"):
        assert is_up(found)
        return
    assert run.wait() in (1, 4)
    assert setting in run.stderr and "no sense" not in run.stderr, run.stderr
    wait_until(lambda: not [w for w in processes_with(mark).values() if "jupyter" in w], "no server stays", 10)
    assert not host.servers()


QUIET = {
    "level": "c.ServerApp.log_level = 'ERROR'\n",
    "format": "c.ServerApp.log_format = 'said'\n",
    "file": "c.ServerApp.logging_config = {'handlers': {'console': {'class': 'logging.NullHandler'}}}\n",
}


@pytest.mark.jupyter
@pytest.mark.parametrize("how", sorted(QUIET))
def test_end_is_told_although_the_log_says_nothing(laptop: Laptop, host: Host, how: str) -> None:
    of_jupyter(host, QUIET[how])
    run = laptop.start("--port", str(quiet_port()), "host", has_terminal=False)  # the log tells of no race for one
    url = run.url()
    run.expect("To end it")
    api(url, "shutdown", "POST")
    assert run.wait(30) == 4
    assert "it was shut down" in run.stderr, run.stderr
    assert "killed" not in run.stderr


# What a configuration puts into a file when Jupyter has read all of them: `from MODULE import APP`.
TELLS = """
import json, os
from {0} import {1}

def init_webapp(self, init={1}.init_webapp):
    init(self)
    names = ("headers", "compress_response", "ws_ping_interval", "ws_ping_timeout")
    with open(os.path.expanduser("~/told"), "w") as stream:
        json.dump([self.tornado_settings.get(name) for name in names], stream)

{1}.init_webapp = init_webapp
"""
OF_SERVER = ("jupyter_server", TELLS.format("jupyter_server.serverapp", "ServerApp"))
OF_NOTEBOOK = ("jupyter_notebook", TELLS.format("notebook.notebookapp", "NotebookApp"))
THEIRS = {"headers": {"X-Theirs": "1"}}
# Of an age of Jupyter, where a configuration lies below home, and what it says: besides, {0} is THEIRS.
PLACES = {
    "for all of Jupyter": ("", ".jupyter/jupyter_config.py", "c.ServerApp.tornado_settings = {0}"),
    "at once": ("notebook-7.0", ".jupyter/jupyter_server_config.py", "c.ServerApp.update(dict(tornado_settings={0}))"),
    "added": ("", "site/jupyter_server_config.py", "c.ServerApp.tornado_settings.update({0})"),
    "the app's": ("lab-3.2", ".jupyter/jupyter_lab_config.py", "c.ServerApp.tornado_settings = {0}"),
    "JSON": ("", "site/jupyter_config.json", '{{"NotebookApp": {{"tornado_settings": {0}}}}}'),
    "environment": ("", "v/etc/jupyter/jupyter_server_config.json", '{{"ServerApp": {{"tornado_settings": {0}}}}}'),
    "classic": ("notebook-6.4", ".jupyter/jupyter_config.json", '{{"NotebookApp": {{"tornado_settings": {0}}}}}'),
}


@pytest.mark.jupyter
@pytest.mark.parametrize("name", sorted(PLACES))
def test_settings_of_tornado_are_theirs_and_ours(
    laptop: Laptop, make_host: Callable[..., Host], directory: Path, name: str
) -> None:
    """Wherever theirs lie, and however they are said: they hold, and our pings are added."""
    age, path, text = PLACES[name]
    programs = jupyter_of(age) if age else jupyter_for_everyone()
    host = make_host(path=str(programs), JUPYTER_CONFIG_PATH=str(directory / "host/home/site"))
    own, tells = OF_NOTEBOOK if age == "notebook-6.4" else OF_SERVER
    (host.home / ".jupyter").mkdir(exist_ok=True)
    (host.home / (".jupyter/%s_config.py" % own)).write_text(tells)
    options = ["--new", "host"]
    if path.startswith("v/"):
        (host.home / "v").mkdir()
        for entry in programs.parent.iterdir():
            (host.home / "v" / entry.name).symlink_to(entry) if entry.name != "etc" else None
        shutil.copytree(programs.parent / "etc", host.home / "v/etc")
        options[:0] = ["--env", "~/v"]
    (host.home / path).parent.mkdir(exist_ok=True)
    cases = [(dict(THEIRS, ws_ping_interval=7000), [7000, 9000]), (THEIRS, [3000, 9000])]
    for settings, pings in cases if age else cases[:1]:
        with open(host.home / path, "w") as stream:
            stream.write(
                text.format(json.dumps(settings)) + "\n" + (tells if path.endswith(own + "_config.py") else "")
            )
        with laptop.opened(*options):
            assert json.loads((host.home / "told").read_text()) == [{"X-Theirs": "1"}, None, *pings]
        assert laptop.run("host", "stop").status == 0


@pytest.mark.jupyter
@pytest.mark.parametrize(("age", "app"), [("", "ServerApp"), ("notebook-6.4", "NotebookApp")])
def test_settings_of_tornado_on_the_command_line_are_theirs(
    laptop: Laptop, make_host: Callable[..., Host], age: str, app: str
) -> None:
    host = make_host(path=str(jupyter_of(age) if age else jupyter_for_everyone()))
    own, tells = OF_NOTEBOOK if age else OF_SERVER
    (host.home / ".jupyter").mkdir()
    (host.home / (".jupyter/%s_config.py" % own)).write_text(tells)
    with laptop.opened("--server-arg=--%s.tornado_settings={'ws_ping_interval': 7000}" % app, "host"):
        assert json.loads((host.home / "told").read_text())[2] == 7000


def listens_on(run: Run, address: str) -> bool:
    """True when the server that a run launched takes connections at an address."""
    port = int(run.expect(r"Launched .* port (\d+),").group(1))
    try:
        socket.create_connection((address, port), timeout=5).close()
    except OSError:
        return False
    return True


@pytest.mark.jupyter
def test_address_in_the_configuration_never_opens_the_server_without_a_word(laptop: Laptop, host: Host) -> None:
    """By each name that the server has there, those of other apps too."""
    wide = "Jupyter listens on all addresses of %s" % os.uname().nodename
    of_jupyter(host, "c.NotebookApp.ip = '0.0.0.0'\nc.ServerApp.ip = '*'\n")
    with laptop.opened("host") as run:
        assert listens_on(run, "127.0.0.1") and not listens_on(run, "127.0.0.2")
        assert wide not in run.stderr
    assert laptop.run("host", "stop").status == 0
    of_jupyter(host, "c.JupyterNotebookApp.ip = '*'\n")
    with laptop.opened("host") as run:
        assert listens_on(run, "127.0.0.2")
        assert wide in run.stderr
    assert laptop.run("host", "stop").status == 0
    of_jupyter(host, "c.JupyterNotebookApp.ip = '::'\nc.ServerApp.token = ''\n")
    check_failure(laptop.run("host"), 4, "Jupyter would let anyone in", "takes away its token")
    assert not host.servers()


BROKEN = {
    "": {
        "jupyter_config.py": ("c.ServerApp.port = 1\nc.ServerApp.ip = = 2\n", "line 2", "SyntaxError"),
        "jupyter_server_config.py": ("c.ServerApp\n\nundefined\n", "line 3", "NameError: name 'undefined'"),
        "jupyter_server_config.json": ('{"ServerApp": {\n"port" 8888}}\n', "line 2", "Expecting ':'"),
    },
    "notebook-6.4": {"jupyter_notebook_config.py": ("import nothing_of_the_kind\n", "line 1", "ModuleNotFoundError")},
}


@pytest.mark.jupyter
@pytest.mark.parametrize("age", BROKEN)
def test_configuration_that_is_broken_is_named(laptop: Laptop, make_host: Callable[..., Host], age: str) -> None:
    """Jupyter goes on without it, and says so in its log alone."""
    host = make_host(path=str(jupyter_of(age) if age else jupyter_for_everyone()))
    (host.home / ".jupyter").mkdir()
    for name, (text, _, _) in BROKEN[age].items():
        (host.home / ".jupyter" / name).write_text(text)
    with laptop.opened("host") as run:
        said = [line for line in run.stderr.splitlines() if "could not read its configuration" in line]
        assert len(said) == len(BROKEN[age]), run.text
        for name, (_, line, error) in BROKEN[age].items():
            assert [each for each in said if "/.jupyter/%s" % name in each and line in each and error in each], said


ELSEWHERE = """
from jupyter_server.services.contents.filemanager import FileContentsManager
from tornado.web import HTTPError

class Elsewhere(FileContentsManager):
    def get(self, path, *arguments, **options):
        if path:
            raise HTTPError(404, "no object of that name in the bucket")
        return super().get(path, *arguments, **options)

c.ServerApp.contents_manager_class = Elsewhere
"""


@pytest.mark.jupyter
def test_file_that_jupyter_does_not_show_is_named(laptop: Laptop, host: Host) -> None:
    """Hidden, or nothing to its contents manager; what it shows needs no word."""
    for name in ("seen.ipynb", ".hidden.ipynb", "a b#ü.txt"):
        (host.home / name).write_text("{}")
    for name, is_shown in (("seen.ipynb", True), (".hidden.ipynb", False), ("a b#ü.txt", True)):
        with laptop.opened("host:" + name) as run:
            assert ("Jupyter has no %s to show" % name in run.stderr) != is_shown, run.text
    assert laptop.run("host", "stop").status == 0
    of_jupyter(host, ELSEWHERE)
    with laptop.opened("host:seen.ipynb") as run:
        assert "Jupyter has no seen.ipynb to show: it is hidden, or not in its contents." in run.stderr


def port_of_its_own() -> List[str]:
    """Without a token, what another test launched at the same moment is no other server; its lock is another's, too."""
    return ["--port", str(quiet_port())]


def new_session_without_token(url: str, path: str) -> str:
    """Start a notebook's kernel as its page does, and return its id: what the cookie says is said again."""
    body = {"path": path, "type": "notebook", "name": path, "kernel": {"name": "python3"}}
    headers = {"Cookie": "_xsrf=said-twice", "X-XSRFToken": "said-twice"}
    request = urllib.request.Request(url.partition("/tree")[0] + "/api/sessions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return str(json.loads(answer.read())["kernel"]["id"])


@pytest.mark.jupyter
@pytest.mark.parametrize(
    ("age", "app", "options"),
    [("", "ServerApp", []), ("notebook-6.4", "NotebookApp", []), ("lab-3.2", "ServerApp", ["--app", "lab"])],
    ids=["today", "classic", "lab-3.2"],
)
def test_server_without_a_token_does_all(
    laptop: Laptop, make_host: Callable[..., Host], age: str, app: str, options: List[str]
) -> None:
    """As rental machines have it. With a password besides, only its page can log in, and that is said."""
    host = make_host(path=str(jupyter_of(age) if age else jupyter_for_everyone()))
    (host.home / ".jupyter").mkdir()
    file = host.home / (".jupyter/jupyter_%s_config.py" % ("notebook" if app == "NotebookApp" else "server"))
    file.write_text("c.%s.token = ''\n" % app)
    write_notebook(host.home / "n.ipynb", "print('kept')")
    options = [*options, *port_of_its_own()]
    with laptop.opened(*options, "host") as run:
        url = run.url().partition("/lab")[0]
        kernel = new_session_without_token(url, "n.ipynb")
        assert compute(run.url(), "print('kept')", kernel) == "kept\n"
        assert laptop.run("host", "eval", "print('told')").stdout == "told\n"
        assert "Saved the outputs of 1 cell into n.ipynb." in laptop.run("host", "output", "n.ipynb", "--save").stderr
        code = "%xmode Minimal\nimport time; print('begun', flush=True); time.sleep(600)"
        computing = laptop.start("host", "eval", code, has_terminal=False)
        computing.expect("begun")
        assert laptop.run("host", "eval", "--interrupt").status == 0
        assert computing.wait() == 5
        assert laptop.run("host", "stop", "n.ipynb").status == 0
        assert laptop.run("host", "eval", "6 * 7").stdout == "42\n"  # in a new one
    assert laptop.run("host", "stop", "--yes").status == 0
    salted = hashlib.sha1(b"opensesame" + b"0123456789ab").hexdigest()
    file.write_text("c.%s.token = ''\nc.%s.password = 'sha1:0123456789ab:%s'\n" % (app, app, salted))
    with laptop.opened(*options, "host"):
        for action in (["eval", "1"], ["eval", "--interrupt"], ["stop", "n.ipynb"]):
            check_failure(laptop.run("host", *action), 1, "takes no token", "sets a password", "--new")
    assert laptop.run("host", "stop", "--yes").status == 0


@pytest.mark.jupyter
def test_password_that_jupyters_own_command_wrote_is_said(laptop: Laptop, host: Host) -> None:
    """Beside a token that is taken away, and that it is there no runtime file tells: also of a server that is found."""
    of_jupyter(host, "c.ServerApp.token = ''\n")
    salted = "sha1:0123456789ab:" + hashlib.sha1(b"opensesame" + b"0123456789ab").hexdigest()
    settings = {"IdentityProvider": {"hashed_password": salted}}
    (host.home / ".jupyter/jupyter_server_config.json").write_text(json.dumps(settings))
    options = port_of_its_own()
    for how in ("Launched", "Found"):
        with laptop.opened(*options, "host") as run:
            assert how in run.stderr and "The server has a password; the page asks for it." in run.stderr, run.text


@pytest.mark.jupyter
def test_eval_starts_a_kernel_that_the_server_has(laptop: Laptop, host: Host) -> None:
    """The only one, whatever its name; of several without the usual one, none is taken."""
    for name in ("one", "two"):
        add_kernel(host.home, name, WHICH=name)
    for names in ({"one"}, {"one", "two"}):
        text = "c.KernelSpecManager.allowed_kernelspecs = %r\nc.MultiKernelManager.default_kernel_name = 'gone'\n"
        of_jupyter(host, text % names)
        with laptop.opened("host"):
            run = laptop.run("host", "eval", "import os; print(os.environ['WHICH'])")
            if names == {"one"}:
                assert run.stdout == "one\n", run.text
            else:
                check_failure(run, 1, "no kernel could be started", "the server has: one, two")
        assert laptop.run("host", "stop", "--yes").status == 0


# -- a home that was touched by root ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "is_directory"),
    [(".local/share/jupyter", True), (".local/share/jupyter/nbsignatures.db", False), (".ipython", True)],
)
def test_what_belongs_to_root_is_said_with_what_mends_it(
    laptop: Laptop, ana: User, path: str, is_directory: bool
) -> None:
    """Left by a `sudo jupyter`: Jupyter starts, and then fails at each notebook."""
    ana.write((path + "/x") if is_directory else path, "")
    os.chown(ana.home / path, 0, 0)
    (ana.home / path).chmod(0o755 if is_directory else 0o600)
    doctor = laptop.run("host", "doctor")
    assert str(ana.home / path) in doctor.text and "chown" in doctor.text, doctor.text
    run = laptop.start("host", has_terminal=False)
    run.expect("To end it|^rjupyter: ")
    assert re.search(r"chown .*%s" % re.escape(str(ana.home / path)), run.text), run.text


# -- start-up files and the scheduler's variables ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["PYTHONHOME", "PYTHONPLATLIBDIR"])
@pytest.mark.parametrize("file", [".bashrc", ".profile"])
def test_variable_that_breaks_python_is_taken_out_or_named(laptop: Laptop, host: Host, name: str, file: str) -> None:
    (host.home / file).write_text("export PATH=%s:$PATH\nexport %s=/nowhere\n" % (VENV_BIN, name))
    init = ["--init", "true"] if file == ".profile" else []  # without it, the file of a shell that sshd starts
    run = laptop.start(*init, "--no-install", "--start-timeout", "30", "host", has_terminal=False)
    found = run.expect(r"^http\S+|^rjupyter: .*").group()
    if found.startswith("http"):
        assert is_up(found)  # Jupyter is a Python as well
    else:
        run.wait()
        assert name in run.stderr, run.stderr


# Not SBATCH_EXPORT=NONE: the job of root would then have root's real home, and install Jupyter there.
VARIABLES = {
    "SQUEUE_PARTITION": "nowhere",
    "SQUEUE_STATES": "PENDING",
    "SQUEUE_FORMAT": "%i",
    "SQUEUE_USERS": "nobody",
    "SBATCH_OUTPUT": "/dev/null",
    "SBATCH_WAIT": "1",
}


def test_variables_of_slurm_do_not_change_what_we_ask(
    laptop: Laptop, slurm: PrivateSlurm, make_host: Callable[..., Host]
) -> None:
    host = make_host(prefix=slurm.login_prefix, **slurm.environment(), **VARIABLES)
    run = laptop.start("--no-install", "--slurm=", "host", has_terminal=False)
    assert is_up(run.url())
    run.expect("To end it")
    listed = [json.loads(line) for line in laptop.run("host", "list", "--json").stdout.splitlines()]
    assert [row["state"] for row in listed if row["event"] == "server"] == ["live"], listed
    assert laptop.run("host", "stop", "--all").status == 0
    assert host.servers() == []


@pytest.mark.parametrize("way", ["variable", "option"])
def test_array_is_refused_by_name(
    laptop: Laptop, slurm: PrivateSlurm, make_host: Callable[..., Host], way: str
) -> None:
    variable = {"SBATCH_ARRAY_INX": "1-2"} if way == "variable" else {}
    host = make_host(prefix=slurm.login_prefix, **slurm.environment(), **variable)
    run = laptop.start("--slurm", "--array=1-2" if way == "option" else "--time=5", "host", has_terminal=False)
    found = run.expect(r"^http\S+|^rjupyter: .*").group()
    with contextlib.suppress(AssertionError):
        run.wait(5)
    laptop.run("host", "stop", "--all")
    if way == "option":
        assert "array" in found + run.stderr and not found.startswith("http"), run.text
    assert found.startswith("http") or "array" in run.stderr.lower(), run.text
    assert len(host.servers()) <= 1
