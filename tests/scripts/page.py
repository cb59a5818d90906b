"""The web page's server on a model that waits for leave, and visitors in a real browser, headless Chromium.

``python -m tests.scripts.page`` makes the documentation's pictures of the page, after ``make demo``.
"""

import io
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from demo import web
from models.pipeline import TokenBridgePipeline
from tests.conftest import ROOT, tiny_pipeline
from tests.processes import free_port
from tests.scripts.conftest import pixels

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SECONDS = 60  # that the page may take to show something


class Site:
    """A served page of a tiny model, which takes a step when it may."""

    def __init__(self, folder: Path):
        self.pipe, self.alone = tiny_pipeline(), tiny_pipeline()
        model = self.pipe.model
        self.steps, self.leave, self.waits = 0, threading.Semaphore(0), False
        sample = model.sample_tokens

        def sample_tokens(*args, on_step, **options):
            def stepped(*step):
                assert not self.waits or self.leave.acquire(timeout=SECONDS)
                self.steps += 1
                on_step(*step)

            return sample(*args, on_step=stepped, **options)

        model.sample_tokens = sample_tokens
        self.page = web.build(self.pipe, str(folder))
        web.launch(self.page, "127.0.0.1", free_port(), block=False)
        self.url = self.page.local_url

    def begin(self, waits: bool = False) -> None:
        """Before a test: whether the model waits."""
        self.steps, self.leave, self.waits = 0, threading.Semaphore(0), waits

    def go_on(self) -> None:
        """The model waits no more."""
        self.waits = False
        self.leave.release(1000)

    def rest(self) -> int:
        """Lets the model take one step after the other until nothing is worked on; how many it took."""
        before, end = self.steps, time.monotonic() + SECONDS
        while any(thread.name == web.WORKER for thread in threading.enumerate()):
            assert time.monotonic() < end
            self.leave.release()
            time.sleep(0.2)  # time to hear that it is not wanted any more
        return self.steps - before

    def pixels(self, *args, **options) -> np.ndarray:
        """What the pipeline makes, at the page's settings."""
        return np.asarray(self.alone(*args, **{"num_iter": 16, "cfg": 3.0, **options}).images[0])


@contextmanager
def chromium() -> Iterator:
    """The browser; a test is skipped where there is none."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("NO BROWSER, so the web page is not tested: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox"]
        )  # root has none
        yield browser
        browser.close()


class Visitor:
    """Someone at the page, in a browser of their own."""

    def __init__(self, browser, url: str, width: int = 1200, height: int = 900, **options):
        self.context = browser.new_context(viewport={"width": width, "height": height}, **options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(1000 * SECONDS)
        self.requested, self.complaints = [], []
        self.page.on("request", lambda request: self.requested.append(request.url))
        self.page.on(
            "console",
            lambda said: self.complaints.append(said.text) if said.type == "error" else None,
        )
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(url)
        self.page.wait_for_selector("#generate")

    def click(self, button: str) -> None:
        self.page.click(f"button#{button}")

    def set(self, name: str, value: float) -> None:
        field = self.page.locator(f"#{name} input[type=number]")
        field.fill(str(value))
        field.blur()

    def number(self, name: str) -> float:
        return float(self.page.locator(f"#{name} input[type=number]").input_value())

    def status(self) -> str:
        return self.page.locator("#status").locator("textarea, input").input_value()

    def until(self, status: str) -> str:
        """Waits until the page says what matches a pattern, and returns all of it."""
        end = time.monotonic() + SECONDS
        while not re.match(status, self.status()):
            assert time.monotonic() < end, f"waited for {status!r}, was told {self.status()!r}"
            self.page.wait_for_timeout(50)
        if status.startswith("Generated"):
            self.page.wait_for_selector("#picture img[src*=class-]")
        return self.status()

    def told(self) -> str:
        """Waits for an error, closes and returns it."""
        toast = self.page.locator(".toast-body").first
        text = toast.inner_text()
        toast.locator("button").first.click()
        toast.wait_for(state="detached")
        return text

    def picture(self, of: str = "picture") -> np.ndarray:
        """The picture that is shown."""
        source = self.page.locator(f"#{of} img").get_attribute("src")
        answer = self.page.request.get(source)
        assert answer.ok, (answer.status, answer.text(), source)
        return pixels(io.BytesIO(answer.body()))

    def hand(self, button: str, path) -> None:
        """Uploads a file."""
        with self.page.expect_file_chooser() as chooser:
            self.click(button)
        chooser.value.set_files(str(path))

    def download(self, path):
        """Downloads the picture to ``path``."""
        with self.page.expect_download() as download:
            self.page.click("#download")
        download.value.save_as(path)
        return download.value.suggested_filename

    def choose(self, field: str, text: str) -> None:
        """Types into a list to choose from, by keyboard alone."""
        self.page.locator(f"#{field} input").focus()
        self.page.keyboard.press("Control+a")
        self.page.keyboard.type(text)
        self.page.wait_for_timeout(500)  # as long as a person takes
        self.page.keyboard.press("ArrowDown")
        self.page.keyboard.press("Enter")
        self.page.wait_for_timeout(100)

    def draw(self, top: float, bottom: float) -> None:
        """Draws on the picture from side to side, between shares of its height."""
        self.page.locator("#editor").scroll_into_view_if_needed()
        box = self.page.locator("#editor canvas").first.bounding_box()
        middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        side = 0.8 * min(box["width"], box["height"])  # of the picture, which has a margin
        for share in np.linspace(top - 0.5, bottom - 0.5, 4):
            self.page.mouse.move(middle[0] - side / 2, middle[1] + side * share)
            self.page.mouse.down()
            self.page.mouse.move(middle[0] + side / 2, middle[1] + side * share, steps=8)
            self.page.mouse.up()


def main() -> None:
    """Writes docs/page.png and docs/page_phone.png."""
    folder = tempfile.TemporaryDirectory()
    page = web.build(TokenBridgePipeline.from_pretrained(ROOT / "output" / "demo"), folder.name)
    web.launch(page, "127.0.0.1", free_port(), block=False)
    with chromium() as browser:
        for name, width, height in (("page", 1200, 1000), ("page_phone", 390, 844)):
            visitor = Visitor(browser, page.local_url, width, height)
            visitor.choose("class", "3")
            visitor.set("count", 4)
            visitor.set("guidance", 2)
            visitor.click("generate")
            visitor.until("Generated")
            if name == "page":
                visitor.click("again")
                visitor.page.wait_for_selector("#editor canvas")
                visitor.page.wait_for_timeout(1000)
                visitor.draw(0.65, 0.92)
                visitor.choose("class", "9")
                visitor.click("edit")
                visitor.page.wait_for_timeout(3000)
                visitor.page.evaluate("scrollTo(0, 0)")
            visitor.page.wait_for_timeout(500)
            visitor.page.screenshot(path=ROOT / "docs" / f"{name}.png", full_page=True)
    page.close()
    folder.cleanup()


if __name__ == "__main__":
    main()
