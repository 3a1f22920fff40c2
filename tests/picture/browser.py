"""Debian's headless Chromium, which looks at a page as a user does."""

import shutil
import subprocess

import av
import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (apt-get install chromium)")


def _chromium(folder, *arguments):
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
    command += [f"--user-data-dir={folder / 'chromium'}", "--virtual-time-budget=3000"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120, check=True).stdout


def dom(folder, page):
    """The document, after all scripts, as text."""
    return _chromium(folder, "--dump-dom", page.as_uri())


def screenshot(folder, page, width, height):
    """uint8 RGB [height, width, 3]."""
    file = folder / "screenshot.png"
    _chromium(folder, f"--screenshot={file}", f"--window-size={width},{height}", page.as_uri())
    with av.open(str(file)) as container:
        return next(container.decode(video=0)).to_ndarray(format="rgb24")
