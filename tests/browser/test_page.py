"""The page in a real browser (`make test-browser`); screenshots are left in runs/browser.

Most of it walks a scripted courtyard, which obeys by construction: what is tested is the page and the server. The
shipped world is walked as well, where there is one.
"""

import io

import numpy as np
import pytest
from PIL import Image

sync_api = pytest.importorskip("playwright.sync_api")

from tests.browser.pages import (  # noqa: E402
    CHROMIUM,
    FLAGS,
    ROOT,
    Server,
    flow_under,
    look,
    open_page,
    picture,
    scripted,
    shown,
    until,
    watch,
)

pytestmark = pytest.mark.browser
SHIPPED = ROOT / "assets" / "world"


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def courtyard():
    server = scripted("--chunk_seconds=0.03")
    yield server
    server.stop()


@pytest.fixture(scope="module", params=["scripted", "shipped"])
def world(request, courtyard):
    """A world that obeys: the scripted one, and the one of the repository."""
    if request.param == "scripted":
        yield courtyard
        return
    if not (SHIPPED / "bundle.json").exists():
        pytest.skip("no world is shipped yet")
    server = Server("experiments.serve", f"--run={SHIPPED}")
    yield server
    server.stop()


@pytest.fixture
def page(browser):
    context = browser.new_context(viewport={"width": 1280, "height": 860}, color_scheme="dark")
    yield context.new_page()
    context.close()


def test_holding_w_walks_and_nothing_is_wrong_on_the_console(page, world):
    errors = open_page(page, world)
    start = look(page)
    page.keyboard.down("w")
    until(lambda: shown(page)["keys"] == 1, "a frame made with W")
    assert page.locator("kbd[data-key=W].lit").count() == 1
    watch(page, 16)
    assert shown(page)["z"] > 0.5
    assert np.abs(look(page).astype(int) - start).mean() > 3
    page.keyboard.up("w")
    until(lambda: shown(page)["keys"] == 0, "W to be released")
    picture(page, f"walk-{world.name}")
    assert errors == []


def test_opposite_keys_give_opposite_flow(page, world):
    open_page(page, world)
    left, right = flow_under(page, "j"), flow_under(page, "l")
    assert left[0] > 0.5 and right[0] < -0.5, (left, right)  # turning left moves the picture to the right
    up, down = flow_under(page, "i"), flow_under(page, "k")
    assert up[1] > 0.3 and down[1] < -0.3, (up, down)


def test_an_event_is_acknowledged_and_seen(page, world):
    open_page(page, world)
    day = look(page).mean()
    night = page.get_by_role("button", name="night")
    night.click()
    until(lambda: night.get_attribute("aria-pressed") == "true", "the server to have heard")
    until(lambda: look(page).mean() < 0.75 * day, "night")
    picture(page, "night")
    page.keyboard.press("3")
    until(lambda: night.get_attribute("aria-pressed") == "false", "the server to have heard")
    until(lambda: look(page).mean() > 0.85 * day, "day")


def test_a_prompt_is_told_by_keyboard_alone(page, courtyard):
    open_page(page, courtyard)
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.type("wasd in the snow")  # letters are text here, not steps
    page.keyboard.press("Enter")
    until(lambda: "wasd in the snow" in page.locator("#toasts").inner_text(), "the words to be seen")
    assert shown(page)["keys"] == 0 and page.evaluate("document.activeElement.id") == "stage"
    reached = set()
    for _ in range(28):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
    assert {
        "places",
        "reset",
        "pause",
        "keep",
        "record",
        "seed",
        "dice",
        "crisp",
        "full",
        "help",
        "prompt",
    } <= reached
    assert {"Tell", "sun", "dusk", "night", "fog", "snow"} <= reached


def test_the_mouse_and_a_gamepad_look_and_walk(page, courtyard):
    page.add_init_script(
        """navigator.getGamepads = () => [globalThis.stick ?? null];
        globalThis.press = (axes) => { globalThis.stick = { connected: true, axes, buttons: [] }; };"""
    )
    open_page(page, courtyard)
    box = page.locator("#stage").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 120, y, steps=6)
    page.mouse.up()
    until(lambda: shown(page)["yaw"] > 0.25 and shown(page)["keys"] == 0, "a turn to the right that ends")
    assert shown(page)["yaw"] < 0.9  # 120 pixels are 26 degrees, and a chunk more at most
    page.evaluate("press([0, -1, -1, 0])")
    until(lambda: shown(page)["keys"] == 0b100001, "W and J by the sticks")
    page.evaluate("press([0, 0, 0, 0])")
    until(lambda: shown(page)["keys"] == 0, "the sticks to be let go")


def test_the_players_own_picture(page, courtyard):
    open_page(page, courtyard)
    page.keyboard.down("w")
    watch(page, 8)
    page.keyboard.up("w")
    file = io.BytesIO()
    Image.new("RGB", (300, 200), (250, 20, 20)).save(file, "JPEG")
    page.get_by_role("button", name="Places").click()
    picture(page, "places")
    photo = {"name": "red.jpg", "mimeType": "image/jpeg", "buffer": file.getvalue()}
    page.locator("#upload input").set_input_files(photo)
    until(lambda: shown(page)["z"] == 0 and shown(page)["number"] < 100, "a new world")
    watch(page, 2)
    red, green, _ = look(page).reshape(-1, 3).mean(0)
    assert red > green + 10
    page.locator("#upload input").set_input_files({**photo, "buffer": b"no picture"})
    until(lambda: "not an image" in page.locator("#toasts").inner_text(), "a word about it")
    watch(page, 4)  # and the walk goes on


def test_moments_are_kept_and_branched_from(page, courtyard):
    open_page(page, courtyard)
    page.keyboard.press("m")
    until(lambda: page.locator("#tree li").count() == 1, "the first moment")
    page.keyboard.down("w")
    watch(page, 12)
    page.keyboard.up("w")
    until(lambda: shown(page)["keys"] == 0, "W to be released")
    page.keyboard.press("m")
    until(lambda: page.locator("#tree li").count() == 2, "the second moment")
    assert "after 1" in page.locator("#tree li").nth(1).inner_text()
    page.get_by_role("button", name="Go back to moment 1").click()
    until(lambda: abs(shown(page)["z"]) < 0.01, "to be back")
    page.keyboard.down("l")
    watch(page, 12)
    page.keyboard.up("l")
    picture(page, "moments")
    page.get_by_role("button", name="Forget moment 2").click()
    until(lambda: page.locator("#tree li").count() == 1, "the moment to be forgotten")


def test_a_recorded_video_plays(page, courtyard):
    open_page(page, courtyard)
    page.keyboard.press("v")
    until(lambda: page.locator("#badge").is_visible(), "the sign that it records")
    page.keyboard.down("d")
    watch(page, 24)
    page.keyboard.up("d")
    page.keyboard.press("v")
    until(lambda: page.locator("#film").is_visible(), "the film")
    film = "(v => [v.videoWidth, v.currentTime])(document.querySelector('#film video'))"
    until(lambda: page.evaluate(film)[1] > 0.3, "the film to play")
    assert page.evaluate(film)[0] >= 320
    picture(page, "film")
    with page.expect_download() as download:
        page.get_by_role("link", name="Save the video").click()
    assert download.value.suggested_filename in ("walk.mp4", "walk.webm")
    import av

    with av.open(download.value.path()) as container:
        assert sum(1 for _ in container.decode(video=0)) >= 12


def test_two_pages_at_once(browser, courtyard):
    pages = [browser.new_context().new_page() for _ in range(2)]
    for page in pages:
        open_page(page, courtyard)
    pages[0].keyboard.down("w")
    for page in pages:
        watch(page, 12)
    assert shown(pages[0])["z"] > 0.2 and shown(pages[1])["z"] == 0
    for page in pages:
        page.context.close()


def test_a_full_house_is_polite_and_lets_in_later(browser, courtyard):
    pages = [browser.new_context().new_page() for _ in range(3)]
    for page in pages:
        open_page(page, courtyard)
    late = browser.new_context().new_page()
    late.goto(courtyard.url)
    until(lambda: "all 3 places are taken" in late.locator("#curtain-text").inner_text(), "a polite word")
    picture(late, "busy")
    for page in pages:
        page.context.close()
    watch(late, 4)
    late.context.close()


def test_a_page_comes_back_after_the_server_was_started_again(browser):
    server = scripted("--chunk_seconds=0.03")
    page = browser.new_context().new_page()
    open_page(page, server)
    server.stop()
    until(lambda: "connection was lost" in page.locator("#curtain-title").inner_text(), "a word about it")
    picture(page, "lost")
    server.start()
    before = page.evaluate("walk.frames")
    until(lambda: page.evaluate("walk.frames") > before + 8, "to walk again")
    assert not page.locator("#curtain").is_visible()
    page.context.close()
    server.stop()


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_a_narrow_screen_with_fingers(browser, courtyard, scheme):
    phone = {
        "viewport": {"width": 360, "height": 740},
        "has_touch": True,
        "is_mobile": True,
        "device_scale_factor": 2,
    }
    page = browser.new_context(**phone, color_scheme=scheme).new_page()
    errors = open_page(page, courtyard)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    box = page.locator("kbd[data-key=W]").bounding_box()
    assert box["width"] >= 32 and box["y"] + box["height"] < 740
    touch = page.context.new_cdp_session(page)
    at = [{"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}]
    touch.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": at})
    until(lambda: shown(page)["keys"] == 1, "W by finger")
    picture(page, f"phone-{scheme}")
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    until(lambda: shown(page)["keys"] == 0, "the finger to be lifted")
    assert errors == []
    page.context.close()
