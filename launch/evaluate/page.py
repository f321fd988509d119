"""report.md and report.html. The page needs no other file and no network."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from launch.report.section import Table, quoted

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #202020; max-width: 1080px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin: 2em 0 .5em }
table { border-collapse: collapse; margin: .5em 0 } td, th { padding: .25em .9em .25em 0; text-align: right }
td:first-child, th:first-child { text-align: left } th { border-bottom: 1px solid #a8a8a8; font-weight: 600 }
tr:nth-child(even) td { background: #f6f6f6 } td { font-variant-numeric: tabular-nums }
.plots { display: flex; flex-wrap: wrap; gap: 1em; align-items: start } figure { margin: 0; max-width: 100% }
.plots svg { max-width: 100%; height: auto } .note { color: #606060 } .warning { color: #a03000 }
details { border-top: 1px solid #e0e0e0; padding: .4em 0 } summary { cursor: pointer }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6; padding: .6em; margin: .3em 0; font-size: 13px }
"""


@dataclass(frozen=True)
class Example:
    title: str
    texts: Mapping[str, str]  # by what they are


@dataclass(frozen=True)
class Page:
    title: str
    notes: Sequence[str]  # what was evaluated on what
    warnings: Sequence[str]
    tables: Sequence[Table]
    plots: Mapping[str, bytes]  # SVG by title
    examples: Sequence[Example]
    examples_title: str
    intervals: str = "Brackets and bars: 95 % intervals, clustered by prompt."


def markdown(page: Page) -> str:
    lines = [f"# {page.title}", "", f"{page.intervals} Plots: on the HTML page.", ""]
    lines += [f"- {note}" for note in page.notes]
    for warning in page.warnings:
        lines += ["", f"> **Warning.** {warning}"]
    for table in page.tables:
        lines += ["", f"## {table.title}", ""]
        lines += [_row(row) for row in (table.columns, ("---",) * len(table.columns), *table.rows)]
    if page.examples:
        lines += ["", f"## {page.examples_title}", ""]
    for example in page.examples:
        lines += [f"### {_line(example.title)}", ""]
        for name, text in example.texts.items():
            lines += quoted(name, text)
    return "\n".join(lines) + "\n"


def html(page: Page) -> str:
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(page.title)}</title><style>{STYLE}</style>",
        f"<h1>{escape(page.title)}</h1>",
        f"<p class=note>{escape(page.intervals)}</p>",
        f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in page.notes)}</ul>",
        *(f"<p class=warning><b>Warning.</b> {escape(warning)}</p>" for warning in page.warnings),
        *map(_table, page.tables[:1]),
    ]
    if page.plots:
        drawings = (f"<figure aria-label='{escape(title)}'>{_svg(svg)}</figure>" for title, svg in page.plots.items())
        parts.append(f"<h2>Plots</h2><div class=plots>{''.join(drawings)}</div>")
    parts += map(_table, page.tables[1:])
    if page.examples:
        parts.append(f"<h2>{escape(page.examples_title)}</h2>" + "".join(map(_example, page.examples)))
    return "\n".join(parts) + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.columns)
    rows = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in table.rows)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<h2>{escape(table.title)}</h2><table><tr>{head}</tr>{body}</table>"


def _example(example: Example) -> str:
    texts = "".join(f"<b>{escape(name)}</b><pre>{escape(text)}</pre>" for name, text in example.texts.items())
    return f"<details><summary>{escape(example.title)}</summary>{texts}</details>"


def _line(text: str) -> str:
    """One line that no Markdown in it can break out of."""
    return re.sub(r"([\\`*_<>#|\[\]])", r"\\\1", " ".join(text.split()))


def short(text: str, limit: int = 600) -> str:
    """The beginning and the end of a long text."""
    return text if len(text) <= limit else f"{text[: limit // 2]} […] {text[-limit // 2 :]}"


def _svg(svg: bytes) -> str:
    """The element alone: what stands before it is no HTML."""
    return re.sub(r"\A.*?(?=<svg)", "", svg.decode(), flags=re.DOTALL)
