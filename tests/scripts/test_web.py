"""demo/web.py: the page in a real browser, headless Chromium; and its command."""

import importlib
import json
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from demo import web
from models.editing import outpainted
from tests.conftest import ROOT
from tests.processes import forked, free_port
from tests.scripts.conftest import pixels
from tests.scripts.page import SECONDS, Site, Visitor, chromium
from tests.scripts.test_generate import bomb
from util.data.images import read_settings

# --------------------------------------------------------------------------------------------------------------------
# The server, whose model waits for leave, and the browser.


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[Site]:
    site = Site(tmp_path_factory.mktemp("served"))
    yield site
    site.page.close()


@pytest.fixture
def site(served) -> Site:
    served.begin()
    return served


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture
def visit(browser, site):
    """``visit()`` opens the page as another :class:`Visitor`."""
    visitors: list[Visitor] = []

    def visit(**options) -> Visitor:
        visitors.append(Visitor(browser, site.url, **options))
        return visitors[-1]

    yield visit
    site.go_on()
    for visitor in visitors:
        visitor.context.close()


# --------------------------------------------------------------------------------------------------------------------
# Making.


def test_a_class_is_searched_and_made_by_keyboard_without_another_host(visit, site, tmp_path):
    visitor = visit()
    assert visitor.number("steps") == 16 and visitor.number("guidance") == 3
    visitor.choose("class", "be")
    assert visitor.page.locator("#class input").input_value() == "bee (1)"
    visitor.page.locator("#generate").focus()
    visitor.page.keyboard.press("Enter")
    says = visitor.until("Generated")
    made = site.alone(1, seeds=0, num_iter=16, cfg=3.0)
    assert says == f"Generated: bee, seed 0: {made.log_likelihoods[0]:.1f} nats"
    assert np.array_equal(visitor.picture(), np.asarray(made.images[0]))
    surest = made.confidence[0].numpy()
    least, most = (np.unravel_index(at, (4, 4)) for at in (surest.argmin(), surest.argmax()))
    confidence = visitor.picture("confidence")[::4, ::4]
    assert confidence[least].tolist() == [68, 1, 84] and confidence[most].tolist() == [
        253,
        231,
        36,
    ]  # viridis' ends
    assert visitor.download(tmp_path / "bee.png") == "class-1-seed-0.png"
    assert np.array_equal(pixels(tmp_path / "bee.png"), np.asarray(made.images[0]))
    for url in visitor.requested:
        assert url.startswith((site.url, "data:", "blob:")), url
    assert visitor.complaints == []


@pytest.mark.slow
def test_settings_come_back_from_a_png(visit, site, tmp_path):
    visitor = visit()
    for name, value in {"seed": 41, "steps": 5, "guidance": 1.5, "temperature": 0.8}.items():
        visitor.set(name, value)
    visitor.choose("class", "dog")
    visitor.page.locator("#order").get_by_text("raster").click()
    visitor.click("generate")
    visitor.until("Generated: .*seed 41")
    visitor.download(tmp_path / "dog.png")
    how = {
        "num_iter": 5,
        "cfg": 1.5,
        "cfg_schedule": "linear",
        "temperature": 0.8,
        "order": "raster",
    }
    settings = read_settings(tmp_path / "dog.png")
    assert settings == {"class_labels": [3], "seeds": [41], **how}
    assert np.array_equal(site.pixels(**settings), pixels(tmp_path / "dog.png"))
    other = visit()
    other.hand("load", tmp_path / "dog.png")
    other.page.wait_for_function("document.querySelector('#seed input').value == 41")
    assert other.status() == "Settings of dog.png"
    assert [other.number(name) for name in ("steps", "guidance", "temperature")] == [5, 1.5, 0.8]
    other.click("generate")
    other.until("Generated: .*seed 41")
    other.download(tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "dog.png").read_bytes()
    info = web.png_settings(
        {**settings, "seeds": [41, 42], "gen_seed": 3, "cfg_interval": [0, 1], "cfg_reuse": 2}
    )
    Image.new("RGB", (16, 16)).save(tmp_path / "more.png", pnginfo=info)
    other.hand("load", tmp_path / "more.png")
    other.until("Settings of more.png, without gen_seed 3, cfg_reuse 2, 1 other image")
    for name, text in {
        "other": {"class_labels": [9]},
        "damaged": {"class_labels": "x", "seeds": "y"},
    }.items():
        info = web.png_settings({"seeds": [1], **text})
        Image.new("RGB", (16, 16)).save(tmp_path / f"{name}.png", pnginfo=info)
    Image.new("RGB", (16, 16)).save(tmp_path / "none.png")
    says = {"other": "no class 9", "damaged": "no class 'x'", "none": "none.png holds no settings"}
    for name, told in says.items():
        other.hand("load", tmp_path / f"{name}.png")
        assert told in other.told()
    assert other.number("seed") == 41


def test_the_picture_fills_in_step_by_step(visit, site):
    site.begin(waits=True)
    visitor = visit()
    visitor.set("count", 2)
    visitor.click("generate")
    grey = []
    for step in range(1, 16):
        site.leave.release()
        visitor.until(f"Step {step} of 16")
        sheet = visitor.picture()
        assert sheet.shape == (16, 32, 3)
        grey.append((sheet == 128).all(axis=2).sum())
    assert grey == sorted(set(grey), reverse=True)  # fewer with each step
    site.go_on()
    visitor.until("Generated: .*seed 0")
    visitor.page.locator("#gallery button").nth(1).click()
    visitor.until("Generated: .*seed 1")
    assert np.abs(visitor.picture() - site.pixels(0, seeds=1).astype(int)).max() <= 1


@pytest.mark.slow
def test_work_is_cancelled(visit, site):
    site.begin(waits=True)
    visitor = visit()
    visitor.click("generate")
    site.leave.release(2)
    visitor.until("Step 2 of 16")
    visitor.click("cancel")
    visitor.until("Cancelled")
    assert site.rest() <= 3
    site.go_on()
    visitor.set("seed", 7)
    visitor.click("generate")
    visitor.until("Generated: .*seed 7")


@pytest.mark.slow
def test_a_page_that_is_closed_half_way_ends_its_work(visit, site):
    site.begin(waits=True)
    leaving, waiting = visit(), visit()
    leaving.click("generate")
    site.leave.release(2)
    leaving.until("Step 2 of 16")
    waiting.set("seed", 5)
    waiting.click("generate")
    leaving.page.close()
    assert site.rest() <= 16 + 4  # not the 14 that were left, and 16
    waiting.until("Generated: .*seed 5")
    assert np.array_equal(waiting.picture(), site.pixels(0, seeds=5))


@pytest.mark.slow
def test_two_visitors_at_once_get_what_each_asked_for(visit, site):
    site.begin(waits=True)
    visitors = [visit(), visit()]
    for seed, (visitor, name) in enumerate(zip(visitors, ("bee", "dog"), strict=True)):
        visitor.choose("class", name)
        visitor.set("seed", seed)
        visitor.click("generate")
        site.leave.release()
        visitors[0].until("Step 1 of 16")
    assert visitors[1].status() == "Nothing generated yet"  # it waits
    site.go_on()
    for seed, (visitor, label) in enumerate(zip(visitors, (1, 3), strict=True)):
        visitor.until(f"Generated: .*seed {seed}")
        assert f"class-{label}-seed-{seed}.png" in visitor.page.locator(
            "#picture img"
        ).get_attribute("src")
        assert np.array_equal(visitor.picture(), site.pixels(label, seeds=seed))


@pytest.mark.slow
def test_a_phone_shows_all_of_it(visit, site):
    visitor = visit(width=390, height=844, is_mobile=True, has_touch=True)
    visitor.set("count", 3)
    visitor.page.tap("button#generate")
    visitor.until("Generated")
    visitor.page.tap("button#again")
    visitor.page.wait_for_selector("#editor canvas")
    for name in (
        "class",
        "seed",
        "count",
        "edit",
        "status",
        "picture",
        "confidence",
        "gallery",
        "download",
    ):
        box = visitor.page.locator(f"#{name}").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["height"] > 20, name
    assert visitor.page.evaluate("document.documentElement.scrollWidth") <= 390


# --------------------------------------------------------------------------------------------------------------------
# Editing.


@pytest.mark.slow
def test_a_picture_is_edited_under_a_drawn_mask_the_likeliest_first(visit, site, tmp_path):
    original = np.random.RandomState(0).randint(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(original).save(tmp_path / "in.png")
    visitor = visit()
    visitor.page.get_by_role("tab", name="Edit").click()
    visitor.hand("open", tmp_path / "in.png")
    visitor.page.wait_for_selector("#editor canvas")
    visitor.page.wait_for_timeout(1000)
    visitor.draw(0.75, 0.95)
    visitor.set("count", 5)
    visitor.click("edit")
    visitor.until("Generated")
    made = visitor.picture()
    changed = (made != original).any(axis=(1, 2))
    assert not changed[:8].any() and changed[13:15].all()
    scores = [
        float(text.split()[-2])
        for text in visitor.page.locator("#gallery .caption-label").all_inner_texts()
    ]
    assert len(scores) == 5 and scores == sorted(scores, reverse=True)
    visitor.download(tmp_path / "out.png")
    assert np.array_equal(pixels(tmp_path / "out.png"), made)


@pytest.mark.slow
def test_a_part_is_covered_without_drawing(visit, site):
    visitor = visit()
    visitor.click("generate")
    visitor.until("Generated")
    before = visitor.picture()
    visitor.click("again")
    visitor.page.wait_for_selector("#editor canvas")
    visitor.choose("area", "lower half")
    visitor.page.wait_for_timeout(1000)
    visitor.set("seed", 3)
    visitor.click("edit")
    visitor.until("Generated: .*seed 3")
    lower = Image.new("L", (16, 16))
    lower.paste(255, (0, 8, 16, 16))
    expected = site.pixels(0, image=Image.fromarray(before), mask_image=lower, seeds=3)
    assert np.array_equal(visitor.picture(), expected)


@pytest.mark.slow
def test_a_picture_is_extended_and_varied(visit, site):
    visitor = visit()
    visitor.click("generate")
    visitor.until("Generated")
    before = Image.fromarray(visitor.picture())
    visitor.click("again")
    visitor.page.wait_for_selector("#editor canvas")
    visitor.set("margin", 3)
    visitor.set("seed", 4)
    visitor.click("extend")
    visitor.until("Generated: .*seed 4")
    image, mask = outpainted(before, 16, 3)
    assert np.array_equal(visitor.picture(), site.pixels(0, image=image, mask_image=mask, seeds=4))
    visitor.set("strength", 0.25)
    visitor.set("seed", 5)
    visitor.click("vary")
    visitor.until("Generated: .*seed 5")
    assert np.array_equal(visitor.picture(), site.pixels(0, image=before, strength=0.25, seeds=5))
    gray = (visitor.picture("confidence") == 160).all(axis=2)
    assert gray.mean() == 0.75  # tokens that are kept


# --------------------------------------------------------------------------------------------------------------------
# What is refused.


@pytest.mark.slow
def test_what_cannot_be_made_is_told_and_the_page_goes_on(visit, site, tmp_path):
    visitor = visit()
    visitor.choose("class", "bea")
    visitor.click("generate")
    assert "no class 'bea': did you mean bee?" in visitor.told()
    visitor.choose("class", "cat")
    visitor.set("seed", 2**32 - 1)
    visitor.set("count", 2)
    visitor.click("generate")
    assert "seeds must be whole numbers from 0 to 4294967295" in visitor.told()
    visitor.set("seed", 0)
    visitor.page.get_by_role("tab", name="Edit").click()
    visitor.click("edit")
    assert "there is no image to edit" in visitor.told()
    (tmp_path / "text.png").write_text("no image")
    bomb(tmp_path / "bomb.png")
    (tmp_path / "heavy.png").write_bytes(bytes(web.MAX_UPLOAD + 1))
    (tmp_path / "page.html").write_text("<p>")
    for name, says in {
        "text.png": "cannot read image text.png (it is no image)",
        "bomb.png": "decompression bomb",
        "heavy.png": "exceed the maximum allowed size",
        "page.html": "file type",
    }.items():
        visitor.hand("open", tmp_path / name)
        told = visitor.told()
        assert says in told and "/tmp" not in told, name
    Image.new("RGB", (30, 20)).save(tmp_path / "in.jpg")
    visitor.hand("open", tmp_path / "in.jpg")
    visitor.page.wait_for_selector("#editor canvas")
    visitor.page.wait_for_timeout(1000)
    visitor.click("edit")
    assert "the mask covers nothing: draw on the parts to regenerate" in visitor.told()
    visitor.click("cancel")  # of nothing
    visitor.page.get_by_role("tab", name="Generate").click()
    visitor.click("generate")
    visitor.until("Generated: .*seed 0")


def test_no_file_of_the_machine_is_served(site):
    for path in (
        "/etc/passwd",
        "/proc/self/environ",
        ROOT / "README.md",
        "README.md",
        "../etc/passwd",
        "demo/web.py",
    ):
        for address in (
            f"gradio_api/file={path}",
            f"file={path}",
            f"static/{path}",
            f"assets/{path}",
        ):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(f"{site.url}{address}")
            assert refused.value.code in (403, 404), address


@pytest.mark.slow
def test_the_command_serves_to_this_machine_alone(
    weights, vae_path, refused, tmp_path, monkeypatch
):
    model, port = f"--resume {tmp_path}/weights --vae_path {vae_path} --device cpu", free_port()
    command = [sys.executable, "demo/web.py", *model.split(), "--port", str(port)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as server:
        try:
            line = next(line for line in server.stderr if "serving" in line)
            assert f"serving on http://127.0.0.1:{port}/; stop with Ctrl-C" in line
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/config") as config:
                assert json.load(config)["analytics_enabled"] is False
            sockets = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
            assert [
                each[1] for each in sockets if each[3] == "0A" and each[1].endswith(f":{port:04X}")
            ] == [f"0100007F:{port:04X}"]
            assert "Address already in use" in refused("demo.web", f"{model} --port {port}")
            server.send_signal(signal.SIGINT)
            assert server.wait(SECONDS) == 0
        finally:
            server.kill()
    for flags, says in {
        "--resume nowhere": "there is no file or folder nowhere",
        f"--resume {tmp_path}/weights": "has no tokenizer beside it",
        "": "--resume is missing",
        f"{model} --port 0": "--port 0: it must lie between 1 and 65535",
        f"{model} --host 192.0.2.1": "cannot serve on 192.0.2.1",
    }.items():
        assert says in refused("demo.web", f"{flags} --device cpu"), flags


def test_the_package_that_may_be_missing_is_named(capfd):
    def import_without_gradio(rank: int) -> None:
        del sys.modules["demo.web"]
        sys.modules["gradio"] = None
        importlib.import_module("demo.web")

    assert forked(1, import_without_gradio)[1] == [2]
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "pip install gradio" in said
