"""How the report looks, beyond the style of all pages."""

# Curves have colours of Okabe and Ito, which the colour-blind can tell apart, some of them lighter
# or darker, so that they can be told from the page.
STYLE = """
:root {
  --c1: #0072b2; --c2: #d55e00; --c3: #009e73; --c4: #b0528a; --c5: #2f8fc6; --c6: #a87400;
  --c7: #5b5b66; --heat: #6fbdec; --warn: #fff4d6;
}
@media (prefers-color-scheme: dark) {
  :root {
    --c1: #56b4e9; --c2: #f0803c; --c3: #2fc79a; --c4: #e19bc4; --c5: #8fd0ff; --c6: #f0c040;
    --c7: #a8a8b4; --heat: #00609a; --warn: #3a3116;
  }
}
body { font-variant-numeric: tabular-nums; }
h1 { overflow-wrap: anywhere; }
.verdict { font-size: 1.1rem; margin: .2rem 0 1rem; color: var(--faint); }
.note { background: var(--warn); border-radius: 6px; padding: .5rem .9rem; margin: .5rem 0; }
.none { color: var(--faint); }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .6rem;
  margin: 1.2rem 0; }
.facts div { background: var(--shade); border-radius: 6px; padding: .6rem .9rem; }
dt { color: var(--faint); font-size: .85em; }
dd { margin: 0; font-size: 1.1rem; font-weight: 600; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; margin: 1.2rem 0 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
  gap: 1.5rem 2rem; }
.wide { grid-column: 1 / -1; }
.wide .plot { height: 19rem; }
.chart { margin: 0; min-width: 0; }
figcaption { color: var(--faint); }
figcaption b { color: var(--text); }
.where { float: right; }
.legend { display: flex; flex-wrap: wrap; gap: 0 1.1rem; font-size: .88em; min-height: 1.5em;
  margin-bottom: 1.1rem; }
.legend i { display: inline-block; width: 1.1em; height: 0; border-top: 3px solid;
  vertical-align: .25em; margin-right: .4em; }
.plot { display: block; width: calc(100% - 4rem); margin: 0 .8rem 2.9rem 3.2rem; height: 13rem;
  overflow: visible; touch-action: pan-y; }
.plot svg { overflow: visible; }
.plot text { font-size: 12px; fill: var(--faint); text-anchor: middle; }
.plot .y, .plot .name { text-anchor: end; }
.plot line { stroke: var(--line); }
.plot .mark { stroke: var(--faint); stroke-dasharray: 2 3; }
.plot .cursor { stroke: var(--faint); visibility: hidden; }
.plot .level { stroke: var(--faint); stroke-dasharray: 6 4; }
.legend i.level { border-top: 2px dashed var(--faint); }
.curve { fill: none; stroke-width: 2; stroke-linejoin: round; vector-effect: non-scaling-stroke; }
.faint { stroke-width: 1; opacity: .4; }
.broken { stroke: var(--bad); stroke-width: 1.5; }
.c1 { stroke: var(--c1); color: var(--c1); } .c2 { stroke: var(--c2); color: var(--c2); }
.c3 { stroke: var(--c3); color: var(--c3); } .c4 { stroke: var(--c4); color: var(--c4); }
.c5 { stroke: var(--c5); color: var(--c5); } .c6 { stroke: var(--c6); color: var(--c6); }
.c7 { stroke: var(--c7); color: var(--c7); }
circle { fill: currentColor; stroke: none; }
.heat .scrolling { max-height: 34rem; overflow: auto; }
.heat td, .heat thead th { text-align: right; }
.heat td { background: color-mix(in srgb, var(--heat) var(--shade, 0%), var(--page)); }
table { width: auto; }
td { max-width: 32rem; }
td, td code { overflow-wrap: break-word; }
#diagnostics .searched :is(td, th) { padding-inline: .4rem; }
td:first-child code { white-space: nowrap; }
#plan :is(td, th):not(:first-child),
#routing > .scrolling :is(td, th):nth-last-child(-n+2) { text-align: right; }
pre { overflow-x: auto; font-size: .85em; }
.search { display: flex; gap: .8rem; align-items: baseline; margin: .8rem 0; }
.search input { font: inherit; color: inherit; background: var(--page); padding: .35rem .6rem;
  border: 1px solid var(--line); border-radius: 6px; flex: 0 1 26rem; min-width: 0; }
@media print { .search, nav { display: none; } }
"""
