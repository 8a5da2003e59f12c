"""Draw tests/picture.svg, which the README shows: its first transcript in a terminal, and the page that it opens.

usage: .venv/bin/python tests/picture.py

The names of this machine, its user and its directories are replaced; nothing else is.
"""

import base64
import os
import re
import tempfile
from html import escape
from pathlib import Path
from typing import List

from browser import chromium, run_first_cell
from notebooks import code, write_notebook
from private_sshd import PrivateSshd
from sides import SCRIPT, SYSTEM_PATH, VENV_BIN, Laptop, Run

PICTURE = Path(__file__).with_name("picture.svg")
CODE = "squares = [n * n for n in range(1000)]\nprint(sum(squares))"
PRINTED = "332833500"
WIDTH, LINE, PAGE = 1000, 19, 460  # in pixels
HEAD = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" role="img">\n<title>%s</title>\n'
    '<rect width="100%%" height="100%%" rx="6" fill="#1e1e28"/>\n'
    '<g font-family="DejaVu Sans Mono, Menlo, monospace" font-size="13" fill="#e8e8e8">\n'
)


def shown(run: Run, home: str) -> List[str]:
    """Return what the terminal shows, under the names of the README."""
    text = run.text.replace(home, "/home/ana").replace(str(SCRIPT), "rjupyter")
    text = re.sub(r"[^\s(]+@\S+, python", "ana@gpu1, python", re.sub(r" -F \S+", "", text))
    text = re.sub(r"token=(\w{12})\w+", r"token=\1...", text)
    left_out = ("You are root", "Launching", "sbatch is there")
    lines = [line for line in re.sub(r"\x1b\[[0-9;?]*\w|.*\r(?!\n)", "", text).splitlines() if line.strip()]
    return ["$ rjupyter gpu1:work/hello.ipynb"] + [line for line in lines if not line.startswith(left_out)]


def picture_of_page(laptop: Laptop, url: str) -> bytes:
    """Run the notebook's cell in a browser, and return a picture of the page."""
    with chromium(laptop) as driver:
        driver.set_window_size(WIDTH - 40, PAGE)
        run_first_cell(driver, url, PRINTED)
        picture: bytes = driver.get_screenshot_as_png()
        return picture


def draw(lines: List[str], page: bytes) -> str:
    """Return the picture: the lines of the terminal above the page."""
    top = 16 + LINE * len(lines)
    width, height = (int.from_bytes(page[at : at + 4], "big") for at in (16, 20))  # of a PNG
    parts = [HEAD % (WIDTH, top + height * (WIDTH - 40) // width + 24, escape("; ".join(lines)))]
    for number, line in enumerate(lines):
        steps = ("Connected", "Launched", "Forwarding")
        look = ' fill="#8a8a94"' if line.startswith(steps) else ' font-weight="bold"' if line.startswith("http") else ""
        place = (LINE * (number + 1) + 4, look, escape(line))
        parts.append('<text x="16" y="%d"%s xml:space="preserve">%s</text>\n' % place)
    data = base64.b64encode(page).decode("ascii")
    image = '</g>\n<image x="20" y="%d" width="%d" href="data:image/png;base64,%s"/>\n</svg>\n'
    return "".join(parts) + image % (top, WIDTH - 40, data)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="rj-") as place:
        directory = Path(place)
        sshd = PrivateSshd(directory, "%s:%s" % (VENV_BIN, SYSTEM_PATH), host="gpu1")
        sshd.environment["RJUPYTER_TMP"] = place
        laptop = Laptop(directory, "picture-%d" % os.getpid())
        laptop.config = str(sshd.config)
        sshd.start()
        (sshd.home / "work").mkdir()
        write_notebook(sshd.home / "work/hello.ipynb", code(CODE))
        run = laptop.start("--no-browser", "gpu1:work/hello.ipynb")
        try:
            url = run.url()
            run.expect("To end it.*\n")
            page = picture_of_page(laptop, url)
            run.interrupt()
            run.wait()
            lines = shown(run, str(sshd.home))
            PICTURE.write_text(draw(lines, page))
            print("\n".join(lines))
        finally:
            laptop.run("gpu1", "stop", "--all", "--yes")
            run.close()
            sshd.stop()


if __name__ == "__main__":
    main()
