"""The page of `rlhf serve` as a person uses it: chat, side by side, a vote, history, Chinese, dark, narrow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("selenium", reason="selenium is not installed (extra dev)")

from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from rlhf.serving.store import Store, Writer
from tests.browser.mlflow_pages import CHROMIUM, DRIVER, browser
from tests.launch.serve.servers import TOKEN, Running, running
from tests.rlhf.serving.models import make_folder

PATIENCE_S = 120
WIDE = "return document.documentElement.scrollWidth - window.innerWidth"

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="there is no chromium or no chromedriver on the PATH"),
]


class Page:
    def __init__(self, driver: Any, server: Running) -> None:
        self.driver = driver
        driver.get(f"{server.url}/?token={TOKEN}")
        self.until(lambda: self.one("#model option").text == "tiny")

    def one(self, css: str) -> Any:
        return self.driver.find_element(By.CSS_SELECTOR, css)

    def texts(self, css: str) -> list[str]:
        return [each.text for each in self.driver.find_elements(By.CSS_SELECTOR, css)]

    def until(self, condition: Callable[[], Any]) -> None:
        WebDriverWait(self.driver, PATIENCE_S, ignored_exceptions=[Exception]).until(lambda _: condition())

    def say(self, text: str) -> None:
        before = len(self.texts(".assistant"))
        self.one("#text").send_keys(text + Keys.ENTER)
        self.until(lambda: len(self.texts(".assistant")) > before and not self.one("#stop").is_displayed())


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Running]:
    folder = make_folder(tmp_path / "model")
    with running(folder, writer=Writer(Store(f"sqlite:///{tmp_path}/feedback.db")), max_output=20) as found:
        yield found


def test_a_person_talks_compares_and_votes(server: Running) -> None:
    writer = server.service.writer
    assert writer
    with browser() as driver:
        page = Page(driver, server)
        assert "token" not in driver.current_url
        page.one("#user").send_keys("ann" + Keys.TAB)
        page.say("hello")
        assert page.texts(".user") == ["hello"]
        page.one("#compare").click()
        page.say("what is 2 + 2?")
        assert len(page.texts(".pair > div")) == 2
        page.one("#second input[name=unsafe]").click()
        page.one("body").send_keys("3")  # the first, slightly better
        page.until(lambda: writer.written == 4)
        (vote,) = writer.store.votes()
        assert (vote.chosen, vote.rating, vote.user) == ("first", "slightly", "ann")
        assert vote.labels == {"first": [], "second": ["unsafe"]}
        shown = {vote.first: page.texts(".pair > div")[0], vote.second: page.texts(".pair > div")[1]}
        kept = writer.store.exchanges()
        assert {each: " ".join(kept[each].response.split()) for each in shown} == {
            each: " ".join(text.split()) for each, text in shown.items()
        }
        page.one("#new").click()
        assert page.texts(".turn") == []
        page.one("#history").click()
        page.one("#past button").click()
        assert page.texts(".user") == ["hello", "what is 2 + 2?"]
        _looks(page)


def _looks(page: Page) -> None:
    page.one("#language").click()
    assert page.one("#send").text == "发送"
    before = page.one("body").value_of_css_property("background-color")
    page.one("#theme").click()
    assert page.one("body").value_of_css_property("background-color") != before
    page.driver.set_window_size(500, 800)
    assert page.driver.execute_script(WIDE) <= 0
    names = page.driver.execute_script("return performance.getEntriesByType('resource').map(e => new URL(e.name).host)")
    assert len(set(names)) == 1  # nothing from elsewhere
    assert not [entry for entry in page.driver.get_log("browser") if entry["level"] == "SEVERE"]
