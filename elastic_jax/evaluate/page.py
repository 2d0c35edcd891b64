"""The frame of `report.html`: one file, no network, light and dark, from a phone to a projector."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from elastic_jax.evaluate.summary import format_widths

COLOURS = 6  # budgets that have a colour of their own, --b0 to --b5
LIGHT = ('#2a78d6', '#0f9d74', '#e0700c', '#8350d0', '#d03f78', '#6f7f10')
DARK = ('#5fa2f2', '#2fc796', '#f7974a', '#b394f5', '#f47fae', '#b6c44a')


def budget_colour(budgets: Sequence[str], name: str) -> str:
    """The colour class of a budget, the same in every chart; the parent's is 'p'."""
    return f'b{list(budgets).index(name) % COLOURS}' if name in budgets else 'p'


def section(title: str, body: str, note: str = '') -> str:
    """A card of the page. `title` and `note` are plain text."""
    note = f'<p class="note">{html.escape(note)}</p>' if note else ''
    return f'<section><h2>{html.escape(title)}</h2>{note}{body}</section>'


def legend(entries: Sequence[tuple[str, str, float]]) -> str:
    """(name, colour class, opacity) of each entry."""
    keys = ''.join(
        f'<span><i class="key {colour}" style="opacity:{opacity:.2f}"></i>{html.escape(name)}</span>'
        for name, colour, opacity in entries
    )
    return f'<p class="legend">{keys}</p>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of ready-made HTML cells that scrolls sideways where it does not fit."""
    top = ''.join(f'<th>{html.escape(cell)}</th>' for cell in head)
    body = ''.join('<tr>' + ''.join(f'<td>{cell}</td>' for cell in row) + '</tr>' for row in rows)
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def width_list(widths: Mapping[str, Mapping[str, int]]) -> str:
    """The widths of every budget, as `--widths` takes them."""
    written = {name: html.escape(format_widths(own)).replace(',', ',<wbr>') for name, own in widths.items()}
    return (
        '<div class="widthlist">' + ''.join(f'<b>{html.escape(n)}</b><code>{own}</code>' for n, own in written.items()) + '</div>'
    )


def page(title: str, body: str) -> str:
    """The whole document."""
    colours = lambda palette: ''.join(f'--b{n}:{colour};' for n, colour in enumerate(palette))
    style = STYLE.replace('/*light*/', colours(LIGHT)).replace('/*dark*/', colours(DARK))
    style += ''.join(f'.b{n}{{--c:var(--b{n})}}' for n in range(COLOURS))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="color-scheme" content="light dark">'
        f'<title>{html.escape(title)}</title><style>{style}</style></head>'
        f'<body><main>{body}</main><div id="tip" hidden></div><script>{SCRIPT}</script></body></html>\n'
    )


STYLE = """
:root{color-scheme:light dark;--bg:#f4f6fa;--card:#fff;--ink:#101828;--soft:#5b6779;--rule:#e3e8ef;--band:#f0f3f8;/*light*/}
@media(prefers-color-scheme:dark){:root{--bg:#0b0f17;--card:#141a26;--ink:#e8edf5;--soft:#97a3b6;--rule:#273142;--band:#1b2332;
/*dark*/}}
html{font-size:clamp(15px,11.5px + .42vw,24px);-webkit-text-size-adjust:100%}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);
font:1rem/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:74rem;margin:0 auto;padding:1.6rem 1rem 4rem}
.p{--c:var(--ink)}
header{margin:0 0 1.4rem}
.eyebrow{margin:0;font-size:.78rem;letter-spacing:.09em;text-transform:uppercase;color:var(--soft);font-weight:600}
h1{font-size:clamp(1.7rem,3.6vw,2.5rem);line-height:1.12;margin:.1em 0 .25em;letter-spacing:-.02em;overflow-wrap:anywhere}
.lede{font-size:1.12rem;margin:0;max-width:46em;color:var(--soft)}.lede b{color:var(--ink);font-weight:650}
.warn{margin:.8rem 0 0;padding:.5rem .8rem;border-left:.25rem solid var(--b2);background:var(--band);border-radius:.3rem}
.timeline{display:flex;gap:.25rem;margin-top:1.1rem}
.timeline>div{min-width:7.2em;font-size:.76rem;color:var(--soft);line-height:1.3}
.timeline b{display:block;color:var(--ink);font-size:.85rem}
.timeline i{display:block;height:.4rem;border-radius:.2rem;background:var(--rule);margin-bottom:.35rem;overflow:hidden}
.timeline i::before{content:"";display:block;height:100%;width:var(--done);background:var(--soft)}
section{background:var(--card);border:1px solid var(--rule);border-radius:.9rem;padding:1.15rem 1.25rem 1.25rem;
margin:0 0 1.1rem}
h2{font-size:1.2rem;margin:0 0 .2em;letter-spacing:-.01em}
h3{font-size:.88rem;margin:0 0 .5em;font-weight:650}h3 small{font-weight:400;color:var(--soft)}
.note{color:var(--soft);margin:0 0 1em;font-size:.9rem;max-width:56em}.note.after{margin:.9rem 0 0}
.missing li{margin:.2em 0}ul.missing{padding-left:1.2em}
.missing{color:var(--soft);font-style:italic;margin:.3em 0 0}
small{color:var(--soft);font-size:.82em}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(11.5rem,1fr));gap:.8rem;margin:0 0 1.1rem}
.card{background:var(--card);border:1px solid var(--rule);border-top:.3rem solid var(--c);border-radius:.9rem;
padding:.75rem 1rem .9rem}
.card h3{margin:0;font-size:1rem}.card .big{font-size:2rem;line-height:1.15;font-weight:680;letter-spacing:-.02em;
font-variant-numeric:tabular-nums}
.card .big small{font-size:.8rem;line-height:1.3;font-weight:400;letter-spacing:0;margin-left:.35em}
.card p{margin:.35em 0 0;font-size:.86rem;color:var(--soft)}.card p b{color:var(--ink)}
.meter{height:.45rem;background:var(--rule);border-radius:.25rem;overflow:hidden;margin-top:.25rem}
.meter i{display:block;height:100%;background:var(--c);border-radius:.25rem}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr));gap:1.4rem 1.8rem}
figure{margin:0;min-width:0}figcaption{font-size:.85rem;color:var(--soft);margin-top:.4rem}
.chart{position:relative}
.plot{position:relative;height:17rem;margin:1.2rem .5rem 1.5rem 2.9rem;touch-action:pan-y}
.tall .plot{height:21rem}.small .plot{height:5.4rem;margin:.2rem .3rem 1.2rem 1.1rem}
.wide .plot{margin-left:2.5rem}.choices{display:flex;flex-wrap:wrap;gap:.1rem 1.2rem;align-items:baseline;margin-bottom:.5rem}
.choices h3,.choices .legend{margin:0}
.plot svg{position:absolute;inset:0;width:100%;height:100%;overflow:hidden}
.plot path{vector-effect:non-scaling-stroke;fill:none}
.grid{stroke:var(--rule);stroke-width:1}.line{stroke:var(--c);stroke-width:2.2;stroke-linejoin:round;stroke-linecap:round}
.faint{stroke:var(--c);stroke-width:1;opacity:.28}.level{stroke:var(--ink);stroke-width:1.3;stroke-dasharray:5 4;opacity:.75}
.plot .area{fill:var(--c);stroke:var(--card);stroke-width:.8}
.plot .bars{fill:var(--c)}.arrow{stroke:var(--c);stroke-width:1.6;opacity:.55}
.frontier{stroke:var(--soft);stroke-width:2.2;opacity:.6}
.xtick,.ytick{position:absolute;font-size:.74rem;color:var(--soft);line-height:1;font-variant-numeric:tabular-nums;
white-space:nowrap}
.xtick{top:calc(100% + .45rem);transform:translateX(-50%)}.ytick{right:calc(100% + .4rem);transform:translateY(50%)}
.small .xtick{transform:none}.small .xtick:last-child{transform:translateX(-100%)}
.xlabel,.ylabel{font-size:.78rem;color:var(--soft)}.xlabel{text-align:right;margin:0 .5rem 0 2.9rem}
.band{position:absolute;top:0;bottom:0}.band.shaded{background:var(--band)}.band span{position:absolute;left:.1rem;bottom:100%;
font-size:.74rem;color:var(--soft);max-width:100%;overflow:hidden;white-space:nowrap;line-height:1.5}
.levelname{position:absolute;left:0;font-size:.8rem;line-height:1;margin:0 0 .3rem .3rem;white-space:nowrap}
.levelname.under{transform:translateY(100%);margin-bottom:-.35rem}
.dot{position:absolute;width:.85rem;height:.85rem;border-radius:50%;background:var(--c);border:2px solid var(--card);
transform:translate(-50%,50%)}
.dot.open{background:var(--card);border:2px solid var(--c);width:.75rem;height:.75rem}
.dot.any{--c:var(--soft);width:.7rem;height:.7rem}.dot.other{opacity:.35;width:.6rem;height:.6rem}
.dot.square{border-radius:2px;background:var(--card);border:2px solid var(--ink);width:.75rem;height:.75rem}
.dot.p{border-radius:2px;transform:translate(-50%,50%) rotate(45deg);width:.7rem;height:.7rem}
.value{position:absolute;font-size:.84rem;font-weight:600;line-height:1;margin:0 0 .6rem .5rem}
.value.under{transform:translateY(100%);margin-bottom:-.6rem}
.size{position:absolute;top:calc(100% + .55rem);transform:translateX(-50%);font-size:.8rem;line-height:1.25;text-align:center;
white-space:nowrap;color:var(--soft)}.size b{display:block;color:var(--c);font-size:.92rem}
.beside{position:absolute;white-space:nowrap;font-size:.78rem;line-height:1;color:var(--soft);transform:translateY(50%);margin-left:.65rem}
.cross{position:absolute;top:0;bottom:0;width:1px;background:var(--soft);opacity:.6;pointer-events:none}
#tip{position:fixed;z-index:9;pointer-events:none;background:var(--ink);color:var(--bg);font-size:.78rem;line-height:1.4;
padding:.35rem .55rem;border-radius:.4rem;max-width:18rem;box-shadow:0 4px 16px #0003;font-variant-numeric:tabular-nums}
#tip[hidden]{display:none}#tip div{display:flex;gap:1em;justify-content:space-between}#tip .key{box-shadow:0 0 0 1px var(--bg)}
.legend{display:flex;flex-wrap:wrap;gap:.15rem 1rem;margin:.2rem 0 .5rem;font-size:.84rem}
.key{display:inline-block;width:.75rem;height:.75rem;border-radius:.2rem;margin-right:.4rem;vertical-align:-.05em;
background:var(--c)}
/* Shades at the edges beyond which a table goes on; they scroll with it, and the card covers them at its ends. */
.scroll{overflow-x:auto;background:linear-gradient(90deg,var(--card) 50%,#0000) 0 0/3rem 100%,
linear-gradient(270deg,var(--card) 50%,#0000) 100% 0/3rem 100%,linear-gradient(90deg,#0003,#0000) 0 0/.9rem 100%,
linear-gradient(270deg,#0003,#0000) 100% 0/.9rem 100%;background-repeat:no-repeat;background-attachment:local,local,scroll,scroll}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:.92rem}
th{font-size:.76rem;color:var(--soft);font-weight:600}
th,td{text-align:right;padding:.45rem .6rem;border-bottom:1px solid var(--rule);white-space:nowrap}
tbody tr:last-child td{border-bottom:0}th:first-child,td:first-child{text-align:left;font-weight:650;padding-left:0}
td.prose{white-space:normal;text-align:left;min-width:14em;color:var(--soft);font-size:.85em}
.widthlist{display:grid;grid-template-columns:max-content 1fr;gap:.3rem .9rem;margin:.9rem 0 0;font-size:.85rem;
align-items:baseline}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
code{font-size:.82em;color:var(--soft)}
.model{display:flex;gap:clamp(1px,.6%,.5rem);height:13rem;position:relative;margin:.4rem 0 .3rem}
.block{flex:1 1 0;position:relative;min-width:0}
.block i{position:absolute;left:0;right:0;top:calc((100% - var(--h))/2);height:var(--h);background:var(--c);border-radius:.4rem}
.block i:nth-child(2){left:8%;right:8%}.block i:nth-child(3){left:16%;right:16%}.block i:nth-child(n+4){left:24%;right:24%}
.block i{box-shadow:0 0 0 1px var(--card)}.block i[style="--h:0.0%"]{display:none}
.dense .block i{left:0;right:0;border-radius:2px;box-shadow:none}
.names{display:flex;gap:clamp(1px,.6%,.5rem);font-size:.74rem;color:var(--soft);margin-bottom:1.2rem}
.names span{flex:1 1 0;min-width:0;text-align:center;overflow:hidden;white-space:nowrap}
.names b{display:block;color:var(--ink);font-size:.85rem}
.axes{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,19rem),1fr));gap:1rem 1.8rem}
.bar{display:flex;flex-wrap:wrap;justify-content:space-between;gap:.1rem .8rem;font-size:.82rem;margin:.3em 0;color:var(--soft);
font-variant-numeric:tabular-nums}
.track{position:relative;flex:1 0 100%;height:.95rem;background:var(--band);border-radius:.3rem;overflow:hidden}
.track i{position:absolute;left:0;top:0;bottom:0;width:var(--w);background:var(--c);border-right:2px solid var(--card)}
.bar em{font-style:normal;color:var(--ink)}
.multiples{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,13.5rem),1fr));gap:.5rem 1.2rem;
margin-bottom:.4rem}
.group{border-top:1px solid var(--rule);padding-top:.8rem;margin-top:.8rem}
.group:first-of-type{border:0;margin-top:0;padding-top:0}
.strip{display:flex;height:.55rem;margin:.18rem .3rem 0 1.1rem;border-radius:.15rem;overflow:hidden}
.thin .strip{height:.25rem;margin-top:.1rem}.strip i{background:var(--c);border-right:1px solid var(--card)}
details summary{cursor:pointer;font-weight:600}
pre{overflow-x:auto;font-size:.8rem;line-height:1.45;margin:.6em 0 0;white-space:pre-wrap;
overflow-wrap:anywhere}
.samples{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,18rem),1fr));gap:.9rem}
.sample{background:var(--band);border-radius:.6rem;border-left:.25rem solid var(--c);padding:.6rem .8rem;min-width:0}
mark{background:none;color:var(--ink);font-weight:700}.sample pre{color:var(--soft);margin:.3em 0 0}
@media(max-width:900px){.dense+.names{display:none}.model{margin-bottom:1rem}}
@media(max-width:520px){.beside small{display:none}section{padding:.95rem .85rem 1rem}
.plot{height:14rem;margin-left:2.5rem}.tall .plot{height:17rem}.multiples{grid-template-columns:repeat(3,1fr);gap:.4rem .5rem}
.small .plot{height:4.4rem;margin-left:.8rem}.wide .plot{margin-left:2.2rem}.model{height:9rem}
th,td{padding:.4rem .42rem}table{font-size:.85rem}
.cards{grid-template-columns:1fr 1fr}.card .big{font-size:1.6rem}.card .big small{display:block;margin:0}}
@media print{body{background:#fff}section,.card{break-inside:avoid}}
"""

SCRIPT = """
(() => {
const tip = document.getElementById('tip');
const place = e => {
  const w = tip.offsetWidth, h = tip.offsetHeight;
  const x = e.clientX + 14 + w > innerWidth ? e.clientX - w - 14 : e.clientX + 14;
  const y = e.clientY + 14 + h > innerHeight ? e.clientY - h - 14 : e.clientY + 14;
  tip.style.left = Math.max(4, x) + 'px'; tip.style.top = Math.max(4, y) + 'px';
};
const row = (name, value, colour) => {
  const line = document.createElement('div'), left = document.createElement('span'), right = document.createElement('b');
  if (colour) { const key = document.createElement('i'); key.className = 'key ' + colour; left.append(key); }
  left.append(name); right.append(value); line.append(left, right); return line;
};
const hide = () => { tip.hidden = true; };
document.querySelectorAll('.chart').forEach(chart => {
  const source = chart.querySelector('script');
  if (!source) return;
  const data = JSON.parse(source.textContent), plot = chart.querySelector('.plot'), cross = document.createElement('div');
  cross.className = 'cross';
  plot.addEventListener('pointermove', e => {
    const box = plot.getBoundingClientRect(), share = (e.clientX - box.left) / box.width;
    const at = data.x0 + share * (data.x1 - data.x0), near = (data.x1 - data.x0) / 25;
    let best = null;
    const rows = [];
    data.series.forEach(s => {
      let k = 0;
      s.x.forEach((x, i) => { if (Math.abs(x - at) < Math.abs(s.x[k] - at)) k = i; });
      if (!s.x.length || Math.abs(s.x[k] - at) > near) return;
      if (best === null || Math.abs(s.x[k] - at) < Math.abs(best - at)) best = s.x[k];
      rows.push(row(s.n, data.share ? (100 * s.y[k]).toFixed(s.y[k] < .1 ? 1 : 0) + ' %' : String(s.y[k]), s.c));
    });
    if (best === null) { hide(); cross.remove(); return; }
    const head = data.unit ? data.unit + ' ' + Math.floor(best) : 'step ' + best.toLocaleString('en');
    tip.replaceChildren(row(head, ''), ...rows); tip.hidden = false; place(e);
    cross.style.left = 100 * (best - data.x0) / (data.x1 - data.x0) + '%'; plot.append(cross);
  });
  plot.addEventListener('pointerleave', () => { hide(); cross.remove(); });
});
document.querySelectorAll('[data-tip]').forEach(mark => {
  mark.addEventListener('pointermove', e => { tip.replaceChildren(mark.dataset.tip); tip.hidden = false; place(e); });
  mark.addEventListener('pointerleave', hide);
});
})();
"""
