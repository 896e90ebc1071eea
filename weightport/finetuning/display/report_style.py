"""The style of the run's report: the parity report's, so that both are one product's pages, and what charts need."""

from __future__ import annotations

from weightport.reports.page_style import STYLE as PAGE

STYLE = (
    PAGE
    + """\
:root { --found: #bc4c00; --mark: #fff1c2; --mark-ink: #6f4e00; }
@media (prefers-color-scheme: dark) { :root { --found: #ffa657; --mark: #4b3a0c; --mark-ink: #f2d58a; } }
section { margin-bottom: 1rem; }
.command { color: var(--soft); margin: 0 0 1.2rem; }
.headline {
  display: grid; grid-template-columns: repeat(var(--columns), 1fr); gap: .6rem; margin: 0 0 1rem;
  padding: 0; list-style: none;
}
.headline li { padding: .7rem .9rem; border-radius: .5rem; background: var(--card); }
.headline strong {
  display: block; font-size: 1.45rem; line-height: 1.25; font-weight: 650; font-variant-numeric: tabular-nums;
}
.headline .measured strong { color: var(--s0); }
.headline .bad strong { color: var(--bad); }
.headline span { color: var(--soft); font-size: .85rem; overflow-wrap: anywhere; }
.notes { padding: .7rem 1rem; border-radius: .5rem; background: var(--card); border-left: .35rem solid var(--s3); }
.notes h2 { margin: 0 0 .3rem; font-size: 1rem; }
.notes ul { margin: 0; padding-left: 1.2rem; }
.notes li { margin: .2rem 0; overflow-wrap: anywhere; white-space: pre-wrap; }
.chart { display: block; overflow: visible; width: calc(100% - 5rem); margin: .8rem .8rem 2rem 4.2rem; }
.chart text { fill: var(--soft); font-size: 12px; }
.chart .tick { text-anchor: end; }
.chart .step { text-anchor: middle; }
.chart .grid { stroke: var(--line); }
.chart .axis { stroke: var(--soft); }
.chart polyline { fill: none; stroke-width: 2; stroke-linejoin: round; vector-effect: non-scaling-stroke; }
.chart .raw { stroke-width: 1; opacity: .35; }
.chart .dot { fill: var(--own); stroke: none; }
.chart .hover { fill: var(--own); stroke: none; fill-opacity: 0; }
.chart .place:hover .hover { fill-opacity: .35; }
.chart .broken { fill: var(--bad); font-size: 18px; font-weight: 700; text-anchor: middle; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); gap: 1rem 1.5rem; }
.charts figcaption { display: flex; justify-content: space-between; gap: 1rem; font-weight: 600; font-size: .95rem; }
.charts figcaption span { overflow-wrap: anywhere; }
.charts figcaption .soft { font-weight: 400; font-variant-numeric: tabular-nums; white-space: nowrap; }
.parts th:nth-child(n+2), .parts td:nth-child(n+2) { text-align: right; white-space: nowrap; }
.parts th:last-child, .parts td:last-child { width: 40%; text-align: left; padding-right: 0; }
.parts td:first-child { overflow-wrap: anywhere; }
.parts tfoot td { font-weight: 600; border-bottom: 0; }
.share { display: block; height: .7rem; margin-top: .4rem; border-radius: .2rem; background: var(--card); }
.share i { display: block; height: 100%; border-radius: .2rem; background: var(--s0); }
.settings { columns: 22rem; column-gap: 2.5rem; }
.settings > div { break-inside: avoid; margin-bottom: 1.1rem; }
.settings h3, .sample h3 { margin: 0 0 .2rem; font-size: .95rem; }
.settings dl { grid-template-columns: minmax(0, 11rem) minmax(0, 1fr); font-size: .9rem; gap: .15rem .8rem; }
.settings dt, .settings dd { overflow-wrap: anywhere; white-space: pre-wrap; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); gap: 1rem; }
.sample { min-width: 0; padding: .9rem; border-radius: .5rem; background: var(--card); }
.shot { position: relative; width: fit-content; max-width: 100%; margin: 0 auto .7rem; }
.shot img { display: block; max-width: 100%; max-height: 15rem; border-radius: .3rem; }
.shot svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: hidden; border-radius: .3rem; }
.shot rect { fill: none; stroke-width: 2; }
.shot text { font-size: 12px; font-weight: 600; paint-order: stroke; stroke: #000c; stroke-width: 3; }
.shot .expected { stroke: #3fb950; } .shot text.expected { fill: #7ee08f; stroke: #000c; }
.shot .found { stroke: #ffa657; stroke-dasharray: 6 3; }
.shot text.found { fill: #ffc48a; stroke: #000c; stroke-dasharray: none; }
.swatch.expected { border-color: #3fb950; } .swatch.found { border-color: #ffa657; border-top-style: dashed; }
.sample h3 { display: flex; justify-content: space-between; gap: .6rem; }
.sample h3 .right { color: var(--good); } .sample h3 .other { color: var(--found); }
.sample .said { display: block; margin-top: .5rem; color: var(--soft); font-size: .8rem; }
.sample blockquote {
  margin: 0; max-height: 15rem; overflow: auto; overflow-wrap: anywhere; white-space: pre-wrap; line-height: 1.4;
}
.sample .place { margin: .6rem 0 0; color: var(--soft); font-size: .8rem; overflow-wrap: anywhere; }
mark { background: var(--mark); color: var(--mark-ink); border-radius: .15rem; }
mark.missing { text-decoration: underline; text-decoration-thickness: .1em; text-underline-offset: .2em; }
@media (max-width: 60rem) { .headline { grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); } }
@media (max-width: 40rem) {
  .headline { grid-template-columns: repeat(2, 1fr); }
  .settings dl { grid-template-columns: minmax(0, 9rem) minmax(0, 1fr); gap: .15rem .8rem; }
  .settings dd { margin: 0; }
  .parts { font-size: .75rem; }
  .parts th, .parts td { padding: .3rem .25rem; }
  .parts th:last-child, .parts td:last-child { display: none; }
}
"""
)
