"""Any login shell, and what start-up files do: real users with real shells, whose Jupyter only their terminal finds."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any, Callable, Dict, NamedTuple

import pytest
from client import api, check_failure, compute
from jupyters import jupyter_for_everyone, standin
from sides import Host, Laptop, User, processes_with

DECOY_REPLY = 'rjupyter-0011223344556677 {"kind": "reply", "reply": {"id": "dead", "port": 1, "token": "decoy"}}'
DECOY_TOKEN = "    http://127.0.0.1:1/tree?token=decoy"
# Every shell takes these lines as they are: bytes on stdout and on stderr, a decoy reply, a decoy token line.
NOISE = "/bin/echo Welcome\n/bin/sh -c 'echo Careful >&2'\n/bin/echo '%s'\n/bin/echo '%s'\n" % (
    DECOY_REPLY,
    DECOY_TOKEN,
)


class Shell(NamedTuple):
    """A login shell, and what a user of it writes where; %s stands for the directory of Jupyter."""

    program: str
    files: Dict[str, str]


PROFILE = {".profile": NOISE + "PATH=%s:$PATH; export PATH\n"}
CSHRC = {".cshrc": NOISE + "if ($?prompt) setenv PATH %s:$PATH\n"}
SHELLS = {
    "sh": Shell("/bin/sh", PROFILE),
    "dash": Shell("/bin/dash", PROFILE),
    "ksh": Shell("/bin/ksh", PROFILE),
    "busybox ash": Shell("ash", PROFILE),
    "bash": Shell(
        "/bin/bash",
        {
            ".profile": ". ~/.bashrc\n",
            ".bashrc": NOISE + "case $- in *i*) ;; *) return ;; esac\nexport PATH=%s:$PATH\n",
        },
    ),
    "zsh": Shell("/bin/zsh", {".zshenv": NOISE, ".zshrc": "path=(%s $path)\n"}),
    "fish": Shell(
        "/usr/bin/fish",
        {".config/fish/config.fish": NOISE + "if status is-interactive\n  set -gx PATH %s $PATH\nend\n"},
    ),
    "tcsh": Shell("/bin/tcsh", CSHRC),
    "csh": Shell("/bin/csh", CSHRC),
}


@pytest.fixture
def make_shell_host(
    make_user: Callable[[str], User], make_host: Callable[..., Host], directory: Path
) -> Callable[..., Host]:
    """Makes a host whose user has the given shell and start-up files; Jupyter is real, or is not."""

    def make(shell: str, files: Dict[str, str], is_real: bool = False, **options: Any) -> Host:
        program = shell if os.path.isabs(shell) else str(directory / shell)
        if os.path.isabs(shell) and not os.path.exists(shell):
            pytest.skip("this machine has no " + shell)
        if shell == "ash":
            os.symlink("/bin/busybox", program)
        user = make_user(program)
        for name, text in files.items():
            user.write(name, text.replace("%s", str(jupyter_for_everyone() if is_real else standin())))
        return make_host(user=user, **options)

    return make


def check_open(laptop: Laptop, host: Host, *arguments: str, is_real: bool = False) -> str:
    """Open, look at what runs as that user, or compute in its kernel, and return what was said on the way."""
    run = laptop.start(*arguments, "host", has_terminal=False)
    url = run.url()
    assert "decoy" not in url
    assert host.sshd.logins() == 1
    (record,) = host.servers()
    process = Path("/proc/%d" % record["pid"])
    assert (process.owner(), os.readlink(process / "cwd")) == (host.sshd.user, str(host.home))
    if not is_real:
        assert api(url, "status")
        return run.stderr
    code = "import os, pwd, sys; print(pwd.getpwuid(os.getuid()).pw_name, os.getcwd(), sys.prefix)"
    assert compute(url, code).split() == [host.sshd.user, str(host.home), str(jupyter_for_everyone().parent)]
    return run.stderr


@pytest.mark.parametrize("name", SHELLS)
def test_login_shell_that_prints_and_hides_jupyter(
    laptop: Laptop, make_shell_host: Callable[..., Host], name: str
) -> None:
    is_real = name == "bash"  # the others have the stand-in, which is there sooner
    host = make_shell_host(*SHELLS[name], is_real=is_real)
    said = check_open(laptop, host, is_real=is_real)
    where = jupyter_for_everyone() if is_real else standin()
    assert "Using %s/jupyter-notebook (the login shell's PATH)." % where in said
    assert "Welcome" not in said and "decoy" not in said  # noise is for -v


@pytest.mark.parametrize("name", SHELLS)
def test_init_in_the_users_own_shell(laptop: Laptop, make_shell_host: Callable[..., Host], name: str) -> None:
    """`module` in a login shell is a function or an alias; here it is one that puts Jupyter on PATH."""
    shell, _ = SHELLS[name]
    own_words = {
        "bash": {".profile": "module() { export PATH=%s:$PATH; }\n"},
        "zsh": {".zprofile": "module() { path=(%s $path) }\n"},
        "fish": {".config/fish/config.fish": "function module; set -gx PATH %s $PATH; end\n"},
        "tcsh": {".login": "alias module 'setenv PATH %s:$PATH; /bin/true \\!*'\n"},
        "csh": {".login": "alias module 'setenv PATH %s:$PATH; /bin/true \\!*'\n"},
    }.get(name, {".profile": "module() { PATH=%s:$PATH; export PATH; }\n"})
    host = make_shell_host(shell, own_words)
    said = check_open(laptop, host, "--init", "module load 'anaconda 3'")
    assert "(PATH after --init)" in said


EXPORT = "export PATH=%s:$PATH\n"
EXPORT_WHEN_INTERACTIVE = "case $- in *i*) export PATH=%s:$PATH ;; esac\n"
START_UPS = {
    "execs fish when interactive": EXPORT_WHEN_INTERACTIVE + "case $- in *i*) exec fish ;; esac\n",
    "execs fish always": EXPORT + "exec fish\n",
    "execs zsh always": EXPORT + "exec zsh\n",
    "execs tcsh always": EXPORT + "exec tcsh\n",
    "reads a line": EXPORT + "read answer\nread another\n",
    "reads a line when interactive": EXPORT_WHEN_INTERACTIVE + "case $- in *i*) read answer ;; esac\n",
    "leaves a process that holds stdout": EXPORT_WHEN_INTERACTIVE + "sleep 1000 &\n",
}


@pytest.mark.parametrize("what", START_UPS)
def test_start_up_file_that(laptop: Laptop, make_shell_host: Callable[..., Host], mark: str, what: str) -> None:
    files = {".bashrc": START_UPS[what], ".profile": ". ~/.bashrc\n"}
    host = make_shell_host("/bin/bash", files)
    check_open(laptop, host)
    for pid, words in processes_with(mark).items():
        if words == "sleep 1000":
            os.kill(pid, signal.SIGKILL)


def test_start_up_file_that_never_ends_is_given_up(laptop: Laptop, make_shell_host: Callable[..., Host]) -> None:
    files = {".profile": "case $- in *i*) while :; do sleep 1; done ;; esac\n"}
    host = make_shell_host("/bin/bash", files)
    user_bin = host.home / ".local/bin"
    user_bin.mkdir(parents=True)
    (user_bin / "jupyter-notebook").symlink_to(standin() / "jupyter-notebook")
    for path in (host.home / ".local", user_bin):
        shutil.chown(path, host.sshd.user)
    said = check_open(laptop, host, "-v")
    assert "looked at the environment of /bin/bash: no answer within 10 s" in said
    assert "(the usual places)" in said


def test_start_up_file_that_leaves_is_named(laptop: Laptop, make_shell_host: Callable[..., Host]) -> None:
    make_shell_host("/bin/bash", {".bashrc": "echo Goodbye\nexit 3\n"})
    check_failure(laptop.run("host"), 1, "the agent did not run on host", "Goodbye", "~/.bashrc", "try: ssh")


def test_init_that_fails_is_named(laptop: Laptop, make_shell_host: Callable[..., Host]) -> None:
    make_shell_host("/bin/bash", {})
    run = laptop.run("--init", "module load nothing", "host")
    check_failure(run, 1, "--init failed on the host", "module load nothing", "module: command not found")
