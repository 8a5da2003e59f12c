"""`make demo`: a host to try rjupyter with: a private sshd on this machine. Nothing of yours is touched.

The person gets a shell in which `demo` is a host; its stdin may be a script. With arguments, one command of rjupyter is
run instead. The host's Jupyter is the one in .venv; its home is a temporary directory that goes away with the demo.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from notebooks import code, write_notebook
from private_sshd import PrivateSshd

TOP = Path(__file__).resolve().parent.parent
WELCOME = """In this shell, `demo` is a host with a Jupyter of its own. Try:

  rjupyter demo:work                 open Jupyter there; Ctrl-C closes the tunnel
  rjupyter demo:work                 come back to it
  rjupyter demo list
  rjupyter demo execute hello.ipynb
  rjupyter demo stop
  exit                               end the host, and remove all of it
"""
SSH = '#!/bin/sh\nexec %s -F %s "$@"\n'


def main() -> int:
    directory = Path(tempfile.mkdtemp(prefix="rj-demo-"))  # short: its home holds the sockets of kernels
    path = "%s:/usr/local/bin:/usr/bin:/bin" % (TOP / ".venv" / "bin")
    sshd = PrivateSshd(directory, path, host="demo")
    sshd.environment["RJUPYTER_TMP"] = str(directory)  # nothing is left in /tmp either
    sshd.start()
    for place in (sshd.home / "work", directory / "laptop", directory / "bin"):
        place.mkdir()
    for place in (sshd.home / "work", directory / "laptop"):
        write_notebook(place / "hello.ipynb", code("squares = [n * n for n in range(1000)]\nprint(sum(squares))"))
    # On the PATH of the shell: rjupyter, and an ssh that knows the host.
    (directory / "bin/rjupyter").symlink_to(TOP / "rjupyter.py")
    ssh = directory / "bin/ssh"
    ssh.write_text(SSH % (shutil.which("ssh"), sshd.config))
    ssh.chmod(0o755)
    environment = dict(os.environ, PATH="%s:%s" % (ssh.parent, os.environ["PATH"]), PS1="demo$ ")
    environment["XDG_CACHE_HOME"] = str(directory / "cache")
    command = ["rjupyter", *sys.argv[1:]] if sys.argv[1:] else ["sh"]
    if not sys.argv[1:]:
        print(WELCOME, flush=True)
        if sys.stdin.isatty() and shutil.which("bash"):
            command = ["bash", "--noprofile", "--norc", "-i"]
    signal.signal(signal.SIGINT, lambda signum, frame: None)  # Ctrl-C is for rjupyter, and its clean-up for us
    try:
        status = subprocess.Popen(command, env=environment, cwd=directory / "laptop").wait()
        return 0 if command[-1] == "-i" else status  # a person's shell ends with the status of what was typed last
    finally:
        for words in (["close"], ["stop", "--all", "--yes"]):
            argv = ["rjupyter", "-q", "demo", *words]
            subprocess.run(argv, env=environment, stdin=subprocess.DEVNULL)
        sshd.stop()
        shutil.rmtree(directory, ignore_errors=True)
        print("The demo's server, its sshd and their directory are gone.")


if __name__ == "__main__":
    sys.exit(main())
