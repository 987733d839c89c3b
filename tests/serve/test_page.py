"""The page in a real browser, on a service without a model and once on the real one."""

import contextlib
import io
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from PIL import Image, ImageChops, ImageOps

from ip2p_ray.errors import ConfigError, EditError, ImageError, ServiceError
from ip2p_ray.images import encode_png
from ip2p_ray.testing import FakeService, ServiceBehaviour
from serve import page_words
from tests.ports import free_port

CHROMIUM = Path("/usr/bin/chromium")
ROOT = Path(__file__).resolve().parent.parent.parent
SWITCHES = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
]
PICTURE = Image.linear_gradient("L").resize((96, 64)).convert("RGB")

needs_browser = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no {CHROMIUM}")


@contextlib.contextmanager
def running(module, answers, *arguments):
    """A server of serve/ in a process of its own, as soon as it answers."""
    port = free_port()
    command = [sys.executable, "-m", module, "--port", str(port), *map(str, arguments)]
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        until = time.monotonic() + 600
        while True:
            try:
                urlopen(f"http://127.0.0.1:{port}{answers}").close()
                break
            except URLError:
                assert process.poll() is None
                assert time.monotonic() < until
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(120)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def fake():
    with FakeService() as service:
        yield service


@pytest.fixture
def service(fake):
    fake.behaviour = ServiceBehaviour()
    fake.received.clear()
    return fake


@pytest.fixture(scope="module")
def address(fake):
    with running("serve.page", "/page/", "--server", fake.url) as url:
        yield url


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=str(CHROMIUM), args=SWITCHES, timeout=120_000
        )
        yield chromium
        chromium.close()


def both_are_shown(page):
    """Waits for both pictures of the slider, which come when they like."""
    page.wait_for_function("document.querySelectorAll('#slider img.pixels').length === 2")


@contextlib.contextmanager
def visit(browser, address, **options):
    """The page as a visitor sees it; whatever goes wrong behind it fails the test."""
    context = browser.new_context(viewport={"width": 1200, "height": 900}, **options)
    page = context.new_page()
    wrong = []

    def failed(request):
        # streams are closed by the page when it has read what it wanted
        if not any(name in request.url for name in ("/queue/data", "/heartbeat/", "/upload_prog")):
            wrong.append(f"failed: {request.url}")

    def asked(request):
        if not request.url.startswith((f"{address}/page", "data:", "blob:")):
            wrong.append(f"outside: {request.url}")

    def answered(response):
        if response.status >= 400:
            wrong.append(f"status {response.status}: {response.url}")

    page.on("request", asked)
    page.on("response", answered)
    page.on("requestfailed", failed)
    page.on("pageerror", lambda error: wrong.append(f"script: {error}"))
    page.on(
        "console",
        lambda said: wrong.append(f"console: {said.text}") if said.type == "error" else None,
    )
    page.set_default_timeout(120_000)
    page.goto(f"{address}/page/")
    page.wait_for_selector("#go")
    yield page
    page.remove_listener("requestfailed", failed)
    context.close()
    assert wrong == []


@pytest.fixture
def page(browser, address, service):
    with visit(browser, address) as page:
        yield page


def upload(page, data, name="boat.png"):
    page.locator("#picture input[type=file]").set_input_files(
        {"name": name, "mimeType": "image/png", "buffer": data}
    )


def choose(page):
    page.locator("#shipped button").first.click()
    page.wait_for_selector("#picture img")


def ask(page, instruction):
    page.locator("#instruction input").fill(instruction)
    page.keyboard.press("Enter")


def set_steps(page, steps):
    """As a person does, who is slower than Gradio is at filling what has just been opened."""
    page.locator("#settings button").first.click()
    number = page.locator("#steps input[type=number]")
    number.wait_for()
    # what is typed before the second frame, Gradio takes back
    page.evaluate(
        "() => new Promise(then => requestAnimationFrame(() => requestAnimationFrame(then)))"
    )
    number.fill(str(steps))
    number.press("Tab")
    assert number.input_value() == str(steps)


def is_shown(page, selector, text):
    page.locator(selector, has_text=text).wait_for()


@needs_browser
def test_an_uploaded_picture_is_edited_looked_at_and_downloaded(page, service):
    upload(page, encode_png(PICTURE))
    page.wait_for_selector("#picture img")
    ask(page, "make it <b>night</b>")
    page.wait_for_selector("#slider img")
    is_shown(page, "#caption", "make it <b>night</b>")
    [sent] = service.received
    is_shown(page, "#caption", f"seed {sent['seed']} ")
    assert sent["image"] == encode_png(PICTURE)
    assert sent["prompt"] == "make it <b>night</b>"
    assert page.locator("#slider .content img").count() == 2
    both_are_shown(page)

    with page.expect_download() as waiting:
        page.locator("#download").click()
    assert waiting.value.suggested_filename == f"make-it-b-night-b-{sent['seed']}.png"
    downloaded = Image.open(io.BytesIO(Path(waiting.value.path()).read_bytes()))
    assert ImageChops.difference(downloaded, ImageOps.invert(PICTURE)).getbbox() is None

    page.locator("#more").click()
    page.locator("#history button").nth(1).wait_for()
    again = service.received[-1]
    assert again["seed"] == sent["seed"]
    assert float(again["text_guidance_scale"]) > float(sent["text_guidance_scale"])
    assert float(again["image_guidance_scale"]) < float(sent["image_guidance_scale"])
    is_shown(page, "#caption", "follow 2.5")
    page.locator("#history button").nth(1).click()
    is_shown(page, "#caption", "follow 2 ")

    page.locator("#onward").click()
    page.locator("#picture img[src*='make-it-b-night-b-']").wait_for()
    ask(page, "make it day")
    page.locator("#history button").nth(2).wait_for()
    before = Image.open(io.BytesIO(service.received[-1]["image"]))
    assert ImageChops.difference(before, ImageOps.invert(PICTURE)).getbbox() is None


@needs_browser
def test_shipped_pictures_and_examples_are_a_click_away(page, service):
    choose(page)
    assert page.locator("#shipped img").first.get_attribute("alt") == "a red boat on the sea"
    page.locator("#examples button", has_text="boat").first.click()
    page.wait_for_function("document.querySelector('#instruction input').value.includes('boat')")
    page.locator("#go").click()
    page.wait_for_selector("#slider img")
    assert "boat" in service.received[0]["prompt"]
    assert Image.open(io.BytesIO(service.received[0]["image"])).size == (64, 64)


@needs_browser
def test_an_edit_shows_how_far_it_is_and_can_be_stopped(page, service):
    service.behaviour = ServiceBehaviour(steps=100, step_s=0.4)
    choose(page)
    set_steps(page, 100)
    ask(page, "make it night")
    page.wait_for_selector("#stage img.preview.pixels")
    is_shown(page, "#stage", " of 100")
    assert service.in_flight == 1
    page.locator("#stop").click()
    page.wait_for_selector("#go")
    is_shown(page, "#stage", "appears here")
    until = time.monotonic() + 120
    while service.in_flight and time.monotonic() < until:
        time.sleep(0.05)
    assert service.in_flight == 0


@needs_browser
def test_settings_stand_where_the_service_says_but_for_those_that_were_set(
    browser, address, service
):
    said = {"steps": 33, "text_guidance_scale": 7.5, "image_guidance_scale": 1.25}
    moved = threading.Event()
    service.behaviour = ServiceBehaviour(defaults=said, models_after=moved)
    with visit(browser, address) as page:
        set_steps(page, 7)
        assert page.locator("#text-scale input[type=number]").input_value() == "2"
        moved.set()
        page.wait_for_function(
            "document.querySelector('#text-scale input[type=number]').value === '7.5'"
        )
        choose(page)
        ask(page, "make it night")
        page.wait_for_selector("#slider img")
    sent = service.received[0]
    assert float(sent["steps"]) == 7
    assert float(sent["text_guidance_scale"]) == 7.5
    assert float(sent["image_guidance_scale"]) == 1.25


@needs_browser
def test_a_file_that_is_no_picture_is_refused_in_words(page, service):
    upload(page, encode_png(PICTURE)[:200])
    is_shown(page, "#stage [role=alert]", "This picture cannot be used.")
    ask(page, "make it night")
    is_shown(page, "#stage [role=alert]", "Choose a picture first.")
    upload(page, b"no picture at all")
    is_shown(page, "#stage [role=alert]", "This picture cannot be used.")
    ask(page, "make it night")
    is_shown(page, "#stage [role=alert]", "Choose a picture first.")
    choose(page)
    ask(page, "  ")
    is_shown(page, "#stage [role=alert]", "Say what should change.")
    assert not service.received


@needs_browser
def test_a_full_queue_is_told_and_the_next_try_succeeds(page, service):
    service.behaviour = ServiceBehaviour(full=1, retry_after_s=7)
    choose(page)
    ask(page, "make it night")
    is_shown(page, "#stage [role=alert]", "The editor is busy.")
    is_shown(page, "#stage [role=alert]", "Try again in 7 s")
    page.locator("#go").click()
    page.wait_for_selector("#slider img")


@needs_browser
def test_a_service_with_keys_is_asked_with_the_visitors(browser, address, service):
    service.behaviour = ServiceBehaviour(api_key="right-key")
    with visit(browser, address) as page:
        is_shown(page, "#stage [role=alert]", "The editor wants a key.")
        choose(page)
        for key in ("wrong-key", "right-key"):
            page.locator("#key input").fill(key)
            assert page.locator("#key input").get_attribute("type") == "password"
            ask(page, "make it night")
            if key == "wrong-key":
                is_shown(page, "#stage [role=alert]", "The key is not the right one.")
        page.wait_for_selector("#slider img")


@needs_browser
def test_a_phone_needs_no_sideways_scrolling(browser, address, service):
    with visit(browser, address, is_mobile=True, has_touch=True) as page:
        page.set_viewport_size({"width": 360, "height": 740})
        page.locator("#shipped button").nth(1).tap()
        page.wait_for_selector("#picture img")
        ask(page, "make it night")
        page.wait_for_selector("#slider img")
        page.locator("#settings button").first.tap()
        page.wait_for_selector("#advice")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        boxes = [page.locator(name).bounding_box() for name in ("#go", "#slider", "#settings")]
        assert [box["y"] for box in boxes] == sorted(box["y"] for box in boxes)


@needs_browser
def test_the_keyboard_is_enough(page, service):
    def tab_to(selector):
        for _ in range(60):
            page.keyboard.press("Tab")
            if page.evaluate("name => document.activeElement.closest(name) !== null", selector):
                return
        pytest.fail(f"no Tab leads to {selector}")

    page.wait_for_selector("#shipped button img")
    tab_to("#shipped button")
    page.keyboard.press("Enter")
    page.wait_for_selector("#picture img")
    tab_to("#instruction")
    page.keyboard.type("make it night")
    page.keyboard.press("Enter")
    page.wait_for_selector("#slider .outer[tabindex='0']")
    both_are_shown(page)
    tab_to("#slider .outer")
    handle = page.locator("#slider .outer")
    stood = handle.bounding_box()["x"]
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert handle.bounding_box()["x"] < stood - 20
    page.wait_for_selector("#history button")
    tab_to("#history button")
    page.keyboard.press("Enter")
    is_shown(page, "#caption", f"seed {service.received[0]['seed']} ")


@needs_browser
def test_a_picture_can_be_dropped(page, service):
    dropped = page.evaluate_handle(
        """bytes => {
            const files = new DataTransfer();
            files.items.add(new File([new Uint8Array(bytes)], "boat.png", {type: "image/png"}));
            return files;
        }""",
        list(encode_png(PICTURE)),
    )
    page.dispatch_event("#picture button", "drop", {"dataTransfer": dropped})
    page.wait_for_selector("#picture img")
    ask(page, "make it night")
    page.wait_for_selector("#slider img")
    assert service.received[0]["image"] == encode_png(PICTURE)


@needs_browser
def test_the_real_service_edits_behind_the_page(browser):
    with (
        running("serve.local", "/healthz") as service,
        running("serve.page", "/page/", "--server", service) as address,
        visit(browser, address) as page,
    ):
        choose(page)
        ask(page, "make it night")
        page.wait_for_selector("#slider img")
        with page.expect_download() as waiting:
            page.locator("#download").click()
        edited = Image.open(io.BytesIO(Path(waiting.value.path()).read_bytes()))
        assert edited.size == (64, 64)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ServiceError("http://secret-host cannot be reached: refused"), "does not answer"),
        (ImageError("the image has too many pixels"), "the image has too many pixels"),
        (EditError("http://secret-host could not finish"), "could not be finished"),
        (ConfigError("prompt is <i>too long</i>"), "prompt is &lt;i&gt;too long&lt;/i&gt;"),
    ],
)
def test_errors_are_told_in_words_without_hosts_and_markup(error, told):
    said = page_words.told_error(error)
    assert told in said
    assert "secret-host" not in said
    assert 'role="alert"' in said


@pytest.mark.parametrize("scene", page_words.SCENES)
def test_suggestions_fit_the_shipped_picture(scene):
    from ip2p_ray.miniature.grammar import apply_instruction, describe

    suggested = page_words.suggestions(scene)
    assert len(set(suggested)) == len(suggested) >= 4
    assert all(apply_instruction(describe(scene), text) is not None for text in suggested)
