"""A real browser: Chromium, driven by Selenium."""

import contextlib
import fcntl
import re
import shutil
from typing import Any, Callable, Iterator, List

import pytest
from private_machines import network_lock
from sides import Laptop


@contextlib.contextmanager
def chromium(laptop: Laptop) -> Iterator[Any]:
    """Start a headless Chromium with a profile of its own; skip where there is none."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if not program or not shutil.which("chromedriver"):
        pytest.skip("there is no chromium with its chromedriver; tests/setup.sh installs them")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = program
    profile = laptop.home / "chromium"
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--user-data-dir=%s" % profile,
    ):
        options.add_argument(argument)
    service = Service(shutil.which("chromedriver"))
    with network_lock(fcntl.LOCK_SH), webdriver.Chrome(options=options, service=service) as driver:
        yield driver


def run_cell(driver: Any, code: str, output: str) -> None:
    """Type `code` into the notebook's first cell, run it, and wait for its output. The page may redraw meanwhile."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    def text_of(selector: str) -> str:
        return "".join(element.text for element in driver.find_elements(By.CSS_SELECTOR, selector))

    def begin_code(_: Any) -> Any:
        editor = driver.find_element(By.CSS_SELECTOR, ".jp-Cell .cm-content")
        editor.click()
        editor.send_keys(Keys.CONTROL, "a")
        editor.send_keys(Keys.DELETE)
        editor.send_keys(code)
        return code in text_of(".jp-Cell .cm-content") and begin_first_cell(driver)

    names = ".jp-Toolbar-kernelName, .jp-KernelName, .jp-Notebook-footer, body"
    wait_for_page(driver, lambda _: "Python 3" in text_of(names))
    wait_for_page(driver, begin_code)
    wait_for_output(driver, output)


def begin_first_cell(driver: Any) -> Any:
    """Press Shift-Enter in the first cell; true when its number changes: a page that is not ready loses the key."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.wait import WebDriverWait

    def number() -> str:
        return str(driver.find_element(By.CSS_SELECTOR, ".jp-Cell .jp-InputPrompt").text)

    before = number()
    if "*" in before:  # an earlier press took its time
        return True
    cell = driver.find_element(By.CSS_SELECTOR, ".jp-Cell .cm-content")
    cell.click()
    cell.send_keys(Keys.SHIFT, Keys.ENTER)
    return WebDriverWait(driver, 5).until(lambda _: number() != before)


def run_first_cell(driver: Any, url: str, printed: str) -> None:
    """Open a notebook's page and run its first cell, until what it prints is there."""
    from selenium.webdriver.common.by import By

    driver.get(url)
    wait_for_page(driver, lambda _: "Python 3" in driver.find_element(By.CSS_SELECTOR, "body").text)
    wait_for_page(driver, begin_first_cell)
    wait_for_output(driver, printed)


def wait_for_page(driver: Any, condition: Callable[[Any], Any]) -> None:
    """Wait until `condition` holds, also while the page takes its elements away and makes them anew.

    On a busy machine a page asks after some seconds whether to wait on, or has not loaded its theme: what says so lies
    over the cells, and is answered as a person would. When an address of the machine comes or goes, Chromium fails
    what it is loading just then (ERR_NETWORK_CHANGED), and JupyterLab stays without it: the page is loaded again,
    unless a cell has begun.
    """
    from selenium.common.exceptions import TimeoutException, WebDriverException
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.wait import WebDriverWait

    said: List[str] = []

    def holds(_: Any) -> Any:
        heard = [str(entry["message"]) for entry in driver.get_log("browser")]
        said.extend(heard)
        if any("ERR_NETWORK_CHANGED" in line for line in heard):
            prompts = [element.text for element in driver.find_elements(By.CSS_SELECTOR, ".jp-InputPrompt")]
            if not re.search("[0-9*]", "".join(prompts)):
                driver.refresh()
        for dialog in driver.find_elements(By.CSS_SELECTOR, ".jp-Dialog"):
            for button in dialog.find_elements(By.CSS_SELECTOR, "button") if "Loading" in dialog.text else []:
                if button.text.lower().endswith(("waiting", "ok")):
                    button.click()
        return condition(driver)

    try:
        WebDriverWait(driver, 90, ignored_exceptions=[WebDriverException]).until(holds)
    except TimeoutException:
        shown = driver.find_element(By.CSS_SELECTOR, "body").text
        words = "the page does not come to it; it shows:\n%s\nand says:\n%s" % (shown, "\n".join(said))
        raise AssertionError(words) from None


def wait_for_output(driver: Any, text: str) -> None:
    wait_for_page(driver, lambda _: text in shown_in(driver))


def shown_in(driver: Any) -> str:
    from selenium.webdriver.common.by import By

    return "\n".join(element.text for element in driver.find_elements(By.CSS_SELECTOR, ".jp-OutputArea"))
