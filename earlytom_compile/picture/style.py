"""The style sheet of the page: light and dark, on a phone and on a desk."""

STYLE = """
:root {
  --paper: #fbfbfa; --surface: #ffffff; --ink: #17191c; --soft: #5c6370; --line: #dfe2e7; --shade: #f1f3f6;
  --raw: #3b82c4; --smooth: #17191c; --tau: #c2255c; --band0: #e8f0f9; --band1: #f6efe2; --pair: #d9600f;
  --kept: #12c4e6; --good: #1b7f4d; --bad: #b3261e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #121417; --surface: #1a1d21; --ink: #eceef1; --soft: #a0a8b4; --line: #31363d; --shade: #22262b;
    --raw: #6fb1ee; --smooth: #f4f5f7; --tau: #ff6b9d; --band0: #1c2735; --band1: #2b261b; --pair: #ff9248;
    --good: #5fd39a; --bad: #ff8a80;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink); overflow-wrap: anywhere;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
header, main, footer { max-width: 1216px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 36px; }
footer { padding-top: 18px; padding-bottom: 36px; color: var(--soft); font-size: 14px; }
h1 { font-size: 34px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; text-wrap: balance; }
h2 { font-size: 23px; margin: 40px 0 10px; }
h3 { font-size: 18px; margin: 32px 0 4px; }
p { margin: 0 0 10px; }
.brand { color: var(--pair); font-weight: 700; margin: 0 0 2px; }
.about, .caption, .quiet { color: var(--soft); }
.caption { max-width: 860px; font-size: 15px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: 14px; margin: 22px 0 0; }
.tile { background: var(--surface); border: 1px solid var(--line); border-radius: 12px; padding: 14px 18px; }
.tile p { margin: 0; }
.tile .name, .tile .note { color: var(--soft); font-size: 14px; }
.tile .value { font-size: 23px; font-weight: 650; font-variant-numeric: tabular-nums; line-height: 1.3; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: 9px 12px; border-bottom: 1px solid var(--line); }
th { font-size: 14px; color: var(--soft); font-weight: 600; }
.asked { background: var(--surface); border: 1px solid var(--line); border-radius: 12px; border-spacing: 0;
  border-collapse: separate; overflow: hidden; }
.asked tr:last-child td { border-bottom: 0; }
.asked td { white-space: pre-line; }
.asked .question { font-weight: 600; }
.same, .differs, .kind { font-size: 12px; font-weight: 600; border-radius: 99px; padding: 1px 8px; margin-left: 8px;
  border: 1px solid currentColor; white-space: nowrap; }
.same { color: var(--good); } .differs { color: var(--bad); } .kind { color: var(--soft); margin: 0; }
.legend { display: flex; flex-wrap: wrap; align-items: center; gap: 4px 18px; font-size: 14px; color: var(--soft);
  margin: 4px 0 10px; }
.legend span { display: inline-flex; align-items: center; gap: 7px; }
.line { width: 22px; height: 0; border-top: 2px solid var(--raw); }
.line.smooth { border-top: 3px solid var(--smooth); } .line.tau { border-top: 2px dashed var(--tau); }
.swatch { width: 14px; height: 14px; border-radius: 3px; display: inline-block; }
.swatch.band { background: linear-gradient(90deg, var(--band0) 50%, var(--band1) 50%); border: 1px solid var(--line); }
.swatch.pair { background: var(--pair); border-radius: 50%; width: 12px; height: 12px; }
.cross::before { content: "×"; color: var(--bad); font-weight: 700; font-style: normal; font-size: 17px; }
.swatch.kept { border: 2px solid var(--kept); } .swatch.veil { background: #7d828c; }
.swatch.clear { border: 1px solid var(--soft); }
.scroll { overflow-x: auto; background: var(--surface); border: 1px solid var(--line); border-radius: 12px;
  padding: 14px; }
svg { display: block; } svg.sources { position: absolute; }
svg text { font: 13px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; fill: var(--soft); }
svg .title { font-weight: 650; fill: var(--ink); font-size: 14px; }
svg .number { font-size: 12px; font-variant-numeric: tabular-nums; }
svg .strong { fill: var(--ink); font-weight: 600; }
.band.b0 { fill: var(--band0); } .band.b1 { fill: var(--band1); }
.grid { stroke: var(--line); stroke-width: 1; } .base { stroke: var(--soft); stroke-width: 1; }
.cut { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 2 3; }
polyline { fill: none; }
polyline.raw { stroke: var(--raw); stroke-width: 1.5; opacity: 0.7; }
circle.raw { fill: var(--surface); stroke: var(--raw); stroke-width: 1.8; r: 4.2px; }
polyline.smooth { stroke: var(--smooth); stroke-width: 2; } circle.smooth { fill: var(--smooth); r: 1.8px; }
circle.below { fill: var(--tau); }
path.tau { stroke: var(--tau); stroke-width: 1.8; stroke-dasharray: 6 4; } svg .tau-label { fill: var(--tau);
  font-weight: 600; }
.link { stroke: var(--line); stroke-width: 1.6; fill: none; } .link.single { stroke: var(--soft); opacity: 0.55; }
.link.pair { stroke: var(--pair); stroke-width: 2.4; }
circle.single { fill: var(--soft); } circle.pair { fill: var(--pair); }
.dropped { stroke: var(--bad); stroke-width: 2; fill: none; }
.bar { fill: var(--kept); }
.cards { display: flex; flex-wrap: wrap; gap: 14px; }
.card { margin: 0; background: var(--surface); border: 1px solid var(--line); border-radius: 12px; padding: 10px;
  max-width: 100%; flex: 0 1 auto; }
.card.merged { border-color: var(--pair); }
.pictures { display: flex; flex-wrap: wrap; gap: 6px; }
.pictures svg { border-radius: 4px; max-width: 100%; }
figcaption { font-size: 14px; margin-top: 7px; display: flex; flex-wrap: wrap; gap: 2px 10px; align-items: center; }
figcaption .weights { flex-basis: 100%; width: 0; min-width: 100%; font-size: 13px; }
.veil { fill: #7d828c; fill-opacity: 0.72; }
path.kept { fill: none; stroke: var(--kept); stroke-linecap: square; vector-effect: non-scaling-stroke; }
.pixels { image-rendering: pixelated; }
.rule { stroke: var(--soft); stroke-width: 1; opacity: 0.35; } .sink { fill: var(--pair); }
details { background: var(--surface); border: 1px solid var(--line); border-radius: 12px; padding: 10px 16px;
  margin-top: 14px; }
summary { cursor: pointer; font-weight: 600; }
details .scroll { border: 0; padding: 10px 0; }
.numbers { font-size: 14px; font-variant-numeric: tabular-nums; width: auto; min-width: 50%; }
.numbers caption { text-align: left; font-weight: 600; padding: 8px 12px; }
.numbers th, .numbers td { padding: 4px 12px; }
@media (max-width: 640px) {
  header, main, footer { padding-left: 14px; padding-right: 14px; }
  header { padding-top: 20px; }
  h1 { font-size: 25px; }
  .tiles { grid-template-columns: 1fr 1fr; gap: 10px; }
  .tile { padding: 10px 14px; } .tile .value { font-size: 20px; }
  .asked thead { display: none; }
  .asked tr { display: block; padding: 8px 0; border-bottom: 1px solid var(--line); }
  .asked tr:last-child { border-bottom: 0; }
  .asked td { display: block; border: 0; padding: 3px 14px; }
  .asked td[data-name]::before { content: attr(data-name) ": "; color: var(--soft); }
}
@media print { .scroll { overflow: visible; } .card, .tile { break-inside: avoid; } }
"""
