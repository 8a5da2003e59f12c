"""What this machine lacks for some of the tests, and how long the rest takes here: said before the first one runs."""

import os
import shutil
import time
from typing import Callable, Dict, List, Tuple

from private_gridengine import find_gridengine_obstacle
from private_machines import find_namespaces_obstacle, find_obstacle, why_not_unshared
from private_podman import find_podman_obstacle
from private_sid import find_sid_obstacle
from private_slurm import find_slurm_obstacle
from private_sshd import find_sshd
from sides import SCRIPT

# Seconds of a core that the tests of each kind take, and what `calibrate` took there.
CORE_S: Dict[str, float] = {"unit": 41, "sshd": 1092, "cluster": 130, "browser": 18}
CALIBRATED_S = 0.117


def find_root_obstacle() -> str:
    """Return why there are no other users here, with other login shells, or ""."""
    return "" if os.getuid() == 0 else "only root can make other users"


def find_shells_obstacle() -> str:
    """Return which login shells are missing here, or ""."""
    missing = [name for name in ("dash", "bash", "zsh", "fish", "ksh", "tcsh", "busybox") if not shutil.which(name)]
    return (missing and "there is no %s; tests/setup.sh installs them for root" % ", ".join(missing)) or ""


def find_sshd_obstacle() -> str:
    """Return why there can be no host here, or ""."""
    try:
        return find_sshd() and ""
    except RuntimeError as error:
        return str(error)


def find_browser_obstacle() -> str:
    """Return why there is no browser here, or ""."""
    if not shutil.which("chromedriver") or not (shutil.which("chromium") or shutil.which("google-chrome")):
        return "there is no chromium with its chromedriver; tests/setup.sh installs them"
    return ""


def find_mount_obstacle() -> str:
    """Return why nothing can be mounted here, or ""."""
    if os.getuid() != 0:
        return "only root can mount"
    return why_not_unshared("--mount", "mount", "-t", "tmpfs", "none", "/mnt")


OBSTACLES: List[Tuple[str, str, Callable[[], str]]] = [
    ("hosts", "sshd", find_sshd_obstacle),
    ("the browser", "browser", find_browser_obstacle),
    ("other users of the host, and their login shells", "", find_root_obstacle),
    ("login shells", "", find_shells_obstacle),
    ("full disks, quotas and shared homes", "", find_mount_obstacle),
    ("hosts in namespaces of their own", "", find_namespaces_obstacle),
    ("clusters", "cluster", lambda: find_obstacle(["csh"])),
    ("Slurm", "", find_slurm_obstacle),
    ("Grid Engine", "", find_gridengine_obstacle),
    ("containers", "", find_podman_obstacle),
    ("the newest Python and OpenSSH", "", find_sid_obstacle),
]


def calibrate() -> float:
    """Return how long a piece of work takes here, in seconds: to compile rjupyter.py."""
    source = SCRIPT.read_text(encoding="utf-8")
    began = time.process_time()
    compile(source, str(SCRIPT), "exec")
    return time.process_time() - began


def report(workers: int) -> List[str]:
    """Return what will be skipped here and why, and how long the rest takes with so many tests at a time."""
    lines = []
    core_s = dict(CORE_S)
    for what, kind, find in OBSTACLES:
        why = find()
        if why:
            lines.append("skipped here: tests of %s: %s" % (what, why))
            core_s.pop(kind, None)
    cores = len(os.sched_getaffinity(0))
    minutes = sum(core_s.values()) / min(cores, workers) / 60 * calibrate() / CALIBRATED_S
    return [
        *lines,
        "the whole takes about %d minutes here (cores: %d, tests at a time: %d)" % (minutes + 1, cores, workers),
    ]
