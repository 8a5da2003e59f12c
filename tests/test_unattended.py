"""With nobody watching: cron, launchd, systemd; and what is asked where somebody is. Doctor, config, --json.

The crontab line, the unit and the configuration are the README's own.
"""

import configparser
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List

import pytest
from client import check_failure, compute, events_of, is_up, new_session
from jupyters import jupyter_for_everyone, standin
from notebooks import write_notebook
from private_pam import asks_pam
from readme import help_events, readme_block
from sides import (
    BOTH_MODES,
    MARK,
    ON_HOST,
    SCRIPT,
    Host,
    Laptop,
    Run,
    User,
    bare_python,
    processes_with,
    quiet_port,
    ssh_of,
    wait_until,
    wait_until_gone,
)

import rjupyter

# -- cron, systemd ----------------------------------------------------------------------------------------------------


@pytest.fixture
def bare(laptop: Laptop) -> Laptop:
    """A laptop as cron has it: a bare PATH, and hardly anything else."""
    kept = {name: laptop.environment[name] for name in ("HOME", "RJUPYTER_TMP", MARK)}
    laptop.environment = dict(kept, PATH="/usr/bin:/bin")
    return laptop


def program(path: Path, text: str = "") -> Path:
    """Make a program that writes down that it ran, and does what `text` says."""
    path.write_text("#!/bin/sh\necho ran >>%s.log\n%s\n" % (path, text))
    path.chmod(0o755)
    return path


def has_run(path: Path) -> int:
    """Return how often a program ran."""
    log = Path(str(path) + ".log")
    return len(log.read_text().splitlines()) if log.exists() else 0


def left_in_tmp(laptop: Laptop) -> List[str]:
    return [path.name for path in (laptop.directory / ("rjupyter-%d" % os.getuid())).glob("*") if path.name != "lock"]


@BOTH_MODES
def test_open_without_a_terminal(bare: Laptop, host: Host, mode: List[str]) -> None:
    browser = program(bare.home / "browser")
    run = bare.start("-v", *mode, "host", has_terminal=False, BROWSER=str(browser))
    url = run.url()
    run.expect("To end it")
    assert is_up(url)
    os.kill(run.pid, signal.SIGTERM)
    assert run.wait() == 0
    assert run.stdout == url + "\n"
    assert not re.search(r"[\r\033]|^[|/\\\u2800-\u28ff-] ", run.text, re.MULTILINE)
    logins = [line for line in run.stderr.splitlines() if re.match(r"\+ ssh (?!-O|-F /dev/null|-G)", line)]
    assert logins and all("BatchMode=yes" in line for line in logins)
    assert not has_run(browser)
    assert not left_in_tmp(bare)


@BOTH_MODES
def test_unknown_host_key_and_a_password_end_at_once_with_the_cause(
    bare: Laptop, make_host: Callable[..., Host], mode: List[str]
) -> None:
    host = make_host(settings="AuthenticationMethods password\nPasswordAuthentication yes")
    check_failure(bare.run(*mode, "host"), 255, "Permission denied", "no terminal here to ask", "try: a key without")
    known = host.sshd.directory / "known_hosts"
    known.write_text("")
    check_failure(bare.run(*mode, "host"), 255, "host key of host is not known here", "try: ssh -F", "in a terminal")
    host.sshd.stop()
    check_failure(bare.run(*mode, "host"), 255, "Connection refused", "is sshd running there")


def listed_tunnels(laptop: Laptop) -> List[Dict[str, Any]]:
    return [event for event in events_of(laptop.run("--json", "tunnels")) if event["event"] == "tunnel"]


def test_second_copy_says_that_it_is_up_whatever_started_the_first(laptop: Laptop, host: Host) -> None:
    port = str(quiet_port())
    cron = dict(laptop.environment, XDG_RUNTIME_DIR="", PATH="/usr/bin:/bin")
    first = laptop.start("--local-port", port, "host", has_terminal=False, **cron)
    url = first.url()
    first.expect("To end it")
    logins = host.sshd.logins()
    for arguments in (["--local-port", port, "host"], ["host"], ["-q", "--local-port", port, "host"]):
        second = laptop.run(*arguments)  # as from a terminal's login: it has an XDG_RUNTIME_DIR
        assert second.status == 0
        assert second.stdout == url + "\n"
        assert ("The tunnel is up already (pid %d)." % first.pid in second.stderr) == ("-q" not in arguments)
        assert "It does not answer" not in second.stderr
    added = laptop.run("-L", str(quiet_port()), "host")  # to the one record that there is
    assert "Forwarding" in added.stderr and len(listed_tunnels(laptop)) == 1, added.text
    assert host.sshd.logins() == logins
    other = laptop.run("--no-config", "--local-port", str(quiet_port()), "host", "list")
    assert other.status == 0


def test_second_copy_says_that_the_tunnel_does_not_answer(laptop: Laptop, host: Host) -> None:
    first = laptop.start("--local-port", str(quiet_port()), "host", has_terminal=False)
    first.expect("To end it")
    host.sshd.stop()
    host.sshd.end_connections()
    first.expect("is lost")
    second = laptop.run("host")
    assert (second.status, second.stdout) == (0, first.url() + "\n")
    assert re.search(r"up already \(pid %d\)\.\nIt does not answer: it is connecting again" % first.pid, second.stderr)


def test_cron_finds_the_records_of_a_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RJUPYTER_TMP", str(tmp_path))
    looked: List[str] = []

    def lstat(path: str) -> None:
        looked.append(path)
        raise FileNotFoundError

    monkeypatch.setattr(os, "lstat", lstat)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    assert rjupyter.tunnels() == []
    own = str(tmp_path / ("rjupyter-%d" % os.getuid()))
    assert looked == ["/run/user/%d/rjupyter" % os.getuid(), own]


@pytest.fixture
def installed(laptop: Laptop) -> Path:
    """rjupyter where the README puts it."""
    place = laptop.home / ".local/bin/rjupyter"
    place.parent.mkdir(parents=True)
    shutil.copy(SCRIPT, place)
    return place


def test_crontab_line(bare: Laptop, host: Host, installed: Path, mark: str) -> None:
    """The README's line, as cron runs it: by /bin/sh, without a terminal, its output a pipe that becomes a mail."""
    (host.home / "work").mkdir()
    schedule = r"(?m)^(?:[\d*/,-]+ +){5}(.*)$"
    line = re.findall(schedule, readme_block("*/10 * * * *"))[0]
    port = quiet_port()
    assert "8889" in line and "gpu1:work" in line
    line = line.replace("8889", str(port)).replace("gpu1:work", "-F %s host:work" % bare.config)

    def cron() -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            ["/bin/sh", "-c", line],
            env=bare.environment,
            cwd=bare.home,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            start_new_session=True,
        )

    def tunnel() -> int:
        words = "%s -q -f" % installed
        (pid,) = [pid for pid, argv in processes_with(mark, without=ON_HOST).items() if words in argv]
        return pid

    answer = cron()
    assert (answer.returncode, answer.stdout) == (0, "")
    first = tunnel()
    answer = cron()
    assert (answer.returncode, answer.stdout, tunnel()) == (0, "", first)
    os.kill(first, signal.SIGKILL)
    wait_until_gone(mark, "nothing of it is left", 20, without=ON_HOST)
    answer = cron()
    assert (answer.returncode, answer.stdout) == (0, "")
    assert tunnel() != first
    assert rjupyter.find_free_port(port) != port
    assert bare.run("host", "close").status == 0
    host.sshd.stop()
    answer = cron()
    assert answer.returncode == 255
    assert "Connection refused" in answer.stdout  # what cron mails


def check_command(words: List[str]) -> None:
    """A command that the README gives to a service manager is one that we take, and it asks for nothing."""
    args = rjupyter.Args(rjupyter.CommandLine(["--no-config", *words[1:]]))
    assert (args.host, args.local_port, args.background) == ("gpu1", 8889, False)


def test_systemd_unit(laptop: Laptop, installed: Path) -> None:
    text = readme_block("[Service]")
    unit = configparser.RawConfigParser()
    unit.optionxform = str  # type: ignore[assignment]
    unit.read_string(text)
    check_command(shlex.split(unit["Service"]["ExecStart"]))
    assert unit["Service"]["StandardOutput"] == "null"  # the address holds the token
    analyze = shutil.which("systemd-analyze")
    if analyze:
        file = laptop.home / "rjupyter-gpu1.service"
        file.write_text(text)
        environment = dict(laptop.environment, SYSTEMD_LOG_LEVEL="warning")
        argv = [analyze, "--user", "--man=no", "verify", str(file)]
        answer = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60)
        about_ours = [line for line in answer.stderr.splitlines() if "rjupyter" in line]
        assert not about_ours, about_ours


def test_background_tunnel_connects_again(laptop: Laptop, host: Host, mark: str) -> None:
    run = laptop.start("-f", "host", has_terminal=False)
    assert run.wait() == 0
    os.kill(ssh_of(mark), signal.SIGKILL)
    wait_until(lambda: not is_up(run.url()), "it is lost")
    wait_until(lambda: is_up(run.url()), "it is back")
    assert laptop.run("host", "close").status == 0


# -- what is asked ----------------------------------------------------------------------------------------------------


@pytest.fixture
def user(make_user: Callable[[str], User]) -> User:
    """A user who logs in by password alone."""
    user = make_user("/bin/bash")
    user.write(".profile", "PATH=%s:$PATH\n" % standin())
    subprocess.run(["chpasswd"], input="%s:correct horse\n" % user.name, text=True, check=True, capture_output=True)
    return user


PASSWORD_ONLY = "AuthenticationMethods password\nPasswordAuthentication yes"


def type_password(run: Run, count: int, password: str = "correct horse") -> None:
    run.expect("password:", times=count)
    run.type(password + "\n")


def test_password_is_asked_once_in_all(laptop: Laptop, make_host: Callable[..., Host], user: User) -> None:
    host = make_host(settings=PASSWORD_ONLY, user=user)
    run = laptop.start("--no-browser", "host")
    type_password(run, 1, "wrong")
    type_password(run, 2)
    url = run.url()
    run.expect("To end it")
    assert is_up(url)
    assert (run.text.count("password:"), host.sshd.logins()) == (2, 1)
    assert "correct horse" not in run.text
    assert run.text.count("Permission denied, please try again.") == 1


def test_connection_again_offers_one_login_and_asks_nobody_before(
    laptop: Laptop, make_host: Callable[..., Host], user: User
) -> None:
    host = make_host(settings=PASSWORD_ONLY, user=user)
    port = str(quiet_port())  # one that is taken meanwhile would cost another login
    run = laptop.start("--no-browser", "--local-port", port, "host")
    type_password(run, 1)
    run.expect("To end it")
    before = host.sshd.attempts()
    host.sshd.end_connections()
    run.expect(r"host needs a new login\. Press Enter to log in: $")
    assert (run.text.count("password:"), host.sshd.attempts() - before) == (1, 1)
    run.type("\n")
    run.expect("password:", times=2)
    time.sleep(1.5)  # a spinner comes after a second, and none must
    type_password(run, 2)
    run.expect("Connected to host again")
    # The question is not written over by a spinner.
    assert "Trying to reach" not in run.text.partition("log in again: ")[2]
    assert (run.text.count("Press Enter"), host.sshd.attempts() - before) == (1, 2)
    host.sshd.end_connections()
    run.expect("Press Enter", times=2)
    run.interrupt()
    assert run.wait(20) == 0
    assert "To come back" in run.text


def test_password_without_multiplexing(laptop: Laptop, make_host: Callable[..., Host], user: User) -> None:
    """Two steps, two questions; while the tunnel is held, none."""
    host = make_host(settings=PASSWORD_ONLY, user=user)
    port = str(quiet_port())  # one that is taken meanwhile would cost another login
    run = laptop.start("--no-mux", "--no-browser", "--local-port", port, "host")
    run.expect("password:")
    time.sleep(1.5)  # a spinner comes after a second, and none must
    type_password(run, 1)
    assert not re.search(r"[|/\\\u2800-\u28ff-] Launching", run.text)
    type_password(run, 2)
    run.expect("To end it")
    (record,) = host.servers()
    before = host.sshd.attempts()
    os.killpg(record["pid"], signal.SIGKILL)
    run.expect("needs a new login. Press Enter")
    assert run.text.count("password:") == 2
    assert host.sshd.attempts() > before
    run.interrupt()
    assert run.wait(20) == 0


@BOTH_MODES
def test_second_factor_is_asked_once_for_each_login(
    laptop: Laptop, make_host: Callable[..., Host], directory: Path, mode: List[str]
) -> None:
    """A key and then a code, by PAM."""
    check = directory / "check"
    check.write_text("#!/bin/sh\n[ \"$(tr -d '\\000')\" = 271828 ]\n")
    check.chmod(0o755)
    text = "auth required pam_echo.so Open your app for a code.\nauth required pam_exec.so quiet expose_authtok %s\n"
    text += "auth required pam_permit.so\naccount required pam_permit.so\nsession required pam_permit.so\n"
    settings = "AuthenticationMethods publickey,keyboard-interactive\nKbdInteractiveAuthentication yes"
    host = make_host()
    with asks_pam(host, text % check, settings):
        run = laptop.start(*mode, "--no-browser", "--local-port", str(quiet_port()), "host")
        logins = 2 if mode else 1
        for number in range(logins):
            run.expect(r"Open your app for a code\.\s+Password:", times=number + 1)
            run.type("271828\n")
        url = run.url()
        run.expect("To end it")
        assert is_up(url)
        assert (run.text.count("Password:"), host.sshd.logins()) == (logins, logins)


def test_askpass_program_of_the_user_is_asked_without_a_terminal(
    bare: Laptop, make_host: Callable[..., Host], user: User
) -> None:
    host = make_host(settings=PASSWORD_ONLY, user=user)
    askpass = program(bare.home / "askpass", "echo correct horse")
    asks = {"SSH_ASKPASS": str(askpass), "SSH_ASKPASS_REQUIRE": "force"}
    run = bare.start("host", has_terminal=False, **asks)
    run.expect("To end it")
    assert has_run(askpass) == 1
    host.sshd.end_connections()  # and nobody asks for it again
    assert run.wait() == 255
    assert "Permission denied" in run.stderr
    assert has_run(askpass) == 1


# -- ways to the host -------------------------------------------------------------------------------------------------


@pytest.fixture
def jump(make_host: Callable[..., Host]) -> Host:
    return make_host(name="jump")


@pytest.fixture
def behind(laptop: Laptop, jump: Host, make_host: Callable[..., Host]) -> Host:
    """A host, and in the same ssh_config a jump host."""
    host = make_host(settings="MaxStartups 100")
    host.sshd.config.write_text(host.sshd.config.read_text() + jump.sshd.config.read_text())
    return host


@pytest.mark.parametrize("arguments", [["-J", "jump"], ["-J", "jump", "--no-mux"], []], ids=["-J", "no-mux", "config"])
def test_jump_host(laptop: Laptop, behind: Host, jump: Host, arguments: List[str]) -> None:
    if not arguments:
        text = behind.sshd.config.read_text()
        behind.sshd.config.write_text(text.replace("Host host\n", "Host host\n  ProxyJump jump\n"))
    run = laptop.start(*arguments, "--local-port", str(quiet_port()), "host", has_terminal=False)
    assert is_up(run.url())
    assert jump.sshd.logins() == behind.sshd.logins() == (2 if "--no-mux" in arguments else 1)


def test_jump_host_asks_nobody_when_the_connection_is_made_again(laptop: Laptop, behind: Host, jump: Host) -> None:
    """BatchMode does not reach the ssh to the jump host; it must find no terminal."""
    text = behind.sshd.config.read_text().replace("StrictHostKeyChecking yes", "StrictHostKeyChecking ask")
    behind.sshd.config.write_text(text)
    askpass = program(laptop.home / "askpass", "echo yes")
    run = laptop.start("--no-browser", "-J", "jump", "host", SSH_ASKPASS=str(askpass), DISPLAY=":99")
    run.expect("To end it")
    (jump.sshd.directory / "known_hosts").write_text("")
    behind.sshd.end_connections()
    assert run.wait() == 255
    assert "Are you sure" not in run.text and not has_run(askpass)
    assert "the host key of host, or of a jump host before it, is not known here" in run.text


def test_include_and_match_exec(laptop: Laptop, host: Host, directory: Path) -> None:
    config = directory / "config"
    config.write_text('Include %s\nMatch exec "test %%h = near"\n  HostName nowhere.invalid\n' % host.sshd.config)
    laptop.config = str(config)
    assert laptop.run("host", "list").status == 0
    check_failure(laptop.run("near", "list"), 255, "nowhere.invalid")


# -- doctor -----------------------------------------------------------------------------------------------------------


def checks(run: Run) -> Dict[str, Dict[str, Any]]:
    found = events_of(run)
    assert all(set(check) == {"event", "check", "is_ok", "says", "remedy"} for check in found), run.text
    assert all(check["says"] and bool(check["remedy"]) != check["is_ok"] for check in found), run.text
    return {check["check"]: check for check in found}


NAMES = "ssh,runtime dir,browser,connection,login shell,noise,python,jupyter,disk,forwarding,others"


@BOTH_MODES
def test_doctor_where_all_is_well(laptop: Laptop, host: Host, mode: List[str]) -> None:
    (host.home / ".bashrc").write_text("true\n")
    run = laptop.run(*mode, "host", "doctor")
    assert run.status == 0, run.text
    lines = run.stdout.splitlines()
    assert all(re.match(r"ok    \w[\w ]{11} \S", line) for line in lines), run.stdout
    assert [line[6:18].strip() for line in lines if not line.startswith("ok    scheduler")] == NAMES.split(",")
    assert run.stderr in ("", "Looking around on the host...\n")  # the second, where that takes long
    assert host.servers() == []
    found = checks(laptop.run(*mode, "host", "doctor", "--json"))
    assert set(found) - {"scheduler"} == set(NAMES.split(","))
    assert "jupyter-notebook (PATH)" in found["jupyter"]["says"]


DOCTOR_CASES = [
    # sshd's settings, options, the check that is told, whether it is well, words of it
    ("AllowTcpForwarding no", [], "forwarding", False, "prohibited"),
    ("AllowTcpForwarding no", ["--no-mux"], "forwarding", False, "prohibited"),
    ("PermitOpen 127.0.0.1:1", [], "forwarding", False, "prohibited"),
    ("DisableForwarding yes", [], "forwarding", False, "prohibited"),
    ("AllowTcpForwarding local", [], "forwarding", True, "allowed"),
    ("MaxSessions 0", [], "command", False, "opens no session"),
    ("AuthenticationMethods password", [], "connection", False, "Permission denied"),
    ("AuthenticationMethods password", ["--no-mux"], "connection", False, "Permission denied"),
    ("ForceCommand echo out of order", [], "command", False, "out of order"),
]


@pytest.mark.parametrize(("settings", "options", "name", "is_ok", "words"), DOCTOR_CASES)
def test_doctor_names_what_is_wrong(
    laptop: Laptop,
    make_host: Callable[..., Host],
    settings: str,
    options: List[str],
    name: str,
    is_ok: bool,
    words: str,
) -> None:
    make_host(settings=settings)
    run = laptop.run(*options, "host", "doctor", "--json")
    found = checks(run)
    assert (found[name]["is_ok"], run.status) == (is_ok, 0 if is_ok else 1), run.text
    assert words in found[name]["says"], run.text
    assert [check["check"] for check in found.values() if not check["is_ok"]] == ([] if is_ok else [name])


def test_doctor_of_a_path_looks_into_its_project(laptop: Laptop, host: Host) -> None:
    """It says which Jupyter an open of that PATH would take, and which environment there has none."""
    project = host.home / "work/inner"
    project.mkdir(parents=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(host.home / "work/.venv")], check=True)
    run = laptop.run("host:work/inner", "doctor")
    assert run.status == 0, run.text
    assert "%s/work/.venv: no Jupyter in this environment" % host.home in run.stderr, run.text
    assert laptop.run("host", "doctor").stderr in ("", "Looking around on the host...\n")
    run = laptop.run("host:gone", "doctor")
    assert run.status == 1 and re.search("FAIL  jupyter .*no such directory", run.stdout), run.text


def test_readme_shows_what_doctor_prints() -> None:
    lines = readme_block("rjupyter gpu3 doctor").splitlines()
    shown = [line[6:18].strip() for line in lines if re.match("ok  |FAIL", line)]
    assert len(shown) > 2 and [name for name in NAMES.split(",") if name in shown] == shown


def test_doctor_shows_a_failure_with_its_remedy(laptop: Laptop, host: Host) -> None:
    host.sshd.stop()
    run = laptop.run("host", "doctor")
    assert run.status == 1
    assert re.search(r"^FAIL  connection   cannot connect to host: .*refused\n {19}try: ssh -F ", run.stdout, re.M)
    assert run.stdout.count("FAIL") == 1


def test_doctor_on_a_host_with_noise_and_without_jupyter(
    laptop: Laptop, make_host: Callable[..., Host], directory: Path
) -> None:
    host = make_host(path=bare_python(directory / "bin"))
    (host.home / ".bashrc").write_text("echo Welcome to the cluster\n")
    found = checks(laptop.run("host", "doctor", "--json"))
    assert found["noise"]["is_ok"] and "Welcome to the cluster" in found["noise"]["says"]
    assert found["jupyter"]["says"].startswith("none")
    assert not list(host.home.glob(".local/share/rjupyter/venv"))


def test_doctor_without_a_place_for_sockets(laptop: Laptop, host: Host, directory: Path) -> None:
    laptop.environment.update(nowhere(directory))
    run = laptop.run("host", "doctor", "--json")
    found = checks(run)
    assert (run.status, found["runtime dir"]["is_ok"]) == (1, False)
    assert "XDG_RUNTIME_DIR" in found["runtime dir"]["remedy"]
    assert found["forwarding"]["is_ok"]


def nowhere(directory: Path) -> Dict[str, str]:
    """Return an environment in which no directory can be made for a socket."""
    file = directory / "file"
    file.write_text("")
    return {"XDG_RUNTIME_DIR": str(file), "RJUPYTER_TMP": str(file)}


def test_unwritable_runtime_directory(laptop: Laptop, host: Host, directory: Path) -> None:
    laptop.environment.update(nowhere(directory))
    run = laptop.start("host", has_terminal=False)
    assert is_up(run.url())
    assert "No multiplexing (no place for the control socket" in run.stderr


# -- config -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def configure(laptop: Laptop) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        file = laptop.home / ".config/rjupyter/config"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    return write


def options_of(laptop: Laptop, *arguments: str) -> Dict[str, Any]:
    run = laptop.run(*arguments, "config", "--json")
    assert run.status == 0, run.text
    return {option["option"]: (option["value"], option["source"]) for option in events_of(run)}


def test_config_sections_are_host_patterns_and_the_first_value_holds(
    laptop: Laptop, configure: Callable[[str], Path]
) -> None:
    file = configure(
        "[gpu1 gpu2]\nlab\nport = 9000\ninit = module load anaconda\n  module load cuda\n"
        "[gpu* !gpu2]\nenv = torch\nport = 9100\n[*]\nidle-timeout = 12h\nno-browser = yes\nno-mux = no\n"
    )
    one = options_of(laptop, "ana@gpu1:work")
    first, second, last = ["[%s] %s" % (section, file) for section in ("gpu1 gpu2", "gpu* !gpu2", "*")]
    assert one["app"] == ("lab", first)
    assert one["port"] == (9000, first)
    assert one["init"] == (["module load anaconda", "module load cuda"], first)
    assert one["env"] == ("torch", second)
    assert (one["idle-timeout"], one["no-browser"], one["no-mux"]) == ((43200, last), (True, last), (False, last))
    assert one["socket"] == (False, "default")
    two = options_of(laptop, "gpu2")
    assert (two["env"], two["app"]) == ((None, "default"), ("lab", first))
    other = options_of(laptop, "ssh://cpu1:2222")
    assert (other["app"], other["idle-timeout"]) == (("", "default"), (43200, last))
    typed = options_of(laptop, "--port", "9000", "--app", "notebook", "--init", "true", "gpu1")
    assert (typed["port"], typed["app"]) == ((9000, "command line"), ("notebook", "command line"))
    assert typed["init"] == (["true"], "command line")
    python = options_of(laptop, "--python", "/opt/py/bin/python", "gpu9")
    assert (python["env"], python["python"][1]) == ((None, "default"), "command line")
    assert options_of(laptop, "--browser", "firefox", "gpu1")["no-browser"] == (False, "default")
    assert options_of(laptop, "--no-config", "gpu1")["port"] == (0, "default")


def test_config_holds_for_an_open(laptop: Laptop, host: Host, configure: Callable[[str], Path]) -> None:
    port = quiet_port()
    configure("[host]\nlab\nlocal-port = %d\nserver-arg = --ServerApp.quit_button=False\n" % port)
    run = laptop.start("host", has_terminal=False)
    assert run.url().startswith("http://127.0.0.1:%d/lab" % port)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[*]\nport = many\n", ["[*], port: ", "a port is a number"]),
        ("[gpu1]\nprot = 1\n", ["[gpu1], prot: ", "there is no option --prot"]),
        ("[*]\nlab = perhaps\n", ["[*], lab: ", "yes or no, not 'perhaps'"]),
        ("[*]\nhelp = yes\n", ["[*], help: "]),
        ("port = 1\n", ["no section headers"]),
        ("[*]\nport = 1\nport = 2\n", ["'port'", "already exists"]),
    ],
)
def test_config_that_is_wrong(laptop: Laptop, configure: Callable[[str], Path], text: str, words: List[str]) -> None:
    file = configure(text)
    is_first = words[0].startswith("[*], port")
    for action in (["list"], ["config"], []) if is_first else ([],):
        run = laptop.run("gpu1", *action)
        check_failure(run, 2, "configuration", str(file), *words)
        assert run.stderr.count("rjupyter: ") == 1
    assert not is_first or laptop.run("--no-config", "gpu1", "config").status == 0


def test_readme_config(laptop: Laptop, configure: Callable[[str], Path]) -> None:
    """The README's file, and what `config` prints for it."""
    file = configure(readme_block("idle-timeout = 12h"))
    rows = [re.split(" {2,}", line) for line in laptop.run("gpu1", "config").stdout.splitlines()]
    of_file = {name: value for name, value, source in rows if source == "[gpu*] %s" % file}
    assert of_file == {"app": "lab", "idle-timeout": "43200", "init": "module load anaconda module load cuda"}


# -- output -----------------------------------------------------------------------------------------------------------


def test_help_knows_every_event_of_the_program() -> None:
    code = SCRIPT.read_text()
    named = re.findall(r'messages\.(?:step|result)\([^\n]*?, "(\w+)"[,)]', code)
    assert len(named) > 20
    assert set(named) - {"row", "result"} <= set(help_events())  # these two are never printed with --json


def events_of_kernels(laptop: Laptop, host: Host, url: str) -> List[Dict[str, Any]]:
    """Return what is printed of a notebook's kernel; in its journal, a gap."""
    write_notebook(host.home / "n.ipynb", "print(1)")
    compute(url, "print(1)", new_session(url, "n.ipynb"))
    seen = events_of(laptop.run("--json", "-q", "host", "eval", "-k", "n.ipynb", "print(1)"))
    (journal,) = host.home.glob(".local/state/rjupyter/servers/*/cells/*.journal")
    with open(journal, "a") as stream:
        stream.write('{"kind": "gap", "time": 1, "why": "a test"}\n')
    for words in (["output"], ["output", "--save"], ["list", "--kernels"], ["wait"], ["stop", "n.ipynb"]):
        seen += events_of(laptop.run("--json", "-q", "host", *words))
    return seen


@pytest.mark.waits
@pytest.mark.jupyter
def test_json_events_are_the_ones_of_the_help(
    laptop: Laptop, make_host: Callable[..., Host], directory: Path, mark: str
) -> None:
    """One session with all that can happen in it, its Jupyter installed by a stub of uv."""
    uv = Path(bare_python(directory / "bin")) / "uv"
    venv = jupyter_for_everyone().parent
    uv.write_text('#!/bin/sh\n[ "$1" = pip ] || exec ln -s %s "$HOME/.local/share/rjupyter/venv"\n' % venv)
    uv.chmod(0o755)
    host = make_host(path=str(uv.parent))
    seen = []
    run = laptop.start("--json", "-q", "host", has_terminal=False)
    run.expect('"open"')
    os.kill(ssh_of(mark), signal.SIGKILL)
    run.expect('"reconnected"')
    (record,) = host.servers()
    os.kill(record["pid"], signal.SIGSTOP)
    run.expect('"silent"')
    os.kill(record["pid"], signal.SIGCONT)
    run.expect('"answering"')
    for arguments in (["host"], ["host", "list"], ["host", "logs"], ["host", "doctor"], ["host", "config"]):
        other = laptop.run("--json", "-q", *arguments)
        assert (other.status, other.stderr) == (0, ""), other.text
        seen += events_of(other)
    run.interrupt()
    assert run.wait() == 0
    assert run.stderr == ""
    seen += events_of(run)
    for arguments in (["host", "stop"], ["host", "logs", "zzzz"]):
        seen += events_of(laptop.run("--json", "-q", *arguments))
    back = laptop.start("--json", "-q", "host", has_terminal=False)
    back.expect('"open"')
    back.interrupt()
    back.wait()
    found = laptop.start("--json", "-q", "host", has_terminal=False)
    found.expect('"open"')
    seen += events_of(found)
    url = next(event["url"] for event in events_of(found) if event["event"] == "open")
    seen += events_of_kernels(laptop, host, url)
    image = "from IPython.display import Image; Image(data=b'it has no pixels', format='png')"
    seen += events_of(laptop.run("--json", "-q", "host", "eval", "--save-images", "images", image))
    write_notebook(laptop.home / "a.ipynb", "import os, time\nwhile not os.path.exists('go'): time.sleep(0.05)")
    first = laptop.start("--json", "-q", "host", "execute", "a.ipynb", has_terminal=False)
    first.expect('"started"')
    seen += events_of(laptop.run("--json", "-q", "host", "execute", "a.ipynb"))
    (host.home / "go").write_text("")
    assert first.wait() == 0
    seen += events_of(first) + events_of(laptop.run("--json", "-q", "host", "list"))
    waiting = "import os, time\nopen('out.txt', 'w').close()\nwhile not os.path.exists('on'): time.sleep(0.05)"
    write_notebook(laptop.home / "b.ipynb", waiting)
    words = ["execute", "b.ipynb", "--grid", "a=[1]", "--bring", "out.txt"]
    grid = laptop.start("--json", "-q", "host", *words, has_terminal=False)
    grid.expect('"started"')
    seen += events_of(laptop.run("--json", "-q", "host", "list"))
    (host.home / "on").write_text("")
    assert grid.wait() == 0, grid.text
    seen += events_of(grid)
    last = laptop.start("--json", "-q", "host", has_terminal=False)
    last.expect('"open"')
    seen += events_of(laptop.run("--json", "-q")) + events_of(laptop.run("--json", "host,nowhere.invalid", "list"))
    last.interrupt()
    last.wait()
    found.interrupt()  # another open would take its connection, which ends with its server
    found.wait()
    starting = laptop.start("--wrap", "sh -c 'sleep 1000' --", "host:.local", has_terminal=False)
    wait_until(lambda: list(host.home.glob(".local/state/rjupyter/wrappers/*/log")), "it starts")
    seen += events_of(laptop.run("--json", "-q", "host", "list"))
    laptop.run("host", "stop", "--all", "--yes")
    starting.wait()
    keys = {event["event"]: [key for key in event if key != "event"] for event in seen}
    of_clusters = {"job", "queue", "ending"}  # see test_slurm.py
    assert keys == {name: keys for name, keys in help_events().items() if name not in of_clusters}


def test_quiet(laptop: Laptop, host: Host) -> None:
    with laptop.opened("-q", "--no-browser", "host", has_terminal=True) as run:
        url = run.url()
    assert run.text.replace("^C", "").strip() == url
    failed = laptop.run("-q", "host:nowhere")
    check_failure(failed, 1, "no such directory")


def test_verbose_prints_commands_that_can_be_pasted(laptop: Laptop, host: Host) -> None:
    run = laptop.run("-v", "host", "list")
    assert run.status == 0
    commands = [line[2:] for line in run.stderr.splitlines() if line.startswith("+ ")]
    assert len(commands) == 2
    session = shlex.split(commands[-1])
    assert session[0] == "ssh" and session[-2] == "host"
    # The last word is the remote command, whole: it runs anywhere, and waits for the agent.
    argv = ["/bin/sh", "-c", session[-1]]
    assert subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=60).returncode == 0
