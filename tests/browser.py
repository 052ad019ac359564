"""A headless Chromium that notes what a page complains about and what it asks the network for.

Tests, the pictures of the docs and the benchmark of the page use it.
"""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["NARROW", "WIDE", "Browser", "NoBrowserError"]

WIDE, NARROW = (1280, 860), (390, 844)


class NoBrowserError(Exception):
    """There is no Chromium, no driver of it, or no selenium; the message says what to install."""


def _programs() -> tuple[str, str]:
    """Paths of Chromium and of its driver."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        raise NoBrowserError("needs Chromium and its driver: apt-get install chromium chromium-driver")
    return browser, driver


class Browser:
    """One Chromium for several pages."""

    def __init__(self) -> None:
        try:
            from selenium import webdriver  # noqa: PLC0415 - its absence is reported
        except ImportError as error:
            raise NoBrowserError("needs selenium: pip install 'fedmef-fx[test]'") from error
        browser, driver = _programs()
        options = webdriver.ChromeOptions()
        options.binary_location = browser
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        arguments = ["--headless=new", "--disable-dev-shm-usage", "--hide-scrollbars", "--disable-gpu"]
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            arguments.append("--no-sandbox")  # Chromium refuses to start as root otherwise
        for argument in arguments:
            options.add_argument(argument)
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))

    def open(self, page: Path, *, size: tuple[int, int] = WIDE, dark: bool = False) -> None:
        """Load a page from disk in a window of a size in CSS pixels."""
        self.messages(), self.requests()  # what earlier pages left
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        theme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": theme})
        self.driver.get(page.as_uri())

    def run(self, script: str, *arguments: Any) -> Any:
        """Run a script and return what it returns."""
        return self.driver.execute_script(script, *arguments)

    def click(self, selector: str) -> None:
        """Click the first element of a CSS selector."""
        self.driver.find_element("css selector", selector).click()

    def press(self, *keys: str) -> None:
        """Press keys, wherever the focus is."""
        self.driver.switch_to.active_element.send_keys(*keys)

    def wait(self, is_true: Callable[[], bool], *, seconds: float = 10.0) -> None:
        """Wait until something is true."""
        end = time.monotonic() + seconds
        while not is_true():
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.02)

    def picture(self) -> bytes:
        """The window as a PNG file."""
        return self.driver.get_screenshot_as_png()

    def messages(self) -> list[str]:
        """What pages wrote to the console since the last call: errors, warnings, refusals of the security policy."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Addresses that were asked for since the last call, without those that lie inside a page."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return [url for url in urls if not url.startswith("data:")]

    def close(self) -> None:
        """End the browser."""
        self.driver.quit()
