"""The page: its buttons one by one, and in a real browser one generation, one inpainting, and what goes wrong."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from pathlib import Path

import pytest
from conftest import frozen, tiny_pipeline
from PIL import Image
from processes import ROOT

from latent_dmmd.commands.demo import main

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
gradio = pytest.importorskip("gradio")


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The page of a tiny pipeline, served by the script."""
    if BROWSER is None:
        pytest.skip("no Chromium on this machine")
    folder = tmp_path_factory.mktemp("demo")
    tiny_pipeline(frozen("AutoencoderKL")).save_pretrained(folder / "tiny")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "scripts" / "demo.py"), "--pipelines", f"{{tiny: {folder / 'tiny'}}}"]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen([*command, "--server_port", str(port)], stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(url).close()
                break
            except OSError:
                assert server.poll() is None, (folder / "log").read_text()
                time.sleep(0.5)
        yield url
    finally:
        server.kill()
        server.wait()
    # a page that closes while it sends an image is no fault of the server's
    faults = [part for part in (folder / "log").read_text().split("Traceback")[1:] if "ClientDisconnect" not in part]
    assert not faults, faults[0]


@pytest.fixture
def page(address):
    """The page in a browser that notes every request to elsewhere."""
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(60_000)
        elsewhere = []
        page.on("request", lambda request: elsewhere.append(request.url) if not local(request.url, address) else None)
        page.goto(address)
        # the tiny pipeline has four noise levels
        page.get_by_label("number input for Noise levels").fill("4")
        yield page
        if os.environ.get("SCREENSHOTS"):
            page.screenshot(path=f"{os.environ['SCREENSHOTS']}/{time.monotonic_ns()}.png", full_page=True)
        browser.close()
    assert not elsewhere


def local(url, address):
    return url.startswith((address, "data:", "blob:"))


@pytest.fixture
def actions(tmp_path, monkeypatch):
    """What the buttons of the page of a tiny pipeline do."""
    from latent_dmmd.apps.demo import Actions

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    tiny_pipeline(frozen("AutoencoderKL")).save_pretrained(tmp_path / "tiny")
    return Actions({"tiny": str(tmp_path / "tiny")})


def test_files_for_the_page_are_gone_with_it(actions, tmp_path):
    path = Path(actions.packed([Image.new("RGB", (4, 4))]))
    assert path != Path(actions.packed([])) and path.is_relative_to(tmp_path)
    actions.files.cleanup()
    assert [p.name for p in tmp_path.iterdir()] == ["tiny"]


def test_buttons_generate_take_and_inpaint(actions):
    from latent_dmmd.apps import demo

    steps = []
    *shown, (grid, images, file) = actions.generate(
        "tiny", 0, 2, "approximate", demo.ANY, 1.0, 4, 2, lambda done, desc: steps.append(done)
    )
    assert steps == [(i, 8) for i in range(1, 9)] and len(shown) == 7 and all(s[1:] == (None, None) for s in shown)
    assert len(images) == 2 and zipfile.ZipFile(file).namelist() == ["00000.png", "00001.png"]
    assert grid.width == 2 * images[0].width

    taken = demo.take_image([(images[0], None)])
    painted = Image.new("RGBA", taken.size)
    painted.paste("red", (0, 0, taken.width // 2, taken.height))
    drawing = {"background": taken, "layers": [painted]}
    edited, _ = actions.inpaint("tiny", 0, drawing, 3, 2, 1.0, lambda *a, **k: None)
    assert len(edited) == 3 and edited[0].size == taken.size


def test_buttons_without_what_they_need_say_so(actions):
    from latent_dmmd.apps import demo

    image = Image.new("RGB", (16, 16))
    for action, message in {
        lambda: demo.take_image([]): "generate images first",
        lambda: actions.inpaint("tiny", 0, None, 1, 2, 1.0): "load an image first",
        lambda: actions.inpaint("tiny", 0, {"background": image, "layers": []}, 1, 2, 1.0): "first paint over",
        lambda: list(actions.generate("tiny", -1, 1, "exact", demo.ANY, 1.0, 4, 1)): "the seed must be a whole number",
        lambda: actions.diagnose("tiny", 0, "/nowhere", 4, 4, 1): "no folder or file /nowhere",
    }.items():
        with pytest.raises(gradio.Error, match=message):
            action()


def test_generate_then_inpaint(page):
    page.locator("#generate").click()
    page.locator("#images img").first.wait_for()
    page.locator("#flow img").wait_for()
    with page.expect_download() as download:
        page.locator("#download").click()
    assert download.value.suggested_filename == "images.zip"

    page.get_by_role("tab", name="Inpaint").click()
    page.locator("#take").click()
    page.wait_for_timeout(1500)
    box = page.locator("#drawing canvas").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 20, y)
    page.mouse.down()
    page.mouse.move(x + 20, y + 10, steps=5)
    page.mouse.up()
    page.get_by_label("number input for Steps", exact=True).fill("2")
    page.locator("#inpaint").click()
    page.locator("#edited img").first.wait_for()


def test_work_that_nobody_listens_to_ends():
    """As when a page is closed: the pipeline is free for the next call."""
    from latent_dmmd.apps.demo import steps_of

    done = []

    def run(report):
        for i in range(1000):
            done.append(i)
            report(i)
            time.sleep(0.001)

    reports = steps_of(run)
    assert next(reports) == 0
    reports.close()
    assert len(done) < 1000
    before = len(done)
    time.sleep(0.05)
    assert len(done) == before
    assert list(steps_of(lambda report: report(1) or 2)) == [1, 2]


def test_a_folder_without_a_pipeline_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"no pipeline in {tmp_path}"):
        main(["--pipelines", f"{{none: {tmp_path}}}"])


def inpaint_nothing(page):
    page.get_by_role("tab", name="Inpaint").click()
    page.locator("#inpaint").click()


def diagnose_nowhere(page):
    page.get_by_role("tab", name="Diagnose").click()
    page.get_by_label("Images it was trained on").fill("/nowhere")
    page.locator("#diagnose").click()


@pytest.mark.parametrize(
    "act, message",
    [(inpaint_nothing, "load an image first"), (diagnose_nowhere, "no folder or file /nowhere")],
)
def test_bad_input_is_a_message(page, act, message):
    from playwright.sync_api import TimeoutError

    for _ in range(3):  # on a busy machine, a tab that is still being built may drop what is typed or clicked
        act(page)
        try:
            return page.get_by_text(message).wait_for(timeout=20_000)
        except TimeoutError:
            page.reload()
    pytest.fail(f"the page never says {message!r}")
