"""The browser that tests of the page drive: Chromium or Chrome of the system, or else Playwright's own.

As a program it fails if none starts: .ci/install_chromium asks.
"""

from __future__ import annotations

import shutil
import sys

from playwright.sync_api import Browser, Error, Playwright, sync_playwright

SYSTEM = ("chromium", "chromium-browser", "google-chrome")


def start_chromium(driver: Playwright) -> Browser:
    """Return the first one that starts; what has the name of a browser may only advise to install it.

    Raises:
        Error: of Playwright, if none does.
    """
    for path in filter(None, map(shutil.which, SYSTEM)):
        try:
            return _start(driver, path)
        except Error:
            pass
    return _start(driver, None)


def _start(driver: Playwright, path: str | None) -> Browser:
    return driver.chromium.launch(executable_path=path, args=["--no-sandbox"])


if __name__ == "__main__":
    with sync_playwright() as playwright:
        try:
            start_chromium(playwright).close()
        except Error as error:
            sys.exit(f"error: {str(error).splitlines()[0]}")
