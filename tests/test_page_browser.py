"""report.html in a real browser, at the width of a phone and of a desktop."""
import base64
import itertools
import json
import re
import shutil
import time

import numpy as np
import pytest
from made_run import HOSTILE, MadeRun
from sklearn.metrics import confusion_matrix

from util import printable

FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--autoplay-policy=no-user-gesture-required"]


@pytest.fixture(scope="module")
def small(made):
    return made


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    names = [f"Genusmaximus longissimus {i:03d}" for i in range(100)]
    made = MadeRun(tmp_path_factory.mktemp("large") / "run", names, per_class=12, epochs=50,
                   steps=5000, seed=1)
    made.write()
    return made


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Headless Chromium."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("the page is not tried in a browser: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    driver.set_page_load_timeout(60)
    yield driver
    driver.quit()


def visit(browser, made, width=1280, dark=False, media=""):
    """Open a page at a width -> a function that evaluates JavaScript in it."""
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
        "width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 600})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": [
        {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]})
    browser.get_log("performance")
    browser.get_log("browser")  # reading a log empties it
    browser.get((made.folder / "report.html").as_uri())
    return lambda script, *arguments: browser.execute_script(f"return {script}", *arguments)


def check_no_requests_or_messages(browser, made):
    """The page has requested nothing but itself, and the console is empty."""
    address = (made.folder / "report.html").as_uri()
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requested = [message["params"]["request"]["url"] for message in messages
                 if message["method"] == "Network.requestWillBeSent"]
    assert address in requested
    assert {url.split(":")[0] for url in requested if url != address} <= {"data"}, requested
    assert browser.get_log("browser") == []


def wait_until(condition, seconds=15):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "never became true"
        time.sleep(0.05)


def press(browser, *keys):
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(browser).send_keys(*keys).perform()


def move_to(browser, element, click=False):
    from selenium.webdriver.common.action_chains import ActionChains

    chain = ActionChains(browser).move_to_element(element)
    (chain.click() if click else chain).perform()


def column(js, number):
    """The values of a column of the table of classes, from top to bottom."""
    return js("[...document.querySelectorAll('.sortable tbody tr')]"
              f".map(row => row.cells[{number}].dataset.value)")


@pytest.fixture(params=[("small", 360), ("small", 1280), ("large", 360), ("large", 1280)],
                ids=lambda case: f"{case[0]}-{case[1]}")
def case(request):
    """A run of 10 or 100 classes, and the width of a phone or a desktop."""
    size, width = request.param
    return request.getfixturevalue(size), width


def test_page_fits_its_width(browser, case):
    made, width = case
    js = visit(browser, made, width)
    assert js("document.title") == "made & <u>sold"
    assert js("document.querySelectorAll('h1').length") == 1
    assert js("document.documentElement.scrollWidth") <= width and js("innerWidth") == width
    too_wide = js("""[...document.querySelectorAll('main *')]
        .filter(e => e.getBoundingClientRect().right > innerWidth + 1)
        .filter(e => !e.closest('.scroll, .picture')).map(e => e.outerHTML.slice(0, 80))""")
    assert too_wide == []  # wide things scroll in their own boxes
    boxes = js("""[...document.querySelectorAll('pre span')].map(e => {
        const text = document.createRange(); text.selectNodeContents(e);
        const box = text.getBoundingClientRect(); return [box.top, box.left, box.right]; })""")
    assert len(boxes) > 10
    for before, after in itertools.pairwise(boxes):  # no word of a command overlaps the next
        assert after[0] > before[0] or after[1] >= before[2] - 1
    check_no_requests_or_messages(browser, made)


def test_text_of_charts_stays_inside_and_apart(browser, case):
    made, width = case
    js = visit(browser, made, width)
    boxes = js("""[...document.querySelectorAll('figure svg')].map(svg =>
        [svg, ...svg.querySelectorAll('text')].map(e => e.getBoundingClientRect())
        .map(box => [box.left, box.top, box.right, box.bottom]))""")
    assert len(boxes) == 8
    for frame, *texts in boxes:
        assert len(texts) > 4
        for left, top, right, bottom in texts:
            assert left >= frame[0] - 4 and right <= frame[2] + 4
            assert top >= frame[1] - 4 and bottom <= frame[3] + 4
        for i, a in enumerate(texts):
            for b in texts[:i]:
                across = min(a[2], b[2]) - max(a[0], b[0])
                down = min(a[3], b[3]) - max(a[1], b[1])
                assert across < 2 or down < 4, "two texts overlap"


def test_cells_of_the_matrix_are_square_and_on_a_phone_all_visible(browser, small):
    for width in (360, 1280):
        js = visit(browser, small, width)
        cells = js("""[...document.querySelectorAll('.cell')].map(e => e.getBoundingClientRect())
            .map(box => [box.width, box.height, box.right])""")
        assert all(abs(w - h) < 2 and w >= 14 for w, h, _ in cells)
        assert max(right for _, _, right in cells) <= width


def test_table_sorts_with_undefined_values_last(browser, case):
    made, width = case
    js = visit(browser, made, width)
    matrix = confusion_matrix(made.labels, made.scores.argmax(axis=1),
                              labels=range(len(made.names)))
    recall = np.diag(matrix) / matrix.sum(axis=1)
    order = "document.querySelectorAll('.sortable thead th')[1].getAttribute('aria-sort')"

    def sort_by(number):
        js(f"document.querySelectorAll('.sortable thead button')[{number}].click()")

    assert js(order) == "none"
    sort_by(1)
    shown = [float(value) for value in column(js, 1)]
    assert shown == pytest.approx(sorted(recall, reverse=True), abs=1e-5)
    sort_by(1)
    shown = [float(value) for value in column(js, 1)]
    assert shown == pytest.approx(sorted(recall), abs=1e-5) and js(order) == "ascending"
    sort_by(4)
    *precision, last = column(js, 4)
    assert last == "" and len(precision) == len(made.names) - 1
    assert list(map(float, precision)) == sorted(map(float, precision), reverse=True)
    sort_by(0)
    by_name = js("[...arguments[0]].sort((a, b) => a.localeCompare(b))", made.names)
    assert column(js, 0) == by_name


def test_cell_lists_its_clips_most_confident_first(browser, case):
    made, width = case
    js = visit(browser, made, width)
    predicted = made.scores.argmax(axis=1)
    matrix = confusion_matrix(made.labels, predicted, labels=range(len(made.names)))
    wrong = matrix - np.diag(np.diag(matrix))
    i, j = (int(index) for index in np.unravel_index(wrong.argmax(), wrong.shape))
    cell = f"document.querySelector('.cell[data-cell=\"{i},{j}\"]')"
    js(f"{cell}.scrollIntoView({{block: 'center', inline: 'center', behavior: 'instant'}})")
    move_to(browser, js(cell))
    assert js("document.getElementById('readout').textContent") == (
        f"{made.names[i]} predicted as {made.names[j]}: "
        f"{wrong.max()} of {matrix[i].sum()} clips")
    move_to(browser, js(cell), click=True)
    rows = [row for row in np.argsort(-made.scores.max(axis=1), kind="stable")
            if (made.labels[row], predicted[row]) == (i, j)]
    listed = js("[...document.querySelectorAll('#cell-clips li')]"
                ".map(item => item.firstChild.textContent)")
    assert listed == [printable(made.paths[row]) for row in rows]
    title = js("document.getElementById('cell-title').textContent")
    assert title == f"{made.names[i]} → {made.names[j]}"
    assert "most confident first" in js("document.getElementById('cell-note').textContent")
    links = js("[...document.querySelectorAll('#cell-clips a[href^=\"#clip\"]')]"
               ".map(a => a.getAttribute('href'))")
    assert links and all(js(f"document.querySelector('{link}') !== null") for link in links)


def test_players_play_one_at_a_time_from_where_the_spectrogram_is_clicked(browser, case):
    made, width = case
    js = visit(browser, made, width)
    assert js("document.querySelectorAll('audio').length") == len(made.examples)
    first, second, third = (f"document.querySelectorAll('audio')[{i}]" for i in range(3))
    js(f"void {first}.play()")
    wait_until(lambda: js(f"{first}.currentTime") > 0.2)
    assert js(f"{first}.duration") == pytest.approx(2.0, abs=0.1)
    assert float(js("document.querySelector('.playing .head').style.left")[:-1]) > 5
    js(f"void {second}.play()")
    wait_until(lambda: js(f"{first}.paused") and js(f"{second}.currentTime") > 0.1)
    js(f"void ({third}.onplay = event => {{ window.startedAt = event.target.currentTime; }})")
    picture = js("document.querySelectorAll('.picture')[2]")
    js("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", picture)
    move_to(browser, picture, click=True)  # in its middle
    wait_until(lambda: js("window.startedAt") is not None)
    assert js("window.startedAt") == pytest.approx(1.0, abs=0.05)
    js("void document.querySelectorAll('audio').forEach(player => player.pause())")
    assert js("performance.getEntriesByType('resource')"
              ".filter(e => !e.name.startsWith('data:')).length") == 0
    check_no_requests_or_messages(browser, made)


def test_hostile_names_are_shown_as_text(browser, small):
    js = visit(browser, small)
    assert HOSTILE[0] in js("document.body.innerText")
    assert js("document.querySelector('tbody th').title") == HOSTILE[0]
    injected = "img[src=x], body b b, u u, main script, [onerror]"
    assert js("document.querySelectorAll(arguments[0]).length", injected) == 0
    for i, name in enumerate(HOSTILE):  # also in what the script writes
        for cell in js(f"Object.keys(clips.cells).filter(key => key.startsWith('{i},'))"):
            js("choose(arguments[0])", cell)
            assert js("document.querySelectorAll('#cell-clips :is(script, img)').length") == 0
            assert name in js("document.getElementById('cell-title').textContent")
    addresses = js("""Object.keys(clips.cells).flatMap(key => (choose(key),
        [...document.querySelectorAll('#cell-clips a')].map(a => a.getAttribute('href'))))""")
    assert len(addresses) >= 80
    assert all(address.startswith(("audio/", "#clip")) for address in addresses)
    check_no_requests_or_messages(browser, small)  # an alert would have stopped all this


def test_control_policy_stops_injected_content(browser, small):
    """If a name were not escaped, the browser itself would still refuse what it asks for."""
    js = visit(browser, small)
    js("void (document.querySelector('h1').innerHTML = "
       "'<img src=x onerror=\"window.obeyed = 1\">')")
    answer = js("fetch('http://127.0.0.1:9/').then(() => 'sent', error => 'refused')")
    assert answer == "refused"
    refused = [entry["message"] for entry in browser.get_log("browser")]
    assert any("connect" in message and "Content Security Policy" in message
               for message in refused), refused
    assert any("img-src" in message or "image" in message for message in refused), refused
    assert js("window.obeyed") is None


def test_keyboard_reaches_everything(browser, small):
    from selenium.webdriver.common.keys import Keys

    js = visit(browser, small)
    js("document.querySelector('thead button').focus()")
    press(browser, Keys.ENTER)
    assert js("document.querySelector('thead th').getAttribute('aria-sort')") == "ascending"
    # The matrix is one stop of the tab key, not a hundred.
    assert js("[...document.querySelectorAll('.cell')]"
              ".filter(cell => cell.tabIndex === 0).length") == 1
    js("document.querySelector('.cell').focus()")
    press(browser, Keys.ARROW_DOWN)
    focused = js("document.activeElement.dataset.cell")
    assert focused != "0,0" and int(focused.split(",")[0]) > 0
    assert js("document.activeElement.tabIndex") == 0
    assert js("document.querySelector('.cell').tabIndex") == -1
    readout = js("document.getElementById('readout').textContent")
    assert readout == js("document.activeElement.getAttribute('aria-label')")
    n_clips = js("clips.cells[arguments[0]].length", focused)
    for key in (Keys.ENTER, " "):
        js("document.getElementById('cell-clips').replaceChildren()")
        press(browser, key)
        assert js("document.querySelectorAll('#cell-clips li').length") == n_clips > 0
    seen = set()
    for key in (Keys.ARROW_UP, Keys.ARROW_RIGHT, Keys.ARROW_DOWN, Keys.ARROW_LEFT):
        for _ in range(12):
            press(browser, key)
            seen.add(js("document.activeElement.dataset.cell"))
    assert len(seen) > 8
    js("document.querySelector('.largest button').focus()")
    press(browser, Keys.ENTER)
    assert js("document.activeElement.id") == "cell-title"  # the focus goes to the list


def brightness(js, element="document.body", style="backgroundColor"):
    colour = js(f"getComputedStyle({element}).{style}")
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 765


def test_light_and_dark(browser, small):
    tick = "document.querySelector('figure svg text')"
    js = visit(browser, small, dark=True)
    assert brightness(js) < 0.15 and brightness(js, style="color") > 0.85
    assert brightness(js, tick, "fill") > 0.5  # charts follow
    js = visit(browser, small)
    assert brightness(js) > 0.95 and brightness(js, style="color") < 0.2
    assert brightness(js, tick, "fill") < 0.5


def test_print(browser, small):
    js = visit(browser, small, media="print")
    assert js("[...document.querySelectorAll('audio, nav, .clips')]"
              ".every(e => getComputedStyle(e).display === 'none')")
    pdf = base64.b64decode(browser.execute_cdp_cmd(
        "Page.printToPDF", {"paperWidth": 8.27, "paperHeight": 11.69})["data"])
    n_pages = len(re.findall(rb"/Type\s*/Page\b", pdf))
    assert pdf.startswith(b"%PDF") and 3 <= n_pages <= 15


def test_relevance_maps_can_be_hidden(browser, small):
    js = visit(browser, small)
    shown = "[...document.querySelectorAll('.over')].map(e => getComputedStyle(e).display)"
    assert set(js(shown)) == {"block"}
    js("document.getElementById('relevance').click()")
    assert set(js(shown)) == {"none"}


def test_pointing_at_a_spectrogram_shows_time_and_frequency(browser, small):
    js = visit(browser, small)
    picture = js("document.querySelector('.picture')")
    js("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", picture)
    move_to(browser, picture)  # the middle of 2 s and of 128 mels from 30 to 11,000 Hz
    shown = js("document.querySelector('.pointed').textContent")
    seconds, kilohertz = map(float, re.findall(r"[\d.]+", shown))
    assert seconds == pytest.approx(1.0, abs=0.03)
    assert kilohertz == pytest.approx((30 * 11000) ** 0.5 / 1000, abs=0.06)


def test_ticks_lie_at_their_seconds(browser, case):
    made, width = case
    js = visit(browser, made, width)
    for left, picture_left, size, text in js("""[...document.querySelectorAll('.times')]
            .slice(0, 3).flatMap(times => [...times.children].slice(1, -1).map(tick => {
                const box = times.getBoundingClientRect(), own = tick.getBoundingClientRect();
                return [own.left + own.width / 2, box.left, box.width, tick.textContent]; }))"""):
        assert (left - picture_left) / size == pytest.approx(float(text) / 2.0, abs=0.01)


def test_top_leads_back_from_anywhere(browser, case):
    made, width = case
    js = visit(browser, made, width)
    js("document.documentElement.style.scrollBehavior = 'auto'")
    js("document.getElementById('reproduce').scrollIntoView()")
    assert js("scrollY") > 1000
    box = js("(e => [e.left, e.top, e.right, e.bottom])"
             "(document.querySelector('a.top').getBoundingClientRect())")
    assert 0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= 844
    move_to(browser, js("document.querySelector('a.top')"), click=True)
    wait_until(lambda: js("scrollY") == 0)


def test_every_heading_has_a_hint_also_without_a_mouse(browser, small):
    js = visit(browser, small, 360)
    heads = js("[...document.querySelectorAll('.sortable thead th')].map(e => e.title)")
    assert len(heads) == 8 and all(heads)
    js("document.querySelector('.legend summary').click()")
    shown = js("[...document.querySelectorAll('.legend dd')].map(e => e.innerText)")
    assert shown == heads
