"""The dashboard of `rlhf serve`, and thumbs and edits on its page, as a person uses them."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("selenium", reason="selenium is not installed (extra dev)")

from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from rlhf.serving.store import Exchange, Score, Store, Vote, Writer
from rlhf.serving.watch.baseline import Baseline
from rlhf.serving.watch.records import Alarm, begin_alarm
from tests.browser.mlflow_pages import CHROMIUM, DRIVER, browser
from tests.browser.test_serve_page import WIDE, Page
from tests.launch.serve.servers import TOKEN, Running, running
from tests.rlhf.serving.models import make_folder

HOURS = 24
pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="there is no chromium or no chromedriver on the PATH"),
]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Running]:
    folder = make_folder(tmp_path / "model")
    writer = Writer(Store(f"sqlite:///{tmp_path}/feedback.db"))
    rng = random.Random(0)
    baseline = Baseline(
        tmp_path, {"length": [rng.gauss(30, 5) for _ in range(300)], "reward.safety": [2.0, 3.0, 4.0] * 99}
    )
    with running(folder, writer=writer, baseline=baseline, max_output=20) as found:
        yield found


def fill(store: Store, now: float) -> None:
    """A day of six responses an hour, none in three of the hours; unsafe ones in the last six."""
    rng, rows, scores, votes = random.Random(0), [], [], []
    for number in range(6 * HOURS):
        hour = number // 6
        if hour in (9, 10, 12):
            continue
        logit = rng.gauss(3.0, 1.0) if hour < HOURS - 6 or rng.random() < 0.6 else -3.0
        sorry = "I'm sorry, I cannot." if rng.random() < 0.1 else "it is 4"
        turns = [{"role": "user", "content": f"question {number // 2}"}]
        length, seconds, first = 20 + int(rng.gauss(10, 4)), 0.5 + rng.random(), 0.05 + 0.1 * rng.random()
        created = now - 3600 * (HOURS - hour - 0.1 - 0.1 * (number % 6))
        how = {
            "finish": "stop",
            "prompt_tokens": 9,
            "completion_tokens": length,
            "seconds": seconds,
            "first_token_s": first,
        }
        rows.append(Exchange(f"r{number}", "chat", "m", None, turns, sorry, sampling={}, created=created, **how))
        scores.append(Score(f"r{number}", "safety", logit - 1, logit, "d"))
        scores.append(Score(f"r{number}", "helpfulness", rng.gauss(2, 1), None, "d"))
        if rng.random() < 0.5:
            votes.append(Vote(f"r{number}", thumb=rng.choice(["up", "up", "down"]), created=created))
    store.add(rows)
    store.add_scores(scores)
    store.add(votes)
    begin_alarm(store, Alarm("refusals > 0.3 in 1h", 0.5, 0.31, 0.7, 12, now - 70_000, now - 60_000))
    begin_alarm(store, Alarm("unsafe > 0.05 in 1h", 0.4, 0.2, 0.6, 30, now - 900))


def test_the_dashboard_shows_the_day(server: Running) -> None:
    assert server.service.writer
    fill(server.service.writer.store, time.time())
    with browser() as driver:
        driver.get(f"{server.url}/dashboard?token={TOKEN}")
        page = Page.__new__(Page)
        page.driver = driver
        page.until(lambda: len(page.texts(".chart")) == 10)
        assert "token" not in driver.current_url
        shown = {one.get_attribute("data-metric"): one for one in driver.find_elements(By.CSS_SELECTOR, ".chart")}
        assert set(shown) == {
            "reward.safety",
            "reward.helpfulness",
            "unsafe",
            "refusals",
            "length",
            "first_token_s",
        } | {
            "tokens_per_s",
            "thumbs_up",
            "votes",
            "responses",
        }
        unsafe = shown["unsafe"]
        assert len(unsafe.find_elements(By.CSS_SELECTOR, ".dot")) == HOURS - 3
        assert len(unsafe.find_elements(By.CSS_SELECTOR, ".band")) == 2  # a gap ends a band
        assert len(unsafe.find_elements(By.CSS_SELECTOR, ".bar")) == 1  # an hour between two gaps
        assert "[" in unsafe.find_element(By.CSS_SELECTOR, ".now").text
        assert page.texts("#drift .much, #drift .some, #drift .none")
        assert page.texts("#alarms td")[:1] == ["unsafe > 0.05 in 1h"]
        assert len(page.texts(".rings")) == 1
        Select(page.one("#span")).select_by_visible_text("1h")
        page.until(lambda: len(page.texts(".chart[data-metric=responses] .dot")) == 12)
        _looks(page)


def _looks(page: Page) -> None:
    page.one("#language").click()
    assert "拒绝" in page.texts(".name")
    before = page.one("body").value_of_css_property("background-color")
    page.one("#theme").click()
    assert page.one("body").value_of_css_property("background-color") != before
    page.driver.set_window_size(500, 800)
    assert page.driver.execute_script(WIDE) <= 0
    names = page.driver.execute_script("return performance.getEntriesByType('resource').map(e => new URL(e.name).host)")
    assert len(set(names)) == 1  # nothing from elsewhere
    page.one("header a").click()
    page.until(lambda: page.one("#model option").text == "tiny")
    assert page.one("#send").text == "发送"
    assert not [entry for entry in page.driver.get_log("browser") if entry["level"] == "SEVERE"]


def test_thumbs_and_edits_are_kept(server: Running) -> None:
    writer = server.service.writer
    assert writer
    with browser() as driver:
        page = Page(driver, server)
        page.one("#user").send_keys("ann" + Keys.TAB)
        page.say("hello")
        page.one(".tools [data-label=down]").click()
        page.until(lambda: page.texts("[data-label=down][aria-pressed=true]"))
        keys = ActionChains(driver)
        keys.key_down(Keys.ALT).send_keys(Keys.ARROW_UP).key_up(Keys.ALT).perform()
        page.until(lambda: page.texts("[data-label=up][aria-pressed=true]"))
        assert not page.texts("[data-label=down][aria-pressed=true]")
        ActionChains(driver).key_down(Keys.ALT).send_keys(Keys.ENTER).key_up(Keys.ALT).perform()
        box = page.one(".edit textarea")
        box.clear()
        box.send_keys("it is 4" + Keys.ESCAPE)
        assert not page.texts(".edit")
        page.one(".tools [data-label=edit]").click()
        box = page.one(".edit textarea")
        box.clear()
        box.send_keys("it is 4")
        box.send_keys(Keys.CONTROL + Keys.ENTER)
        page.until(lambda: page.texts(".assistant .text") == ["it is 4"])
        page.until(lambda: writer.written == 4)
        assert [(vote.thumb, vote.edit, vote.user) for vote in writer.store.votes()] == [
            ("down", None, "ann"),
            ("up", None, "ann"),
            (None, "it is 4", "ann"),
        ]
        page.say("and now?")  # the dialogue goes on with what was saved
        page.until(lambda: writer.written == 5)
        newest = list(writer.store.exchanges().values())[-1]
        assert [turn["content"] for turn in newest.messages] == ["hello", "it is 4", "and now?"]
        page.one("#new").click()
        page.one("#history").click()
        page.one("#past button").click()
        assert page.texts(".assistant .text")[0] == "it is 4"
        assert len(page.texts("[data-label=up][aria-pressed=true]")) == 1
        assert not [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
