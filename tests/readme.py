"""What the README and the help say, taken out of them: examples are run as they stand, and tables are compared."""

import re
from typing import Dict, List

from sides import TOP

import rjupyter

README = (TOP / "README.md").read_text()


def readme_block(words: str) -> str:
    """Return the indented block of the README that has these words, without its indentation."""
    (block,) = [block for block in re.findall(r"(?:^ {4}.*\n|^\n)+", README, re.MULTILINE) if words in block]
    return "\n".join(line[4:] for line in str(block).strip("\n").splitlines()) + "\n"


def help_events() -> Dict[str, List[str]]:
    """Return what `--help events` lists: the keys of each."""
    rows = re.findall(r"^(\w+) +\S.*: ([\w, ]+)$", rjupyter.help_text("events"), re.MULTILINE)
    assert rows
    return {name: keys.split(", ") for name, keys in rows}


def readme_range(name: str) -> str:
    """Return what the README says in a row of the table of what the tests run."""
    (value,) = re.findall(r"^\| %s \| ([^|]*) \|$" % re.escape(name), README, re.MULTILINE)
    return str(value)
