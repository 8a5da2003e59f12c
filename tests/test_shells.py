"""Any login shell, and what start-up files do: real users with real shells, whose Jupyter only their terminal finds."""

import os
import pwd
import re
import shutil
import signal
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, NamedTuple, Tuple

import pytest
from client import api, check_failure, compute, listed
from execution import code, printed, write_notebook
from jupyters import jupyter_for_everyone, standin, standin_environment, standin_wheels
from sides import Host, Laptop, User, bare_python, processes_with, wait_until

import rjupyter

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
            where = str(jupyter_for_everyone() if is_real else standin())
            user.write(name.replace("%n", user.name), text.replace("%s", where))
        return make_host(user=user, **options)

    return make


def asked_as_owner(process: Path, command: str, name: str) -> str:
    """Return what a command says of a file of /proc/PID, as the process's owner: in a container, root may not look."""
    owner = pwd.getpwnam(process.owner())
    who: Dict[str, Any] = {"user": owner.pw_uid, "group": owner.pw_gid}
    return str(subprocess.run([command, str(process / name)], capture_output=True, text=True, check=True, **who).stdout)


def check_open(laptop: Laptop, host: Host, *arguments: str, is_real: bool = False) -> str:
    """Open, look at what runs as that user, or compute in its kernel, and return what was said on the way."""
    run = laptop.start(*arguments, "host", has_terminal=False)
    url = run.url()
    assert "decoy" not in url
    assert host.sshd.logins() == 1
    (record,) = host.servers()
    process = Path("/proc/%d" % record["pid"])
    said = asked_as_owner(process, "readlink", "cwd")
    assert (process.owner(), said) == (host.sshd.user, "%s\n" % host.home)
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


def test_start_up_file_that_never_ends_is_given_up(
    laptop: Laptop, make_shell_host: Callable[..., Host], mark: str
) -> None:
    """It is said, and nothing of it is left, not even in a process group of its own."""
    files = {
        ".profile": "export HF_HOME=/data/hf\n"
        "case $- in *i*) set -m; sleep 1000 & set +m; while :; do sleep 1; done ;; esac\nexport LICENCE=7\n"
    }
    host = make_shell_host("/bin/bash", files)
    user_bin = host.home / ".local/bin"
    user_bin.mkdir(parents=True)
    (user_bin / "jupyter-notebook").symlink_to(standin() / "jupyter-notebook")
    for path in (host.home / ".local", user_bin):
        shutil.chown(path, host.sshd.user)
    said = check_open(laptop, host, "-v")
    assert "looked at the environment of /bin/bash: no answer within 10 s" in said
    assert "The environment is that of /bin/bash as a login shell (" in said
    assert "(the usual places)" in said
    told = [line for line in said.splitlines() if line.startswith("The start-up files of /bin/bash")]
    assert len(told) == 1 and "sleep 1" in told[0] and "going on without them" in told[0], said
    assert not [words for words in processes_with(mark).values() if words.startswith("sleep")]
    assert set(VARIABLES) - set(environment_there(host)) == {"HTTPS_PROXY"}


def test_start_up_file_that_leaves_is_named(laptop: Laptop, make_shell_host: Callable[..., Host]) -> None:
    make_shell_host("/bin/bash", {".bashrc": "echo Goodbye\nexit 3\n"})
    check_failure(laptop.run("host"), 1, "the agent did not run on host", "Goodbye", "~/.bashrc", "try: ssh")


def test_init_that_fails_is_named(laptop: Laptop, make_shell_host: Callable[..., Host]) -> None:
    make_shell_host("/bin/bash", {})
    run = laptop.run("--init", "module load nothing", "host")
    check_failure(run, 1, "--init failed on the host", "module load nothing", "module: command not found")


# -- the environment of the terminal ----------------------------------------------------------------------------------

VARIABLES = {"HF_HOME": "/data/hf", "LICENCE": "7", "HTTPS_PROXY": "http://127.0.0.1:9"}
EXPORTS = "".join("export %s=%s\n" % pair for pair in VARIABLES.items())
RAN = "echo ran >>~/ran\n"
MULTIPLEXERS = ("TMUX", "STY", "ZELLIJ", "ABDUCO_SESSION", "TERM_PROGRAM")


def environment_there(host: Host) -> Dict[str, str]:
    """Return the environment of the only server there."""
    (record,) = host.servers()
    entries = asked_as_owner(Path("/proc/%d" % record["pid"]), "cat", "environ").split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def given(found: Dict[str, str]) -> Dict[str, str]:
    """Return what is there of VARIABLES."""
    return {name: found[name] for name in VARIABLES if name in found}


def put(program: Path, target: Path) -> None:
    program.parent.mkdir(parents=True, exist_ok=True)
    program.symlink_to(target)


# Where Jupyter is, below home; how it is found there, and what is typed.
WAYS: Dict[str, Tuple[str, List[str]]] = {
    "of_ssh/jupyter-notebook": ("(PATH)", ["host"]),
    "of_shell/jupyter-notebook": ("(the login shell's PATH)", ["host"]),
    "work/.venv": ("(the project's environment)", ["host:work"]),
    "miniconda3": ("(the usual places)", ["host"]),
    "miniforge3/envs/ml": ("(--env ml)", ["--env", "ml", "host"]),
    "e": ("(--python)", ["--python", "~/e/bin/python", "host"]),
    ".local/share/rjupyter/venv": ("(our own environment)", ["host"]),
}


def test_terminal_sets_up_the_server_in_each_way_in_which_jupyter_is_found(
    laptop: Laptop, make_host: Callable[..., Host], directory: Path
) -> None:
    """Once for a start; and who comes back to a server does not look."""
    host = make_host(path=bare_python(directory / "bin"), front=str(directory / "host/home/of_ssh"))
    (host.home / "work").mkdir()
    (host.home / ".profile").write_text(EXPORTS + RAN + "PATH=$HOME/of_shell:$PATH\n")
    for place, (where, arguments) in WAYS.items():
        found = host.home / place
        put(found, standin() / "jupyter-notebook" if "of_" in place else standin_environment())
        with laptop.opened("--no-install", "-v", *arguments) as run:
            assert where in run.stderr and "as an interactive login shell (" in run.stderr, (place, run.text)
            assert given(environment_there(host)) == VARIABLES, place
        with laptop.opened(*arguments) as run:
            assert "Found" in run.stderr, (place, run.text)
        assert (host.home / "ran").read_text() == "ran\n", place
        assert laptop.run("host", "stop", "--all").status == 0
        (host.home / "ran").unlink()
        found.unlink()


def test_terminal_sets_up_what_runs_in_a_wrapper_and_a_home_of_its_own(
    laptop: Laptop, make_host: Callable[..., Host]
) -> None:
    """What we keep stays in the home of the session, where the next one finds it."""
    host = make_host(path=str(standin(has_python=True)))
    (host.home / ".profile").write_text(EXPORTS + "mkdir -p ~/other; export HOME=$HOME/other\n")
    for wrap, home in ((["--wrap", "env NICE=1"], ""), ([], "other")):
        with laptop.opened(*wrap, "host"):
            there = environment_there(host)
            assert given(there) == VARIABLES and there["HOME"] == str(host.home / home), there
        with laptop.opened("host") as run:
            assert "Found" in run.stderr, run.text
        assert laptop.run("host", "stop", "--all").status == 0


@pytest.mark.nbclient
def test_terminal_sets_up_an_execution(laptop: Laptop, host: Host) -> None:
    """Jupyter is on ssh's PATH, where nothing of a terminal was looked up before."""
    (host.home / ".profile").write_text(EXPORTS)
    source = "import os; print([os.environ.get(name) for name in %r])" % list(VARIABLES)
    write_notebook(laptop.home / "n.ipynb", code(source))
    run = laptop.run("host", "execute", "n.ipynb")
    assert run.status == 0 and printed(laptop.home / "n.executed.ipynb") == ["%s\n" % list(VARIABLES.values())], (
        run.text
    )


# In the words of each shell: the guards that start a multiplexer, a question of a prompt theme, a PATH with a tilde
# that was quoted, and what is exported behind all that. `tmux` and its like would stay.
DOTFILES = {
    "bash": (
        ".bashrc",
        'case $- in *i*) ;; *) return ;; esac\n[ -z "$TMUX" ] && exec tmux new -A -s main\n'
        "case $TERM in screen*|tmux*) ;; *) exec screen -R ;; esac\n"
        'read -p "Update? [y/N] " -n 1 answer\nexport PATH="~/bin:$PATH"\nexport HF_HOME=/data/hf LICENCE=7\n',
    ),
    "zsh": (
        ".zshrc",
        "if [[ -z $ZELLIJ ]]; then zellij attach -c; exit; fi\n[[ -z $STY ]] && exec screen\n"
        "[[ $TERM_PROGRAM != tmux ]] && exec tmux\n"
        'read -q "?[oh-my-zsh] Would you like to update? [Y/n] "\nexport PATH="~/bin:$PATH"\n'
        "export HF_HOME=/data/hf LICENCE=7\n(sleep 1000 &)\n",
    ),
    "fish": (
        ".config/fish/config.fish",
        "if status is-interactive\n  if not set -q ZELLIJ\n    exec zellij\n  end\n  set -q TMUX; or exec tmux\n"
        "  read --prompt-str 'Update? ' answer\n  set -gx PATH '~/bin' $PATH\nend\n"
        "set -gx HF_HOME /data/hf\nset -gx LICENCE 7\n",
    ),
    "tcsh": (
        ".tcshrc",
        "if ($?prompt && ! $?TMUX) exec tmux\nif ($?prompt && ! $?ABDUCO_SESSION) exec abduco -A main\n"
        "if ($?prompt) set answer = \"$<\"\nsetenv PATH '~/bin':${PATH}\nsetenv HF_HOME /data/hf\nsetenv LICENCE 7\n",
    ),
}


@pytest.mark.parametrize("name", DOTFILES)
def test_start_up_file_that_would_run_a_multiplexer_or_asks_sets_up_the_server(
    laptop: Laptop, make_shell_host: Callable[..., Host], directory: Path, mark: str, name: str
) -> None:
    """Which is in no multiplexer itself. Jupyter is in ~/bin, which only PATH as bash reads it leads to."""
    file, text = DOTFILES[name]
    stay = directory / "stay"
    for program in ("tmux", "screen", "zellij", "abduco"):
        stay.mkdir(exist_ok=True)
        (stay / program).write_text("#!/bin/sh\necho $0 >>%s/started\nexec sleep 1000\n" % directory)
        (stay / program).chmod(0o755)
    directory.chmod(0o777)
    before = {".profile": ". ~/.bashrc\n"} if name == "bash" else {}
    path = "%s:/usr/local/bin:/usr/bin:/bin" % stay
    host = make_shell_host(SHELLS[name].program, dict(before, **{file: text}), PATH=path)
    put(host.home / "bin", standin())
    said = check_open(laptop, host, "-v")
    assert "Using %s/bin/jupyter-notebook (" % host.home in said
    there = environment_there(host)
    assert (there["HF_HOME"], there["LICENCE"]) == ("/data/hf", "7")
    assert not [variable for variable in MULTIPLEXERS if variable in there] and there.get("TERM") != "screen", there
    assert "%s/bin" % host.home in there["PATH"].split(":") and "~" not in there["PATH"]
    assert not (directory / "started").exists()
    wait_until(lambda: "sleep 1000" not in processes_with(mark).values(), "what a start-up file left is gone", 10)


def test_start_up_files_that_leave_or_print_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that leave are told of, once; an environment that comes on stderr is taken, and no value of it is said."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SHELL", "/bin/bash")
    monkeypatch.setattr(rjupyter, "of_terminal", None)
    told: List[str] = []
    channel: Any = SimpleNamespace(tell=lambda kind, text: told.append(text), progress=lambda text: None)
    for name in (".bash_profile", ".bashrc"):
        (tmp_path / name).write_text("exit\n")
    rjupyter.enter_terminal(rjupyter.Request(), channel, [])
    assert told == ["The start-up files of /bin/bash exit before any command; going on without them."]
    monkeypatch.setattr(rjupyter, "of_terminal", None)
    with pytest.raises(rjupyter.Failure, match="--init failed"):  # where that is what fails, they are not blamed
        rjupyter.enter_terminal(rjupyter.Request(init=["false"]), channel, [])
    assert len(told) == 1
    (tmp_path / ".bash_profile").write_text("exec 1>&2\necho hello\nexport LICENCE=s3cret\n")
    found, said = rjupyter.shell_environment("/bin/bash", [], is_interactive=True)
    assert found["LICENCE"] == "s3cret" and "hello" in said and "s3cret" not in said


class Machine(NamedTuple):
    """A kind of machine: the dotfiles of a new user there, and what they set in a terminal. A ~ there is home."""

    shell: str
    files: Dict[str, str]
    there: Dict[str, str]


OF_ROOT = "if [ -f ~/.bashrc ]; then . ~/.bashrc; fi\nmesg n 2>/dev/null || true\n"
OF_RENTED = (
    'export RUNPOD_POD_ID="p0d"\nexport PATH="$HOME/bin:/usr/bin:/bin"\nexport HF_HOME="/workspace/hf"\n'
    'export CUDA_VISIBLE_DEVICES="0,1"\n'
)
RENTED = {"RUNPOD_POD_ID": "p0d", "HF_HOME": "/workspace/hf", "CUDA_VISIBLE_DEVICES": "0,1"}
AUTO_TMUX = "tmux attach-session -t ssh_tmux || tmux new-session -s ssh_tmux; exit"
MACHINES = {
    "debian": Machine(
        "/bin/bash",
        {
            ".profile": 'if [ -n "$BASH_VERSION" ]; then\n  if [ -f "$HOME/.bashrc" ]; then . "$HOME/.bashrc"; fi\nfi\n'
            'if [ -d "$HOME/bin" ]; then PATH="$HOME/bin:$PATH"; fi\n',
            ".bashrc": "case $- in\n  *i*) ;;\n  *) return ;;\nesac\nHISTCONTROL=ignoreboth\nshopt -s checkwinsize\n"
            "alias ls='ls --color=auto'\nexport HF_HOME=~/hf\n",
        },
        {"HF_HOME": "~/hf"},
    ),
    "fedora": Machine(
        "/bin/bash",
        {
            ".bash_profile": "if [ -f ~/.bashrc ]; then . ~/.bashrc; fi\n",
            ".bashrc": "if [ -f /etc/bashrc ]; then . /etc/bashrc; fi\n"
            'if ! [[ "$PATH" =~ "$HOME/.local/bin:$HOME/bin:" ]]; then PATH="$HOME/.local/bin:$HOME/bin:$PATH"; fi\n'
            'export PATH\nfor rc in ~/.bashrc.d/*; do if [ -f "$rc" ]; then . "$rc"; fi; done\nunset rc\n',
            ".bashrc.d/data": "export HF_HOME=~/hf\n",
            ".bashrc.d/licence": "export LICENCE='27000@licences  of us'\n",
        },
        {"HF_HOME": "~/hf", "LICENCE": "27000@licences  of us"},
    ),
    "oh-my-zsh": Machine(
        "/bin/zsh",
        {
            ".zshrc": "cache=${XDG_CACHE_HOME:-$HOME/.cache}/p10k-instant-prompt-${(%):-%n}.zsh\n"
            "[[ -r $cache ]] && source $cache\nexport PATH=$HOME/bin:$PATH\nexport ZSH=$HOME/.oh-my-zsh\n"
            "source $ZSH/oh-my-zsh.sh\nexport HF_HOME=~/hf\n",
            ".cache/p10k-instant-prompt-%n.zsh": "touch ~/cached\n"
            "[[ -t 0 && -t 1 && -t 2 && -o interactive && -o zle ]] && (( ! $+ZSH_EXECUTION_STRING )) || return 0\n"
            "exec 3>&1 4>&2 </dev/null >/dev/null 2>&1\nprecmd() { exec >&3 2>&4 }\n",
            ".oh-my-zsh/oh-my-zsh.sh": "while read -t -k 1 answer; do true; done\n"
            "echo -n 'Update it now? [Y/n] '\nread -r -k 1 answer\n"
            "case $answer in [yY$'\\n']) touch ~/updated ;; esac\nexport THEME=p10k\n"
            "if [[ -t 0 && -t 1 ]]; then read -k 'answer?Does this look like a diamond? '; fi\n",
        },
        {"HF_HOME": "~/hf", "ZSH": "~/.oh-my-zsh", "THEME": "p10k"},
    ),
    "cluster": Machine(
        "/bin/bash",
        {
            ".bash_profile": "cat ~/motd\n. ~/lmod/init\nmodule load cuda python/3.11\n",
            "motd": DECOY_REPLY + '\nMaintenance on Monday: it\'s "all" of $HOME\n',
            "lmod/init": 'export LMOD_CMD=~/lmod/lmod\nmodule() { eval "$(sh $LMOD_CMD "$@")"; }\nexport -f module\n',
            "lmod/lmod": 'shift\nfor name; do\n  echo "Loading $name" >&2\n  case $name in\n'
            "    cuda) echo 'export CUDA_HOME=~/cuda LD_LIBRARY_PATH=~/cuda/lib64:$LD_LIBRARY_PATH;' ;;\n"
            "    python/*) echo 'export PATH=~/bin:$PATH;' ;;\n  esac\n"
            "  echo 'export LOADEDMODULES=$LOADEDMODULES:'$name';'\ndone\n",
        },
        {
            "CUDA_HOME": "~/cuda",
            "LD_LIBRARY_PATH": "~/cuda/lib64:",
            "LOADEDMODULES": ":cuda:python/3.11",
            "BASH_FUNC_module%%": '() {  eval "$(sh $LMOD_CMD "$@")"\n}',
        },
    ),
    "rental GPU": Machine(
        "/bin/bash",
        {
            ".profile": OF_ROOT,
            ".bashrc": '[ -z "$PS1" ] && return\nif [ -d ~/workspace ]; then cd ~/workspace; fi\n'
            'if [[ -z "$TMUX" ]]; then %s; fi\nsource ~/etc/rp_environment\n' % AUTO_TMUX,
            "etc/rp_environment": OF_RENTED,
            "workspace/README": "",
        },
        RENTED,
    ),
    "rental GPU without its tmux": Machine(
        "/bin/bash",
        {
            ".profile": OF_ROOT,
            ".no_auto_tmux": "",
            ".bashrc": 'if [ ! -f ~/.no_auto_tmux ] && [[ -z "$TMUX" ]]; then %s; fi\ncd ~/workspace\n'
            "source ~/etc/rp_environment\n" % AUTO_TMUX,
            "etc/rp_environment": OF_RENTED,
            "workspace/README": "",
        },
        RENTED,
    ),
}


@pytest.mark.parametrize("name", MACHINES)
def test_dotfiles_of_five_kinds_of_machines(
    laptop: Laptop, make_shell_host: Callable[..., Host], mark: str, name: str
) -> None:
    """One go, and the server has what a terminal there has. Jupyter is in ~/bin, which only these files lead to.

    What belongs to Oh My Zsh, Powerlevel10k, Lmod and the rented machines is not theirs: a few lines do the same here.
    """
    shell, files, there = MACHINES[name]
    host = make_shell_host(shell, files)
    put(host.home / "bin", standin_environment() / "bin")  # no command of sh, which may drop what it cannot name
    said = check_open(laptop, host, "-v")
    assert "as an interactive login shell (" in said
    assert "Using %s/bin/jupyter-notebook (" % host.home in said
    found = environment_there(host)
    home = str(host.home)
    assert {variable: found.get(variable) for variable in there} == {
        variable: re.sub("~(?=/)", home, value) for variable, value in there.items()
    }
    assert not [variable for variable in MULTIPLEXERS if variable in found], found
    assert (host.home / "cached").exists() == (name == "oh-my-zsh") and not (host.home / "updated").exists()
    assert not [words for words in processes_with(mark).values() if "tmux" in words]


class Index(BaseHTTPRequestHandler):
    """A proxy in front of a package index that no name leads to: it has the wheels of the stand-in."""

    asked: List[str] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        name = self.path.rstrip("/").rpartition("/")[2]
        wheel = standin_wheels() / name
        links = ['<a href="/files/%s">%s</a>' % (w.name, w.name) for w in standin_wheels().glob(name + "-*.whl")]
        body = wheel.read_bytes() if wheel.is_file() else "".join(links).encode()
        self.send_response(200 if body else 404)
        self.send_header("Content-Type", "application/octet-stream" if wheel.is_file() else "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_jupyter_is_installed_through_the_proxy_of_the_terminal(
    laptop: Laptop, make_host: Callable[..., Host], directory: Path
) -> None:
    host = make_host(path=bare_python(directory / "bin"))
    with ThreadingHTTPServer(("127.0.0.1", 0), Index) as proxy:
        threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True).start()
        address = "http://127.0.0.1:%d" % proxy.server_address[1]
        index = "PIP_INDEX_URL=http://index.invalid/simple PIP_TRUSTED_HOST=index.invalid PIP_NO_CACHE_DIR=1 PIP_USER=1"
        (host.home / ".profile").write_text("export http_proxy=%s LICENCE=7 %s\n" % (address, index))
        with laptop.opened("host") as run:
            assert "Installed Jupyter" in run.stderr, run.text
            there = environment_there(host)
            assert (there["http_proxy"], there["LICENCE"]) == (address, "7")
        proxy.shutdown()
    assert "http://index.invalid/simple/notebook/" in Index.asked


def test_path_has_the_variables_of_the_terminal(laptop: Laptop, make_host: Callable[..., Host]) -> None:
    """What is there with a $ in its name is meant as it stands; a variable that is not set is named."""
    host = make_host(SCRATCH="/of/the/session")
    (host.home / ".profile").write_text("export SCRATCH=$HOME/scratch PROJECT='my project'\n" + RAN)
    for place in ("scratch/my project/x", "$SCRATCH/work", "scratch/work", "root/work", "$odd"):
        (host.home / place).mkdir(parents=True)
    cases = {
        "$HOME/scratch/work": "scratch/work",
        "${SCRATCH}/$PROJECT/x": "scratch/my project/x",
        "$SCRATCH/work": "$SCRATCH/work",
        "$SCRATCH": "$SCRATCH",
        "$odd": "$odd",
        "~/../home/scratch/$PROJECT": "scratch/my project",
    }
    for typed, place in cases.items():
        with laptop.opened("host:" + typed):
            assert [server["root_dir"] for server in listed(laptop)] == [str(host.home / place)], typed
        for again in (typed, place):
            with laptop.opened("host:" + again) as run:
                assert "Found" in run.stderr, (typed, run.text)
        if typed.startswith("$HOME"):  # which the session has as well: only the start has looked
            assert (host.home / "ran").read_text() == "ran\n"
        assert laptop.run("host:" + typed, "stop").status == 0
    shutil.rmtree(host.home / "$SCRATCH")
    with laptop.opened("--stop-on-exit", "--state-dir", "$SCRATCH/state", "host:$SCRATCH/work") as run:
        assert len(list(host.home.glob("scratch/state/servers/*/server.json"))) == 1, run.text
    for arguments in (["host:$LOST/work"], ["--python", "${LOST}/bin/python", "host"], ["host:x/$LOST", "list"]):
        check_failure(laptop.run(*arguments), 1, "$LOST is not set on the host", "LOST", "--init")


@pytest.mark.nbclient
def test_notebook_on_the_host_has_the_variables_of_the_terminal(laptop: Laptop, host: Host) -> None:
    (host.home / ".profile").write_text("export SCRATCH=$HOME/scratch PROJECT=p\n")
    for place in ("scratch/p/n.ipynb", "scratch/p/$PROJECT.ipynb"):
        write_notebook(host.home / place, code("import os; print(os.getcwd())"))
    for words in (["host", "execute", ":$SCRATCH/p/n.ipynb"], ["host:$SCRATCH/$PROJECT", "execute", ":$PROJECT"]):
        run = laptop.run(*words, "-o", "result.ipynb")
        assert run.status == 0 and printed(laptop.home / "result.ipynb") == ["%s/scratch/p\n" % host.home], run.text
