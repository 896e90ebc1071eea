"""The style of the report page: one column, system fonts, light and dark by the reader's own setting."""

STYLE = """\
:root {
  color-scheme: light dark;
  --paper: #ffffff; --card: #f6f7f9; --ink: #1b1f24; --soft: #57606a; --line: #d8dee4;
  --good: #1a7f37; --bad: #cf222e; --s0: #0969da; --s1: #8250df; --s2: #1a7f6b; --s3: #9a6700;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #0d1117; --card: #161b22; --ink: #e6edf3; --soft: #9aa4af; --line: #30363d;
    --good: #3fb950; --bad: #ff7b72; --s0: #58a6ff; --s1: #bc8cff; --s2: #39c5a3; --s3: #d29922;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1rem; max-width: 72rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "Noto Sans", "Noto Sans CJK SC", sans-serif;
}
h1 { font-size: 1.4rem; line-height: 1.25; margin: .5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p { margin: .4rem 0; }
code, td.figure, .seam-name { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code { overflow-wrap: anywhere; font-size: .92em; }
.soft { color: var(--soft); }
.verdict { padding: .8rem 1rem; border-radius: .5rem; background: var(--card); border-left: .35rem solid var(--good); }
.verdict.bad { border-left-color: var(--bad); }
.verdict strong { font-size: 1.1rem; color: var(--good); overflow-wrap: anywhere; }
.verdict.bad strong { color: var(--bad); }
.verdict p { overflow-wrap: anywhere; }
.scroll { overflow-x: auto; -webkit-overflow-scrolling: touch; }
figure { margin: 0; }
.plot { display: block; width: 100%; height: auto; }
.narrow { display: none; }
.plot text { fill: var(--soft); font-size: 12px; }
.plot .tick { text-anchor: middle; font-size: 11px; }
.plot .seam { text-anchor: end; font: 11px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.plot .grid { stroke: var(--line); }
.plot .axis { stroke: var(--soft); }
.plot polyline { fill: none; stroke-width: 2; }
.plot .noise { stroke-dasharray: 5 4; stroke-width: 1.5; opacity: .7; }
.s0 { stroke: var(--s0); --own: var(--s0); } .s1 { stroke: var(--s1); --own: var(--s1); }
.s2 { stroke: var(--s2); --own: var(--s2); } .s3 { stroke: var(--s3); --own: var(--s3); }
.own { fill: none; stroke: var(--own); stroke-width: 1; opacity: .8; }
.point { fill: var(--own); stroke: none; }
.point.wrong { fill: var(--bad); stroke: var(--paper); stroke-width: 2; }
.legend {
  list-style: none; display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; padding: 0; margin: .5rem 0; font-size: .9rem;
}
.swatch {
  display: inline-block; width: 1.4rem; border-top: 3px solid var(--own, var(--soft)); margin-right: .4rem;
  vertical-align: middle;
}
.swatch.floor { border-top-style: dashed; }
.swatch.own { width: .8rem; height: .8rem; border: 1.5px solid var(--soft); border-radius: 50%; }
.swatch.wrong { width: .8rem; height: .8rem; border: 0; border-radius: 50%; background: var(--bad); }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
.filter { display: flex; flex-wrap: wrap; align-items: center; gap: .3rem .4rem; margin: .4rem 0 .6rem; }
.filter label { margin-right: 1rem; }
.seams:has(#shown-rest:checked) .agrees { display: none; }
.seam { margin: 0; border-bottom: 1px solid var(--line); }
.seam > summary {
  display: grid; grid-template-columns: minmax(0, 1fr) 10rem 6rem 15rem; gap: 0 1rem;
  align-items: center; padding: .3rem 0; list-style: none;
}
.seam > summary::before { content: none; }
.seam .seam-name { overflow-wrap: anywhere; font-size: .92em; grid-column: 1; }
.seam .seam-name::before { content: "▸ "; color: var(--soft); }
.seam[open] .seam-name::before { content: "▾ "; }
.seam .said { grid-column: 4; text-align: right; }
.seam .soft { grid-column: 2; grid-row: 1; font-size: .85rem; font-variant-numeric: tabular-nums; }
.bar { grid-column: 3; grid-row: 1; height: .4rem; border-radius: .2rem; background: var(--line); overflow: hidden; }
.bar span { display: block; height: 100%; background: var(--good); }
.open .said, .open .bar span { color: var(--s3); } .open .bar span { background: var(--s3); }
.wrong .said { color: var(--bad); font-weight: 600; } .wrong .bar span { background: var(--bad); }
.seam table { margin: .2rem 0 .8rem; }
.seam tr { display: grid; grid-template-columns: repeat(auto-fit, minmax(6.4rem, 1fr)); padding: .3rem 0; }
.seam td { border: 0; padding: .1rem .4rem; }
.seam tr + tr { border-top: 1px solid var(--line); }
td.figure { font-variant-numeric: tabular-nums; }
td.figure::before {
  content: attr(data-label); display: block; color: var(--soft); font: .75rem system-ui, sans-serif;
}
dl {
  display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .2rem 1rem; margin: 0; font-size: .95rem;
}
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
.images { display: flex; flex-wrap: wrap; gap: .8rem; }
.images figure { max-width: 10rem; }
.images img {
  display: block; width: 10rem; max-width: 100%; border-radius: .3rem; border: 1px solid var(--line);
}
.images figcaption { color: var(--soft); font-size: .85rem; overflow-wrap: anywhere; }
.texts td { overflow-wrap: anywhere; min-width: 9rem; }
details { margin: .4rem 0; }
summary { cursor: pointer; }
footer { margin: 2.5rem 0 1rem; color: var(--soft); font-size: .85rem; }
@media (max-width: 40rem) {
  .wide { display: none; }
  .narrow { display: block; }
  .seam > summary { grid-template-columns: minmax(0, 1fr) minmax(5rem, 40%); }
  .seam .said { grid-column: 2; }
  .seam .soft { grid-column: 1; grid-row: 2; padding-left: 1.3em; }
  .bar { grid-column: 2; grid-row: 2; }
  .seam tr { grid-template-columns: repeat(auto-fill, minmax(6.6rem, 1fr)); }
  body { padding: .8rem; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .4rem; }
}
"""
