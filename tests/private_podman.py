"""podman with images and containers of its own, as root: what is installed on the machine keeps its own."""

import fcntl
import os
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Dict, List

from jupyters import kept, standin

TOP = Path("/var/tmp/rjupyter-tests-0")
TAR = TOP / "image.tar"  # which setup.sh makes
IMAGE = "localhost/rjupyter-test"
# A machine that is a container itself may let nobody raise a limit. crun 1.8 refuses cgroups of both versions.
CONTAINERS = """[containers]
default_ulimits = ["nofile=1024:1024", "nproc=2048:2048"]
[engine]
runtime = "runc"
"""
STORAGE = """[storage]
driver = "overlay"
graphroot = "%s/images"
runroot = "%s/podman"
"""


# What an image needs of the tree to run Python.
KEPT = ("usr/bin/", "usr/sbin/", "usr/lib/", "usr/lib64/", "etc/")
DROPPED = (
    "usr/lib/x86_64-linux-gnu/gconv",
    "usr/lib/x86_64-linux-gnu/perl",
    "usr/lib/apt",
    "usr/lib/x86_64-linux-gnu/libapt",
)


def small_tar() -> Path:
    """Return a tar of a fraction of that size, with the stand-in for Jupyter: an ordinary user imports it each time."""
    place = standin(has_python=True)

    def make(directory: Path) -> None:
        directory.mkdir()
        with tarfile.open(str(TAR)) as whole, tarfile.open(str(directory / "image.tar"), "w") as small:
            for member in whole:
                name = member.name[2:]
                if ("/" in name and not name.startswith(KEPT)) or name.startswith(DROPPED):
                    continue
                small.addfile(member, whole.extractfile(member) if member.isreg() else None)
            small.add(str(place), "usr/local/bin")
            small.add(str(place.parent / "lib"), str(place.parent / "lib")[1:])

    return kept("small-image", "2 %s %s" % (place, TAR.stat().st_mtime_ns), make) / "image.tar"


def find_podman_obstacle() -> str:
    """Return why there can be no containers here, as far as a look tells, or ""."""
    if os.getuid() != 0:
        return "podman is tested as root: an ordinary user needs subordinate uids"
    missing = [name for name in ("podman", "runc") if not shutil.which(name)]
    return "needs %s" % ", ".join(missing or [str(TAR)]) if missing or not TAR.exists() else ""


class PrivatePodman:
    """podman, with the image of the tests. All tests share its images; a container belongs to the home that it sees."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self._containers = directory / "containers.conf"
        self._storage = directory / "storage.conf"
        self._containers.write_text(CONTAINERS)
        self._storage.write_text(STORAGE % (TOP, TOP))

    def environment(self) -> Dict[str, str]:
        """Return what lets podman find its files."""
        return {"CONTAINERS_CONF": str(self._containers), "CONTAINERS_STORAGE_CONF": str(self._storage)}

    def command(self, *argv: str) -> "subprocess.CompletedProcess[str]":
        """Run podman."""
        environment = {**os.environ, **self.environment()}
        return subprocess.run(
            ["podman", *argv], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=300
        )

    def find_obstacle(self) -> str:
        """Return why there are no containers here; empty when there are. Imports the image, once for all tests."""
        obstacle = find_podman_obstacle()
        if obstacle:
            return obstacle
        with open(TOP / "image.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self.command("image", "exists", IMAGE).returncode:
                imported = self.command("import", "--quiet", str(TAR), IMAGE)
                if imported.returncode:
                    return "podman takes no image here: %s" % imported.stderr.strip()
        tried = self.command("run", "--rm", "--network=host", IMAGE, "true")
        return "podman runs nothing here: %s" % tried.stderr.strip() if tried.returncode else ""

    def containers(self, home: Path) -> List[str]:
        """Return the names of the containers that see a home."""
        argv = ["ps", "--all", "--filter", "volume=%s" % home, "--format", "{{.Names}}"]
        return self.command(*argv).stdout.split()
