"""How it is installed: `make install`, and pip, pipx and uv by pyproject.toml; under one name, `rjupyter`."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import List

import pytest
from sides import SCRIPT, SYSTEM_PATH, TOP

pytestmark = pytest.mark.unit


def make(target: str, prefix: Path, **variables: str) -> None:
    words = ["%s=%s" % pair for pair in {"PREFIX": str(prefix), **variables}.items()]
    subprocess.run(["make", "-C", str(TOP), target, *words], check=True, capture_output=True)


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    prefix = tmp_path / "o'neil home"
    make("install", prefix)
    return prefix


def version() -> str:
    (number,) = re.findall(r'^__version__ = "(.+)"$', SCRIPT.read_text(), re.MULTILINE)
    return str(number)


def said(words: List[object], cwd: Path, **environment: str) -> str:
    path = "%s:%s" % (Path(sys.executable).parent, SYSTEM_PATH)
    run = subprocess.run(
        [str(word) for word in words],
        env={"HOME": str(cwd), "PATH": path, **environment},
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return run.stdout


def test_make_install_copies_the_file_under_its_name(prefix: Path, tmp_path: Path) -> None:
    program = prefix / "bin/rjupyter"
    assert [path for path in prefix.rglob("*") if not path.is_dir()] == [program]
    assert program.read_bytes() == SCRIPT.read_bytes() and os.access(program, os.X_OK)
    assert said([program, "--version"], tmp_path) == "rjupyter %s\n" % version()
    (bytecode,) = [path for path in (tmp_path / ".cache").rglob("*") if not path.is_dir()]
    assert str(program).encode() in bytecode.read_bytes()  # for tracebacks


def test_installed_program_is_found_by_a_link_and_goes_by_its_name(prefix: Path, tmp_path: Path) -> None:
    (tmp_path / "gpu").symlink_to(prefix / "bin/rjupyter")
    assert "try: %s --help" % (tmp_path / "gpu") in said([tmp_path / "gpu", "--nonsense"], tmp_path)
    path = "%s:%s:%s" % (prefix / "bin", Path(sys.executable).parent, SYSTEM_PATH)
    assert "try: rjupyter --help\n" in said([prefix / "bin/rjupyter", "--nonsense"], tmp_path, PATH=path)


def test_installed_program_imports_nothing_from_where_it_is_run(prefix: Path, tmp_path: Path) -> None:
    for name in ("argparse", "rjupyter", "queue"):
        (tmp_path / (name + ".py")).write_text("raise SystemExit('a stranger')\n")
    assert "a stranger" not in said([prefix / "bin/rjupyter", "--version"], tmp_path)


def test_uninstall_leaves_nothing_of_ours(prefix: Path) -> None:
    (prefix / "bin/other").write_text("")
    make("uninstall", prefix)
    assert [path.name for path in prefix.rglob("*") if not path.is_dir()] == ["other"]


def test_packagers_can_install_below_another_root(tmp_path: Path) -> None:
    make("install", Path("/usr"), DESTDIR=str(tmp_path / "root"))
    assert (tmp_path / "root/usr/bin/rjupyter").is_file()


def test_package_has_the_command(tmp_path: Path) -> None:
    """As pip, pipx and uv install it; the command knows its own name, and nothing is left in the checkout."""
    spec = importlib.util.find_spec("flit_core")
    if not spec or not spec.origin:
        pytest.skip("flit_core, which builds the package, is not there")
    checkout, place = tmp_path / "checkout", tmp_path / "place"
    checkout.mkdir()
    names = ["LICENSE", "README.md", "pyproject.toml", "rjupyter.py"]
    for name in names:
        shutil.copy(TOP / name, checkout)
    options = ["--quiet", "--no-index", "--no-build-isolation", "--no-deps", "--target", place]
    backend = str(Path(spec.origin).parents[1])
    log = said([sys.executable, "-m", "pip", "install", *options, checkout], tmp_path, PYTHONPATH=backend)
    assert (place / "bin/rjupyter").is_file(), log
    path = "%s:%s" % (place / "bin", SYSTEM_PATH)
    for words, answer in ((["--version"], "rjupyter %s\n" % version()), (["--nonsense"], "try: rjupyter --help\n")):
        assert said([place / "bin/rjupyter", *words], tmp_path, PYTHONPATH=str(place), PATH=path).endswith(answer)
    assert sorted(path.name for path in checkout.iterdir()) == names


def test_the_file_says_which_python_it_takes() -> None:
    """PEP 723, for `uv run`: the same as what the file itself checks, and what the package says."""
    head = SCRIPT.read_text().partition('"""')[0]
    assert '# /// script\n# requires-python = ">=3.8"\n# dependencies = []\n# ///\n' in head
    assert "sys.version_info < (3, 8)" in SCRIPT.read_text()
    assert 'requires-python = ">=3.8"\n' in (TOP / "pyproject.toml").read_text()


# What dpkg does for a package, in a root of its own: the words of its maintainer script, as debhelper writes them.
APT_GET = """#!/bin/sh
case "$*" in *--assume-no*) exit 1 ;; *" install "* | install*) ;; *) exit 0 ;; esac
for word; do case $word in DPkg::Path=*) PATH=${word#DPkg::Path=} ;; esac; done
export PATH DPKG_ROOT=%s DPKG_MAINTSCRIPT_PACKAGE=shellcheck DPKG_MAINTSCRIPT_NAME=postinst
for unit in new old; do
    update-rc.d $unit defaults || exit
    if deb-systemd-helper --quiet was-enabled $unit.service; then deb-systemd-helper enable $unit.service || exit; fi
    if deb-systemd-helper --user was-enabled $unit.service; then
        deb-systemd-helper --user enable $unit.service || exit
    fi
    deb-systemd-invoke start $unit.service && invoke-rc.d $unit start || exit
done
"""
UNIT = "[Service]\nExecStart=/bin/true\n[Install]\nWantedBy=%s.target\n"
SCRIPT_HEAD = (
    "#!/bin/sh\n### BEGIN INIT INFO\n# Provides: %s\n# Default-Start: 2 3\n# Default-Stop: 0 6\n### END INIT INFO\n"
)


def links(root: Path) -> "dict[str, list[str]]":
    """Return the names of the services that start at the next boot or login, each with what says so."""
    found: "dict[str, list[str]]" = {}
    for path in [*root.glob("etc/systemd/*/*.wants/*.service"), *root.glob("etc/rc?.d/S*")]:
        found.setdefault(re.sub(r"^S\d\d|\.service$", "", path.name), []).append(path.parent.name)
    return {name: sorted(places) for name, places in found.items()}


@pytest.mark.skipif(not shutil.which("deb-systemd-helper"), reason="packages of Debian's alone are enabled by it")
@pytest.mark.skipif(os.getuid() != 0, reason="only root may install packages")
def test_setup_enables_nothing_that_it_installs(tmp_path: Path) -> None:
    """Not now, nor when the package is upgraded; and what was enabled before stays so."""
    root, binaries = tmp_path / "root", tmp_path / "bin"
    for place, target in (("system", "multi-user"), ("user", "default")):
        (root / "usr/lib/systemd" / place).mkdir(parents=True)
        (root / "lib/systemd" / place).mkdir(parents=True)
        for name in ("new", "old"):
            for top in ("usr/lib", "lib"):
                (root / top / "systemd" / place / (name + ".service")).write_text(UNIT % target)
    (root / "etc/init.d").mkdir(parents=True)
    for name in ("new", "old"):
        (root / "etc/init.d" / name).write_text(SCRIPT_HEAD % name)
    maintainer = dict(os.environ, DPKG_ROOT=str(root), DPKG_MAINTSCRIPT_PACKAGE="old", DPKG_MAINTSCRIPT_NAME="postinst")
    maintainer["PATH"] += ":/usr/sbin"

    helper = ["deb-systemd-helper"]
    for words in (["update-rc.d", "old", "defaults"], [*helper, "enable"], [*helper, "--user", "enable"]):
        unit = ["old.service"] if words[0] in helper else []
        subprocess.run([*words, *unit], env=maintainer, check=True)
    enabled = links(root)
    assert enabled == {"old": ["default.target.wants", "multi-user.target.wants", "rc2.d", "rc3.d"]}
    checkout = tmp_path / "checkout"
    (checkout / "tests").mkdir(parents=True)
    (checkout / ".venv").mkdir()
    shutil.copy(TOP / "tests/setup.sh", checkout / "tests")
    (checkout / "tests/requirements.txt").touch()
    binaries.mkdir()
    tools = ("sh", "env", "id", "mktemp", "ln", "cat", "chmod", "rm", "sed", "sort", "tr", "dirname", "cmp")
    for name in (*tools, "ssh", "ssh-keygen"):
        (binaries / name).symlink_to(shutil.which(name) or name)
    (binaries / "python3").symlink_to(sys.executable)
    for name, text in (("apt-get", APT_GET % root), ("sudo", '#!/bin/sh\n[ "$1" != -n ] || shift\nexec "$@"\n')):
        (binaries / name).write_text(text)
        (binaries / name).chmod(0o755)
    for _ in range(2):  # the second time it is an upgrade
        argv = ["sh", str(checkout / "tests/setup.sh"), "lint"]
        run = subprocess.run(argv, env={"PATH": str(binaries)}, capture_output=True, text=True)
        assert run.returncode == 0 and "apt-get: shellcheck" in run.stdout, run.stdout + run.stderr
        assert links(root) == enabled
    was_enabled = ["deb-systemd-helper", "--quiet", "was-enabled", "new.service"]
    assert subprocess.run(was_enabled, env=maintainer).returncode == 1  # what an upgrade by anyone else asks
