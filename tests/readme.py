"""What the README says, taken out of it: its examples are run as they stand, and its tables are compared."""

import re
from typing import Dict, List

from sides import TOP

README = (TOP / "README.md").read_text()


def readme_block(words: str) -> str:
    """Return the indented block of the README that has these words, without its indentation."""
    (block,) = [block for block in re.findall(r"(?:^ {4}.*\n|^\n)+", README, re.MULTILINE) if words in block]
    return "\n".join(line[4:] for line in str(block).strip("\n").splitlines()) + "\n"


def readme_events() -> Dict[str, List[str]]:
    """Return the README's table of events: the keys of each."""
    rows = re.findall(r"^\| `(\w+)` \| [^|]* \| ([^|]*) \|$", README, re.MULTILINE)
    assert rows
    return {name: re.findall(r"`(\w+)`", keys) for name, keys in rows}


def readme_range(name: str) -> str:
    """Return what the README says in a row of the table of what the tests run."""
    (value,) = re.findall(r"^\| %s \| ([^|]*) \|$" % re.escape(name), README, re.MULTILINE)
    return str(value)
