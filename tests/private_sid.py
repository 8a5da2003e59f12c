"""Debian sid, with the newest Python and OpenSSH, in a directory of this machine: either side of a test can be in it.

What runs in it shares processes and loopback with this machine, and has the files of sid, a /tmp and a /run of its own,
and the directory of the test, at the same path. All of that is mounted in a namespace of its own and ends with it.
"""

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Dict, List

from private_machines import why_not_unshared

TREE = Path("/var/tmp/rjupyter-tests-0/sid")  # which setup.sh makes
CHROOT = "/usr/sbin/chroot"
ENTER = """
tree=$0 directory=$1; shift
mount --rbind /dev "$tree/dev" && mount --rbind /proc "$tree/proc" &&
mount -t tmpfs none "$tree/tmp" && mount -t tmpfs none "$tree/run" && mkdir -m 755 "$tree/run/sshd" &&
mkdir -p "$tree$directory" && mount --bind "$directory" "$tree$directory" || exit
"""


def find_sid_obstacle() -> str:
    """Return why nothing can run in a Debian sid here, or ""."""
    if os.getuid() != 0:
        return "only root can make a Debian sid, and change into it"
    if not (TREE / "complete").exists():
        return (
            "there is no Debian sid in %s; tests/setup.sh makes it where there are debootstrap and the network" % TREE
        )
    why = why_not_unshared("--mount", "sh", "-c", ENTER + CHROOT + ' "$tree" true', str(TREE), "/var/tmp")
    return why and "nothing runs in a Debian sid here: " + why


def sid_pythons() -> Dict[int, str]:
    """Return every Python 3.x of sid, by its minor version; none where there is no sid."""
    found = [re.fullmatch(r"python3\.(\d+)", path.name) for path in TREE.glob("usr/bin/python3.*")]
    return {int(match[1]): "/usr/bin/" + match[0] for match in found if match}


def sid_ssh_version() -> str:
    """Return the version of sid's OpenSSH, such as "10.6"."""
    run = subprocess.run([CHROOT, str(TREE), "ssh", "-V"], capture_output=True, text=True, check=True)
    (version,) = re.findall(r"OpenSSH_(\d+\.\d+)", run.stderr)
    return str(version)


def in_sid(directory: Path, *argv: str) -> List[str]:
    """Return a command that runs another in sid, which sees `directory`; the working directory is below that."""
    script = ENTER + 'exec %s "$tree" env --chdir="$PWD" "$@"' % CHROOT
    return ["unshare", "--mount", "sh", "-c", script, str(TREE), str(directory), *argv]


def sshd_in_sid(directory: Path) -> List[str]:
    """Return what starts sid's sshd in place of this machine's: a prefix for PrivateSshd."""
    script = ENTER + 'shift; exec %s "$tree" /usr/sbin/sshd "$@"' % CHROOT
    return ["unshare", "--mount", "sh", "-c", script, str(TREE), str(directory)]


def write_program(path: Path, *argv: str) -> Path:
    """Write a program that is this command, with the words after its name; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('#!/bin/sh\nexec %s "$@"\n' % shlex.join(argv))
    path.chmod(0o755)
    return path
