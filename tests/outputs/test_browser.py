"""report.html in a real browser: what a person sees, clicks and types."""

import http.server
import json
import os
import re
import shutil
import threading
import time
import urllib.parse

import pytest

from odc.outputs import page as pages
from tests.outputs import made_up_run
from tests.outputs.made_up_run import data_of

webdriver = pytest.importorskip("selenium.webdriver")
Keys = webdriver.Keys
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
if not (CHROMIUM and shutil.which("chromedriver")):
    pytest.skip("Chromium and its driver are not here (Debian: chromium, chromium-driver)",
                allow_module_level=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return made_up_run.write_run(tmp_path_factory.mktemp("made up"))[0]


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                     "--window-size=1280,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    with webdriver.Chrome(options=options, service=service) as driver:
        yield driver


class Page:
    def __init__(self, browser, folder):
        self.browser, self.script = browser, browser.execute_script
        browser.get("about:blank")
        browser.get((folder / "report.html").as_uri())

    def all(self, selector):
        return self.browser.find_elements("css selector", selector)

    def one(self, selector):
        [element] = self.all(selector)
        return element

    def texts(self, selector, what="textContent"):
        return self.script(
            f"return [...document.querySelectorAll(arguments[0])].map(e => e.{what})", selector)

    def path(self):
        """The name of the image that is chosen in the viewer."""
        return self.texts("#path")[0]

    def press(self, *keys):
        webdriver.ActionChains(self.browser).send_keys(*keys).perform()

    def target(self):
        """The number of the card that was jumped to, once it can be seen."""
        for _ in range(100):
            if self.script("const box = document.querySelector('article:target')"
                           "?.getBoundingClientRect(); return box?.top >= 0"
                           " && box.bottom <= innerHeight"):
                return int(self.texts("article:target", "id")[0].split("-")[1])
            time.sleep(0.05)


@pytest.fixture
def page(browser, folder):
    page = Page(browser, folder)
    yield page
    assert [entry["message"] for entry in browser.get_log("browser")] == []  # no error of a script


def test_every_cluster_has_a_card_and_the_lists_show_their_images(page, folder):
    data = data_of(folder)
    clusters, paths = data["clusters"], data["images"]["path"]
    shown = []
    for _ in range(2):  # groups of duplicates, twelve and two
        shown += page.texts("#groups .image", "title")
        page.all("main .pager button")[1].click()
    assert shown == [paths[n] for group in data["groups"] for n, *_ in group]
    assert page.texts("#groups figcaption")[-1] == "9 × 9\n1 bytes\nfeatures 0.910"
    small = sorted(clusters[len(clusters) // 2 :], key=lambda cluster: cluster["nearest"])
    assert page.texts("#apart .image", "title") == [paths[c["first"]] for c in small[:8]]
    assert page.texts("#far .image", "title") == [paths[n] for n in data["outliers"]]
    assert page.texts("#cards header + p") == [cluster["caption"] for cluster in clusters]
    assert page.texts("article", "querySelectorAll('.image').length") == [
        min(12, cluster["size"]) for cluster in clusters]
    assert page.one("h1").text == "<b>run & co" and page.browser.title == "<b>run & co"
    for sign, key in (("-", "tightness"), ("", "purity"), ("", "size")):
        page.one(f"#sort [value='{sign}{key}']").click()
        expected = sorted(clusters, key=lambda cluster: cluster[key], reverse=sign == "-")
        assert page.texts("article", "id") == [f"cluster-{cluster['id']}" for cluster in expected]


def test_curves_lie_where_their_axes_say(browser, tmp_path):
    made_up_run.write_log(tmp_path, '{"epoch": 3, "step": 8, "silhouette": -0.1}',
                          '{"epoch": 3, "step": 8, "splits": 0}')
    pages.write_page(tmp_path)
    page = Page(browser, tmp_path)
    assert page.all("main") == page.all("nav a") == []  # there are no clusters
    texts = page.texts("#charts text")
    assert [texts[n : n + 5] for n in (0, 5, 10)] == [
        ["loss", "last 3.11", "3.89", "0", "step 8"], ["silhouette", "last -0.1", "0", "-0.1",
        "step 8"], ["splits", "last 0", "1", "0", "step 8"]]
    high, low = map(int, re.findall(r"(\d+)H", page.texts("#charts path", "outerHTML")[0]))
    loss, silhouette, splits = [
        [[float(x) for x in point.split(",")] for point in line.split(" ")]
        for line in page.texts("#charts polyline", "getAttribute('points')")]
    for step, (x, y) in zip([*range(1, 9), 8], loss, strict=True):
        assert x == pytest.approx(500 * step / 8)
        assert y == pytest.approx(low + (high - low) * (4 - step / 9) / (4 - 1 / 9))
    assert silhouette == splits == [[500, low]] * 2


def test_pages_without_labels(browser, folder, tmp_path):
    made_up_run.write_log(tmp_path)
    dataset = made_up_run.images()
    dataset.labels, dataset.root = None, str(folder.parent / "images")
    pages.write_page(tmp_path, dataset, made_up_run.clusters())
    page = Page(browser, tmp_path)
    assert page.texts("select:not([hidden]) option", "value") == [
        "-size", "size", "-tightness", "tightness", "nearest"]
    page.all("#cards .image")[0].click()
    assert "similarity" in page.one("#facts").text and "undefined" not in page.one("#facts").text


def test_search_and_odd_names(page, folder):
    paths = data_of(folder)["images"]["path"]
    page.one("#search").send_keys("A/04")
    expected = [path for path in paths if "a/04" in path]
    assert page.texts("#found .image", "title") == expected
    assert page.one("#count").text.startswith(f"{len(expected)} found")
    page.all("#found .image")[3].click()
    assert page.path() == expected[3]
    page.one("#facts a").click()  # to the cluster of that image
    assert page.target() == data_of(folder)["images"]["cluster"][paths.index(expected[3])]
    for odd in made_up_run.ODD_NAMES:
        name = re.sub("[\udc80-\udcff]", "?", odd)  # what is not UTF-8
        page.one("#search").clear()
        page.one("#search").send_keys(name[:9])
        page.all("#found .image")[page.texts("#found .image", "title").index(name)].click()
        assert page.path() == name
        file = urllib.parse.urlsplit(page.texts("#path", "href")[0]).path
        assert os.path.samefile(urllib.parse.unquote_to_bytes(file), folder.parent / "images" / odd)
        page.one("#copy").click()
        assert page.script("return getSelection().toString()") == name
        page.press(Keys.ESCAPE)
    assert page.browser.title == "<b>run & co" and page.all("img, i, b") == []


def test_circles_that_cover_each_other_are_listed(page, folder):
    page.script("for (const node of document.querySelectorAll('#map .image'))"
                "node.style.left = node.style.top = '50%'")
    circles = page.all("#map .image")
    circles[-1].click()
    assert sorted(page.texts("#here a", "hash")) == sorted(
        f"#cluster-{cluster['id']}" for cluster in data_of(folder)["clusters"])
    page.all("#here a")[3].click()
    assert page.target() == int(page.texts("#here a", "hash")[3].split("-")[1])


@pytest.fixture
def server():
    """(its address, the list of paths that a browser asked it for)."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}", asked
        listening.shutdown()


@pytest.mark.parametrize("guarded", [True, False])
def test_markup_runs_no_script_and_makes_no_request(browser, server, tmp_path, guarded):
    """In the log it is text. If it came into the page, the policy alone would stop it."""
    address, asked = server
    markup = [f"<img src='{address}/img' onerror=\"document.title = 'taken'\">",
              "<script>document.title = 'taken'</script>", f"<iframe src='{address}/a'></iframe>",
              f"<style>@import '{address}/style'; h1 {{ background: url({address}/url) }}</style>"]
    made_up_run.write_log(tmp_path, *(
        json.dumps({"epoch": 9, "step": 9, text: 1} | {field: text})
        for text in markup for field in ("epoch", "step", "loss")))
    pages.write_page(tmp_path)
    path = tmp_path / "report.html"
    for injected in (False, True):
        page = Page(browser, tmp_path)
        time.sleep(0.3)
        assert (page.browser.title != "taken" and asked == []) == (guarded or not injected)
        assert page.texts("#charts .title") == ["loss", *markup]
        assert len(page.all("img, iframe")) == 2 * injected
        text = path.read_text().replace("</h1>", "</h1>" + "".join(markup))
        path.write_text(text if guarded else text.replace("Content-Security-Policy", "x"))
    browser.get_log("browser")


@pytest.mark.parametrize("width, scheme", [(390, "light"), (1280, "dark")])
def test_telephones_and_dark_mode(browser, folder, width, scheme):
    """The last test, as the browser stays like that."""
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", dict(
        width=width, height=844, deviceScaleFactor=2, mobile=width < 600))
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dict(
        features=[dict(name="prefers-color-scheme", value=scheme)]))
    page = Page(browser, folder)
    assert page.script("return document.documentElement.scrollWidth") <= width
    colours = page.script(
        "const style = getComputedStyle(document.body); return [style.color, style.background]")
    page.all("article header button")[0].click()
    page.all("#page .image")[-1].click()
    assert page.script("const box = document.querySelector('#large').getBoundingClientRect();"
                       "return box.top >= 0 && box.bottom <= innerHeight")  # also when scrolled
    ink, paper = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours)
    assert (ink < 150 and paper > 700) if scheme == "light" else (ink > 650 and paper < 100)
