"""report.html in a real browser: what a person sees, clicks and types."""

import json
import re
import shutil
import time

import pytest

from odc.outputs import report
from tests.outputs import made_up_run
from tests.outputs.test_report import data_of

webdriver = pytest.importorskip("selenium.webdriver")
Keys = webdriver.Keys
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)
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
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


class Page:
    """A page in a browser, by the ids of its elements."""

    def __init__(self, browser, path):
        self.browser = browser
        browser.get("about:blank")
        browser.get(path.as_uri())

    def all(self, selector):
        return self.browser.find_elements("css selector", selector)

    def one(self, selector):
        [element] = self.all(selector)
        return element

    def texts(self, selector):
        return self.browser.execute_script(
            "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", selector)

    def choose(self, select, value):
        self.one(f"#{select} option[value='{value}']").click()

    def press(self, *keys):
        webdriver.ActionChains(self.browser).send_keys(*keys).perform()

    def cards(self):
        """The numbers of the clusters, in the order of their cards."""
        return [int(text.split()[1]) for text in self.texts("#cards h3")]

    def target(self):
        """The number of the card that was jumped to, once it can be seen."""
        for _ in range(50):
            cards = self.all("article:target")
            if cards and self.browser.execute_script(
                    "const box = arguments[0].getBoundingClientRect();"
                    "return box.top >= 0 && box.bottom <= innerHeight", cards[0]):
                return int(cards[0].get_attribute("id").split("-")[1])
            time.sleep(0.1)


@pytest.fixture
def page(browser, folder):
    page = Page(browser, folder / "report.html")
    yield page
    assert [entry["message"] for entry in browser.get_log("browser")] == []  # no error of a script


def test_a_page_of_curves_alone(browser, tmp_path):
    made_up_run.write_log(tmp_path)
    report.save(tmp_path)
    page = Page(browser, tmp_path / "report.html")
    assert len(page.all("#curves svg")) == 1 and page.all("main") == page.all("nav a") == []


def test_every_cluster_has_a_card_that_describes_it(page, folder):
    clusters = data_of(folder)["clusters"]
    assert page.cards() == [cluster["id"] for cluster in clusters]
    assert page.texts("#cards header + p") == [cluster["caption"] for cluster in clusters]
    strips = [len(card.find_elements("css selector", ".image")) for card in page.all("article")]
    assert strips == [min(12, cluster["size"]) for cluster in clusters]
    assert page.one("h1").text == "<b>run & co" and page.browser.title == "<b>run & co"


@pytest.mark.parametrize("key", ["size", "tightness", "purity", "growth"])
def test_sorting(page, folder, key):
    clusters = data_of(folder)["clusters"]
    for sign in ("-", ""):
        page.choose("sort", sign + key)
        expected = sorted(clusters, key=lambda cluster: cluster[key], reverse=sign == "-")
        assert page.cards() == [cluster["id"] for cluster in expected]


def test_a_page_without_labels_and_copies_offers_what_it_has(browser, folder, tmp_path):
    made_up_run.write_log(tmp_path)
    dataset = made_up_run.images()
    dataset.labels = None
    report.save(tmp_path, dataset, made_up_run.clusters(), without_pictures="They have moved.")
    page = Page(browser, tmp_path / "report.html")
    values = [option.get_attribute("value") for option in page.all("#sort option, #colour option")]
    assert values == ["-size", "size", "-tightness", "tightness", "size"]
    assert page.texts("#notes p") == ["There are no pictures: They have moved."]
    assert page.one("#far .image:first-child").text.endswith(".png")  # names instead of pictures
    page.all("#cards .image")[0].click()
    assert "similarity" in page.one("#facts").text and "undefined" not in page.one("#facts").text


def test_paging_through_a_cluster(page, folder):
    largest, paths = data_of(folder)["clusters"][0], data_of(folder)["images"]["path"]
    page.all("article header button")[0].click()
    seen = []
    for start, end in ((1, 60), (61, 120), (121, 150)):
        assert page.one("#range").text == f"{start}–{end} of 150"
        titles = [image.get_attribute("title") for image in page.all("#page .image")]
        assert page.one("#path").get_property("textContent") == titles[0]
        seen += titles
        if end < 150:
            page.one("#next").click()
    assert not page.one("#next").is_enabled() and page.one("#previous").is_enabled()
    first = largest["first"]
    assert seen == paths[first : first + 150]
    page.one("#previous").click()
    assert page.one("#range").text == "61–120 of 150"
    page.all("#page .image")[7].click()
    assert page.one("#path").get_property("textContent") == seen[67]
    similarity = data_of(folder)["images"]["similarity"][first + 67]
    assert page.one("#facts").text.startswith(f"similarity {similarity:.3f} · cluster ")
    page.one("dialog form button").click()
    assert not page.one("#viewer").is_displayed()


def test_the_keyboard_alone(page, folder):
    paths = data_of(folder)["images"]["path"]
    first = data_of(folder)["clusters"][1]["first"]
    button = page.all("article header button")[1]
    page.browser.execute_script("arguments[0].focus()", button)
    page.press(Keys.ENTER)
    for keys, place in (([Keys.ARROW_RIGHT] * 3, 3), ([Keys.ARROW_LEFT], 2), ([Keys.PAGE_DOWN], 62),
                        ([Keys.PAGE_DOWN], 69), ([Keys.PAGE_UP] * 2, 0)):
        page.press(*keys)
        assert page.one("#path").get_property("textContent") == paths[first + place]
        chosen = page.browser.switch_to.active_element
        assert chosen.get_attribute("title") == paths[first + place]
        assert chosen.get_attribute("aria-current") == "true"
    page.press(Keys.ESCAPE)
    assert not page.one("#viewer").is_displayed()
    page.browser.execute_script("document.querySelector('#map a').focus()")
    page.press(Keys.ENTER)
    assert page.target() == data_of(folder)["clusters"][0]["id"]


def test_a_click_on_the_map(page, folder):
    for cluster in data_of(folder)["clusters"][:4]:
        node = page.one(f"#map [href='#cluster-{cluster['id']}']")
        assert cluster["caption"] in node.get_attribute("title")
        node.click()
        assert page.target() == cluster["id"]


def test_the_colours_of_the_map(page, folder):
    clusters = data_of(folder)["clusters"]

    def colours():
        return page.browser.execute_script(
            "return [...document.querySelectorAll('#map a')].map(a => a.style.borderColor)")

    by_class = colours()
    for a, color_a in zip(clusters, by_class):
        for b, color_b in zip(clusters, by_class):
            assert (color_a == color_b) == (a["main"] == b["main"])
    used = {made_up_run.CLASSES[cluster["main"]] for cluster in clusters}
    assert set(page.texts("#legend span")) == used
    page.choose("colour", "size")
    assert len(set(colours())) == len({cluster["size"] for cluster in clusters})
    assert page.texts("#legend span") == []


def test_a_click_on_a_near_cluster(page, folder):
    cluster = data_of(folder)["clusters"][2]
    links = page.one(f"#cluster-{cluster['id']}").find_elements("css selector", ".strip a")
    assert [int(link.text) for link in links] == cluster["near"]
    links[0].click()
    assert page.target() == cluster["near"][0]


def test_search(page, folder):
    paths = data_of(folder)["images"]["path"]
    page.one("#search").send_keys("A/04")
    expected = [path for path in paths if "a/04" in path]
    assert [node.get_attribute("title") for node in page.all("#found .image")] == expected
    assert page.one("#count").text.startswith(f"{len(expected)} found")
    page.all("#found .image")[3].click()
    assert page.one("#path").text == expected[3]
    page.one("#facts a").click()  # to the cluster of that image
    cluster = data_of(folder)["images"]["cluster"][paths.index(expected[3])]
    assert page.target() == cluster
    page.one("#search").clear()
    page.one("#search").send_keys("nothing is called this")
    assert page.one("#count").text.startswith("0 found") and page.all("#found .image") == []


@pytest.mark.parametrize("name", made_up_run.ODD_NAMES)
def test_odd_names_are_text(page, name):
    name = re.sub("[\udc80-\udcff]", "?", name)  # what is not UTF-8
    page.one("#search").send_keys(name[:9])
    found = page.all("#found .image")
    assert name in [node.get_attribute("title") for node in found]
    next(node for node in found if node.get_attribute("title") == name).click()
    assert page.one("#path").get_property("textContent") == name
    assert page.browser.title == "<b>run & co"
    assert page.all("img") == page.all("i") == page.all("b") == []


def test_lists_of_near_duplicates_and_outliers(page, folder):
    data = data_of(folder)
    assert page.texts("#pairs p") == [f"{pair['similarity']:.4f}" for pair in data["pairs"]]
    page.all("#pairs .image")[5].click()
    path = data["images"]["path"][data["pairs"][2]["images"][1]]
    assert page.one("#path").text == path and page.one("#range").text == "1–2 of 2"
    page.press(Keys.ESCAPE)
    page.all("#far .image")[1].click()
    assert page.one("#path").text == data["images"]["path"][data["outliers"][1]]


def test_no_request_leaves_the_page(browser, folder):
    browser.get_log("performance")
    page = Page(browser, folder / "report.html")
    page.all("article header button")[0].click()
    page.browser.execute_script("window.scrollTo(0, 1e6)")
    time.sleep(0.5)
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = {event["params"]["request"]["url"] for event in events
            if event["method"] == "Network.requestWillBeSent"}
    assert (folder / "report.html").as_uri() in urls
    assert {url.split(":")[0] for url in urls} <= {"about", "data", "file"}
    assert {url for url in urls if url.startswith("file")} == {(folder / "report.html").as_uri()}


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_telephones_and_dark_mode(browser, folder, width, scheme):
    metrics = dict(width=width, height=844, deviceScaleFactor=2, mobile=width < 600)
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dict(
        features=[dict(name="prefers-color-scheme", value=scheme)]))
    try:
        page = Page(browser, folder / "report.html")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        colours = browser.execute_script(
            "const style = getComputedStyle(document.body); return [style.color, style.background]")
        ink, paper = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours)
        assert (ink < 150 and paper > 700) if scheme == "light" else (ink > 650 and paper < 100)
        page.all("article header button")[0].click()
        box = page.one("#viewer").rect
        assert box["x"] >= 0 and box["x"] + box["width"] <= width
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dict(features=[]))
