"""A host whose sshd asks PAM, by a service of this machine that is there for as long as a test runs."""

import contextlib
import os
import re
import subprocess
import uuid
from pathlib import Path
from typing import Iterator

import pytest
from private_sshd import find_sshd
from sides import Host


@contextlib.contextmanager
def asks_pam(host: Host, service: str, settings: str = "") -> Iterator[None]:
    """Start sshd anew with a service of its own; its name is that of the program, or is given from OpenSSH 9.8 on."""
    file = Path("/etc/pam.d", "rjupyter-" + uuid.uuid4().hex[:8])
    if os.getuid() or not file.parent.is_dir():
        pytest.skip("only root can make a PAM service")
    host.sshd.stop()
    host.sshd.settings = "UsePAM yes\n" + settings
    argv = [find_sshd(), "-G", "-f", "/dev/null", "-oPAMServiceName=" + file.name]
    if subprocess.run(argv, capture_output=True).returncode == 0:
        host.sshd.settings += "\nPAMServiceName " + file.name
    else:
        program, directory = Path(find_sshd()), host.sshd.directory
        script = re.search(rb"exec '(.*)'", program.read_bytes()) if program.parent.name == ".sshd" else None
        os.symlink(script.group(1).decode() if script else program, directory / file.name)
        host.sshd.program = str(directory / file.name)
        if script:  # of tests/setup.sh: it says where the libraries are
            host.sshd.program = str(directory / "sshd")
            text = program.read_text().replace(script.group(1).decode(), str(directory / file.name))
            Path(host.sshd.program).write_text(text)
            os.chmod(host.sshd.program, 0o755)
    file.write_text(service)
    try:
        host.sshd.start()
        yield
    finally:
        file.unlink()
