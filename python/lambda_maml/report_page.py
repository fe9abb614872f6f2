"""The style and the script of a report's page; nothing in them is fetched."""

from __future__ import annotations

__all__ = ["POLICY", "SCRIPT", "STYLE"]

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""What the page may load: nothing from elsewhere."""

# Colours of Okabe and Ito; each kind of mark has a form of its own too.
_LIGHT = """
  --paper: #ffffff; --ink: #1a1a1a; --muted: #555555; --grid: #dddddd; --stripe: #f3f5f7;
  --blue: #0072b2; --green: #00805d; --vermilion: #d55e00; --grey: #7a7a7a; color-scheme: light;
"""
_DARK = """
  --paper: #14181f; --ink: #e6e6e6; --muted: #b4bcc8; --grid: #39414d; --stripe: #1d232c;
  --blue: #56b4e9; --green: #1fb98d; --vermilion: #e8803a; --grey: #9a9a9a; color-scheme: dark;
"""
STYLE = f"""
:root {{{_LIGHT}}}
@media (prefers-color-scheme: dark) {{ :root {{{_DARK}}} }}
@media print {{ :root {{{_LIGHT}}} }}
* {{ box-sizing: border-box; }}
body {{
  margin: 0 auto; padding: 1rem; max-width: 60rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere;
}}
h1 {{ font-size: 1.6rem; line-height: 1.2; }}
h2 {{ margin-top: 2.5rem; border-top: 2px solid var(--grid); padding-top: 1rem; }}
a {{ color: var(--blue); }}
figure {{ margin: 1rem 0; max-width: 36rem; }}
figcaption, caption, .muted {{ color: var(--muted); font-size: 0.9rem; }}
caption {{ text-align: left; padding: 0.3rem 0; }}
caption span {{ display: block; max-width: calc(100vw - 2.5rem); white-space: normal; }}
.scrolls {{ overflow-x: auto; margin: 1rem 0; }}
.scrolls:focus-visible, button:focus-visible, summary:focus-visible {{ outline: 3px solid var(--blue); }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 0.25rem 0.6rem; text-align: right; white-space: nowrap; }}
th:first-child, td:first-child, .words {{ text-align: left; }}
thead th {{ border-bottom: 2px solid var(--ink); vertical-align: bottom; }}
tbody tr:nth-child(even) {{ background: var(--stripe); }}
tr.chosen {{ font-weight: bold; }}
th button {{
  font: inherit; font-weight: bold; color: inherit; background: none; border: 0; padding: 0; min-height: 24px;
  min-width: 24px; cursor: pointer; text-decoration: underline dotted;
}}
th[aria-sort=ascending] button::after {{ content: " \\25b2"; }}
th[aria-sort=descending] button::after {{ content: " \\25bc"; }}
summary {{ min-height: 24px; cursor: pointer; font-weight: bold; }}
pre {{ white-space: pre-wrap; background: var(--stripe); padding: 0.6rem; }}
ul.legend {{ list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: 0.2rem 1.2rem; margin: 0.3rem 0; }}
svg {{ vertical-align: middle; }}
svg.figure {{ width: 100%; height: auto; }}
svg text {{ fill: var(--ink); font: 11.5px system-ui, sans-serif; }}
svg .blue {{ --c: var(--blue); }}
svg .green {{ --c: var(--green); }}
svg .vermilion {{ --c: var(--vermilion); }}
svg .grey {{ --c: var(--grey); }}
svg .ink {{ --c: var(--ink); }}
svg circle, svg rect, svg path {{ fill: var(--c); }}
svg .line {{ fill: none; stroke: var(--c); stroke-width: 1.6; }}
svg .bar {{ stroke-width: 1; }}
svg .lead {{ --c: var(--muted); stroke-width: 0.7; }}
svg .dashed {{ stroke-dasharray: 5 3; }}
svg .band {{ opacity: 0.2; }}
svg .grid {{ fill: none; stroke: var(--grid); stroke-width: 1; }}
@media print {{
  body {{ max-width: none; }}
  figure, tr {{ break-inside: avoid; }}
  .scrolls {{ overflow: visible; }}
  th, td {{ white-space: normal; padding: 0.1rem 0.3rem; font-size: 0.8rem; }}
}}
"""
SCRIPT = """
for (const head of document.querySelectorAll("table.sorts thead th")) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = head.textContent;
  head.replaceChildren(button);
  button.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const body = head.closest("table").tBodies[0];
    const value = (row) => row.cells[head.cellIndex].dataset.v;
    const order = (a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      const difference = head.dataset.kind === "text" ? x.localeCompare(y) : Number(x) - Number(y);
      return up ? difference : -difference;
    };
    body.append(...[...body.rows].sort(order));
  });
}
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((part) => { part.open = true; }));
"""
