"""`make demo`: rjupyter.py against a private sshd on this machine. Nothing of yours is touched.

The host's Jupyter is the one in .venv; its home is a temporary directory that goes away with the demo.
"""

import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from private_sshd import PrivateSshd

TOP = Path(__file__).resolve().parent.parent


def main() -> int:
    directory = Path(tempfile.mkdtemp(prefix="rjupyter-demo-"))
    path = "%s:/usr/local/bin:/usr/bin:/bin" % (TOP / ".venv" / "bin")
    sshd = PrivateSshd(directory, path, host="demo")
    sshd.environment["RJUPYTER_TMP"] = str(directory)  # nothing is left in /tmp either
    sshd.start()
    (sshd.home / "work").mkdir()
    command = [sys.executable, str(TOP / "rjupyter.py"), "-F", str(sshd.config)]
    arguments = sys.argv[1:] or ["demo:work"]
    print("$ ./rjupyter.py -F %s %s" % (sshd.config, " ".join(arguments)), flush=True)
    signal.signal(signal.SIGINT, lambda signum, frame: None)  # Ctrl-C is for rjupyter.py, and its clean-up for us
    try:
        return subprocess.Popen(command + arguments).wait()
    finally:
        subprocess.run(command + ["-q", "demo", "stop", "--all", "--yes"], stdin=subprocess.DEVNULL)
        sshd.stop()
        shutil.rmtree(directory, ignore_errors=True)
        print("The demo's server, its sshd and their directory are gone.")


if __name__ == "__main__":
    sys.exit(main())
