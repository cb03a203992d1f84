"""One HTML page that needs nothing beside it: pictures inside, no scripts, light and dark, and on paper.

Whatever comes from a file or a folder's name goes through `escape`, and the page forbids itself to load anything.
"""

import base64
import html
import struct
from collections.abc import Iterable, Sequence

from fdg_jax.plots import DPI

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --dim: #59636e; --ground: #fff; --line: #d8dce1; --soft: #f4f6f8;
  --link: #0059a8; --warn: #7a3200; --warn-ground: #fff1e0; --warn-line: #d55e00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --dim: #a3adb8; --ground: #14171a; --line: #353c44;
  --soft: #1d2227; --link: #79b8f2; --warn: #ffd2a6; --warn-ground: #38220c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.5rem 5rem; max-width: 76rem; background: var(--ground); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; }
h2 { font-size: 1.3rem; margin: 3.2rem 0 .8rem; padding-top: .9rem; border-top: 1px solid var(--line); }
p { max-width: 46rem; margin: .5rem 0; } .dim { color: var(--dim); } a { color: var(--link); }
nav { margin-top: 1rem; display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; }
.warning { margin: 1.2rem 0; padding: .8rem 1.1rem; border-left: .4rem solid var(--warn-line);
  background: var(--warn-ground); color: var(--warn); } .warning p { max-width: none; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .2rem 0 .6rem; font-weight: 600; font-size: 1rem; }
th, td { text-align: left; vertical-align: baseline; padding: .34rem 1.1rem .34rem 0; }
thead th { border-bottom: 2px solid var(--line); color: var(--dim); font-weight: 600; white-space: nowrap; }
tbody tr.first > * { border-top: 1px solid var(--line); }
tbody th { font-weight: 600; } th.group { padding: .9rem 0 .35rem; font-size: 1rem; }
.number { text-align: right; white-space: nowrap; } .ours { font-weight: 700; }
td.none { color: var(--dim); font-style: italic; white-space: nowrap; }
tr.below td { padding-top: 0; color: var(--dim); } summary { cursor: pointer; font-size: .8rem; }
code { display: block; font: .75rem/1.5 ui-monospace, "DejaVu Sans Mono", monospace; }
code span { display: inline-block; max-width: 100%; overflow-wrap: anywhere; }
figure { display: inline-block; vertical-align: top; max-width: 100%; margin: 1.2rem 1.5rem 1.2rem 0; }
figcaption { color: var(--dim); font-size: .9rem; max-width: 33rem; }
figure img { display: block; max-width: 100%; height: auto; background: #fff; padding: .6rem; border-radius: .4rem;
  border: 1px solid var(--line); margin-bottom: .5rem; }
ul { padding-left: 1.2rem; } li { margin: .15rem 0; overflow-wrap: anywhere; }
@media print { :root { --ink: #000; --dim: #444; --ground: #fff; --line: #bbb; --soft: #fff; --warn: #000;
  --warn-ground: #fff; --link: #000; } body { padding: 0; max-width: none; font-size: 10pt; } nav { display: none; }
  figure, tr { break-inside: avoid; } h2, caption, th.group { break-after: avoid; } .scroll { overflow: visible; }
  details::details-content { content-visibility: visible; height: auto; } summary { display: none; } }
""".strip()

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(title: str, summary: str, sections: Sequence[tuple[str, str]]) -> str:
    """The document.

    Args:
        title: plain text.
        summary: HTML under the title.
        sections: heading as plain text, and HTML.
    """
    links = "".join(f'<a href="#part{n}">{escape(head)}</a>' for n, (head, _) in enumerate(sections))
    parts = "\n".join(
        f'<section aria-labelledby="part{n}">\n<h2 id="part{n}">{escape(head)}</h2>\n{body}\n</section>'
        for n, (head, body) in enumerate(sections)
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{STYLE}\n</style>\n</head>\n<body>\n<header>\n"
        f'<h1>{escape(title)}</h1>\n{summary}\n<nav aria-label="Contents">{links}</nav>\n</header>\n'
        f"<main>\n{parts}\n</main>\n</body>\n</html>\n"
    )


def escape(text: object) -> str:
    """Any text as HTML, in quotes too; what no encoding can write becomes a question mark."""
    return html.escape(str(text).encode("utf-8", "replace").decode("utf-8"))


def paragraph(text: object, kind: str = "") -> str:
    """Plain text."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def warning(title: str, body: str) -> str:
    """What nobody should overlook: a title as plain text, and HTML."""
    return f'<div class="warning" role="note"><p><strong>{escape(title)}</strong></p>{body}</div>'


def listing(texts: Iterable[str]) -> str:
    """Plain texts as a list."""
    return "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>"


def number(value: float | None, digits: int = 2, kind: str = "number") -> str:
    """A cell of a table with a number, or a dash."""
    return f'<td class="{kind}">{"&ndash;" if value is None else f"{value:,.{digits}f}"}</td>'


def cell(text: object, kind: str = "") -> str:
    """A cell of a table with plain text."""
    return f'<td class="{kind}">{escape(text)}</td>' if kind else f"<td>{escape(text)}</td>"


def command(text: str) -> str:
    """As typed; a line of it ends between words alone."""
    return "<code>" + " ".join(f"<span>{escape(word)}</span>" for word in text.split(" ")) + "</code>"


def folded(title: str, body: str) -> str:
    """HTML that opens at a click on its title, and on paper is open."""
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def row(cells: Iterable[str], below: str = "", width: int = 0) -> str:
    """A row of a table from its cells, and beneath it something over `width` columns; all as HTML."""
    more = f'<tr class="below"><td colspan="{width}">{below}</td></tr>' if below else ""
    return f'<tr class="first">{"".join(cells)}</tr>{more}\n'


def table(caption: str, heads: Sequence[str], groups: Iterable[tuple[str, Sequence[str]]]) -> str:
    """A table.

    Args:
        caption: plain text.
        heads: of the columns, plain text; those that end in a space stand over numbers.
        groups: rows from `row` under a heading, which is plain text and may be empty.
    """
    columns = "".join(
        f'<th scope="col"{" class=number" if head.endswith(" ") else ""}>{escape(head.strip())}</th>' for head in heads
    )
    bodies = ""
    for title, rows in groups:
        head = f'<tr><th class="group" scope="rowgroup" colspan="{len(heads)}">{escape(title)}</th></tr>\n'
        bodies += f"<tbody>\n{head if title else ''}{''.join(rows)}</tbody>\n"
    return (
        f'<div class="scroll"><table>\n<caption>{escape(caption)}</caption>\n'
        f"<thead><tr>{columns}</tr></thead>\n{bodies}</table></div>"
    )


def image(png: bytes, alt: str, caption: str) -> str:
    """A picture inside the page, as large as drawn; what it shows in words, and what stands below it."""
    width, height = (round(pixels * 96 / DPI) for pixels in struct.unpack(">II", png[16:24]))
    data = base64.b64encode(png).decode()
    shown = f'<img src="data:image/png;base64,{data}" width="{width}" height="{height}" alt="{escape(alt)}">'
    return f"<figure>{shown}<figcaption>{escape(caption)}</figcaption></figure>"
