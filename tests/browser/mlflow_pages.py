"""MLflow's pages as a person uses them, in headless Chromium. `python -m tests.browser.mlflow_pages URI OUT` takes the
pictures of docs/how-to/compare-runs.md from a store with two runs."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from tests.rlhf.tracking.stores import PATIENCE_S, server

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1500,950",
]
REWARD = "eval/ppo/reward_helpfulness"
ROW_OF = """
const middle = e => { const box = e.getBoundingClientRect(); return box.top + box.height / 2; };
const link = arguments[0], right = link.getBoundingClientRect().right;
return [...document.querySelectorAll('span, div, td')]
    .filter(e => !e.children.length && e.innerText && e.innerText.trim() && e.getBoundingClientRect().left >= right)
    .filter(e => Math.abs(middle(e) - middle(link)) < 4)
    .sort((a, b) => a.getBoundingClientRect().left - b.getBoundingClientRect().left)
    .map(e => e.innerText.trim());
"""
SCROLL = """
let part = arguments[0];
while (!(part.scrollHeight > part.clientHeight + 1 && getComputedStyle(part).overflowY !== 'visible')) part = part.parentElement;
part.scrollTop = 120 * arguments[1];
"""


@contextmanager
def browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        driver.set_page_load_timeout(PATIENCE_S)
        try:
            yield driver
        finally:
            driver.quit()


class Pages:
    """One tab on one experiment."""

    def __init__(self, driver: webdriver.Chrome, address: str, experiment: str) -> None:
        self._driver, self._address, self._experiment = driver, address, experiment

    def open_results(self) -> None:
        """The run table with the columns of our view."""
        self._go(f"/experiments/{self._experiment}/runs?viewStateShareKey=rlhf")
        self.until(lambda: self.column(REWARD))
        for close in self._all("//button[@aria-label='Close' or contains(@data-component-id, 'assistant.close')]"):
            close.click()

    def column(self, metric: str) -> list[str]:
        """The cells of a metric, from above."""
        cells = self._all(f"//div[@role='gridcell' and @col-id='metrics.`{metric}`']")
        return [text for cell in cells if (text := cell.text.strip())]

    def compare(self, names: list[str]) -> None:
        """Selects the runs by their boxes and presses Compare."""
        for name in names:
            row = self._all(f"//div[@role='row' and .//a[normalize-space()='{name}']]")[0].get_attribute("row-index")
            self._all(f"//div[@role='row' and @row-index='{row}']//input[@type='checkbox']")[0].click()
        self._press("Compare")
        self.until(lambda: self._all("//h1[contains(., 'Comparing')] | //h2[contains(., 'Comparing')]"))

    def show_differences(self) -> None:
        self.until(lambda: self._all("//button[@aria-label='Parameters - Show diff only']"))
        for switch in self._all("//button[@aria-label='Parameters - Show diff only' and @aria-checked='false']"):
            self._click(switch)
        self.until(lambda: len(self.rows("ppo.kl_coef")) == 1)

    def rows(self, name: str) -> list[list[str]]:
        """The values of the two runs in each row of the settings with this heading."""
        found = self._all(f"//tr[th[normalize-space()='{name}']]")
        return [[cell.text.strip() for cell in row.find_elements(By.TAG_NAME, "td")] for row in found]

    def metric(self, name: str) -> list[str]:
        """The values of the two runs, from a table that holds only the rows in sight."""
        link = self._scrolled_to(name)
        return self._driver.execute_script(ROW_OF, link)

    def _scrolled_to(self, metric: str) -> Any:
        for place in range(100):
            if found := self._all(f"//a[normalize-space()='{metric}']"):
                return found[0]
            self._driver.execute_script(SCROLL, self._all("//a[starts-with(normalize-space(), 'eval/')]")[0], place)
            time.sleep(0.2)
        raise AssertionError(f"no row {metric}")

    def differing(self) -> list[str]:
        """The settings that are marked as different."""
        table = "//button[@aria-label='Parameters - Show diff only']/following::table[1]"
        return [heading.text for heading in self._all(f"{table}//tr[contains(@class, 'diff-row')]/th")]

    def open_chart(self, metric: str) -> None:
        self._click(self._scrolled_to(metric))
        self.until(lambda: self.has("X-axis:"))
        for step in self._all("//label[normalize-space()='Step']"):
            self._click(step)

    def open_run(self, run_id: str, tab: str = "") -> None:
        self._go(f"/experiments/{self._experiment}/runs/{run_id}{tab}")

    def open_models(self) -> None:
        self._go(f"/experiments/{self._experiment}/models")

    def open_responses(self) -> None:
        """The tables of the runs, side by side by prompt."""
        self._go(f"/experiments/{self._experiment}/runs?compareRunsMode=ARTIFACT")

    def has(self, text: str) -> bool:
        return text in self._driver.find_element(By.TAG_NAME, "body").text

    def picture(self, path: Path) -> None:
        time.sleep(2)  # plots move for a while
        self._driver.save_screenshot(str(path))

    def until(self, condition: Any) -> Any:
        return WebDriverWait(self._driver, PATIENCE_S).until(lambda _: condition())

    def scroll_to(self, text: str) -> None:
        found = self._all(f"//*[normalize-space(text())='{text}']")[0]
        self._driver.execute_script("arguments[0].scrollIntoView()", found)

    def _go(self, route: str) -> None:
        self._driver.get("about:blank")
        self._driver.get(f"{self._address}/#{route}")

    def _all(self, xpath: str) -> list[Any]:
        return self._driver.find_elements(By.XPATH, xpath)

    def _press(self, label: str) -> None:
        self._click(self.until(lambda: self._all(f"//button[normalize-space()='{label}' and not(@disabled)]"))[0])

    def _click(self, element: Any) -> None:
        """Also where something floats above it."""
        self._driver.execute_script("arguments[0].scrollIntoView({block: 'center'}); arguments[0].click()", element)


def take_pictures(uri: str, out: Path) -> None:
    """The views of the how-to, of the two newest runs."""
    client = MlflowClient(uri)
    experiment = next(e for e in client.search_experiments() if e.name == "rlhf").experiment_id
    runs = [r for r in client.search_runs([experiment]) if "mlflow.parentRunId" not in r.data.tags][:2]
    with server(uri) as address, browser() as driver:
        pages = Pages(driver, address, experiment)
        pages.open_results()
        pages.picture(out / "mlflow-table.png")
        pages.compare([run.info.run_name or "" for run in runs])
        pages.show_differences()
        pages.scroll_to("Parameters")
        pages.picture(out / "mlflow-compare.png")
        pages.open_chart("ppo/reward")
        pages.until(lambda: all(pages.has(f"{run.info.run_name} (ppo/reward)") for run in runs))
        pages.picture(out / "mlflow-chart.png")
        pages.open_run(runs[0].info.run_id)
        pages.until(lambda: pages.has("Report of"))
        pages.picture(out / "mlflow-run.png")
        pages.open_models()
        pages.until(lambda: pages.has(f"{runs[0].info.run_name}-ppo"))
        pages.picture(out / "mlflow-models.png")
        pages.open_responses()
        pages.until(lambda: pages.has("held_out_answers.json"))
        pages.picture(out / "mlflow-responses.png")
    print(json.dumps(sorted(path.name for path in out.glob("mlflow-*.png"))))


if __name__ == "__main__":
    take_pictures(sys.argv[1], Path(sys.argv[2]))
