"""The page in a browser: it asks nobody but its server, and can be used without a mouse."""

import shutil

import pytest

pytest.importorskip("uvicorn", reason="smoe[serve]")
playwright = pytest.importorskip("playwright.sync_api", reason="a browser's driver")
from support.server import serving, until  # noqa: E402

BROWSER = shutil.which("chromium")
TOKENS = "input[name=max_tokens]"


@pytest.fixture(scope="module")
def client(goldens):
    with serving(goldens[6]) as served:  # whose answers go on
        yield served


@pytest.fixture(scope="module")
def browser():
    if BROWSER is None:
        pytest.skip("there is no chromium")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser, client):
    opened = browser.new_page()
    opened.wrong, opened.asked = [], []
    opened.on("console", lambda said: opened.wrong.append(said.text) if said.type == "error" else 0)
    opened.on("pageerror", lambda error: opened.wrong.append(str(error)))
    opened.on("request", lambda request: opened.asked.append(request.url))
    opened.goto(f"http://127.0.0.1:{client.port}/")
    opened.wait_for_selector("#state[data-is=ok]")
    yield opened
    own = f"http://127.0.0.1:{client.port}/"
    assert opened.wrong == []
    assert all(url.startswith((own, "data:")) for url in opened.asked)
    opened.close()


def _set(page, tokens):
    page.evaluate("document.querySelector('details.settings').open = true")
    page.fill(TOKENS, str(tokens))
    page.fill("input[name=temperature]", "0")


def test_a_chat_by_keyboard(page):
    assert page.title().startswith("pico")
    assert page.evaluate("document.activeElement.id") == "said"
    _set(page, 12)
    page.focus("#said")
    page.keyboard.type("def main():")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("    pass")
    page.keyboard.press("Enter")
    page.wait_for_selector(".assistant small")
    assert "12 tokens" in page.inner_text(".assistant small")
    assert page.inner_text(".user") == "def main():\n    pass"
    assert page.evaluate("document.activeElement.id") == "said"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "send"


def test_an_answer_is_stopped(page, client):
    _set(page, 200)
    page.focus("#said")
    page.keyboard.type("x")
    page.keyboard.press("Enter")
    page.keyboard.press("Escape")
    page.wait_for_selector(".assistant small")
    assert page.inner_text(".assistant small").startswith("stopped")
    page.wait_for_function("!document.getElementById('send').disabled")
    until(lambda: not client.busy(), 5)


def test_a_refusal_is_shown(page):
    _set(page, 100000)
    page.fill("#said", "x")
    page.click("#send")
    page.wait_for_selector(".bad[role=alert]")
    assert "more than the context" in page.inner_text(".bad")
    page.wrong.clear()  # a browser tells of every answer that is 400


def test_what_is_in_memory(page):
    label = page.get_attribute("#experts", "aria-label")
    assert label == "18 of 18 experts in memory, a row for each of 3 layers"
    assert "MiB" in page.inner_text("#memory")


@pytest.mark.parametrize("width, height", [(390, 844), (1280, 800)])
def test_nothing_is_wider_than_the_screen(page, width, height):
    page.set_viewport_size({"width": width, "height": height})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    box = page.locator("#send").bounding_box()
    assert box["x"] + box["width"] <= width and box["y"] + box["height"] <= height


def test_who_comes_back_from_the_settings_sees_the_answer(page):
    page.set_viewport_size({"width": 390, "height": 844})
    _set(page, 8)  # they lie below
    page.fill("#said", "x")
    page.click("#send")
    page.wait_for_selector(".assistant small")
    top = page.locator(".assistant").bounding_box()["y"]
    assert 0 <= top <= 844


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_rules_of_access_are_kept(page, scheme, width):
    """Contrast, names, order: what axe-core checks."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-core")
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 844})
    _set(page, 8)
    page.fill("#said", "x")
    page.click("#send")
    page.wait_for_selector(".assistant small")
    found = axe.Axe().run(page).response["violations"]
    assert [(one["id"], [node["html"] for node in one["nodes"]]) for one in found] == []
