"""The frame of `report.html`: one file, no network, light and dark, from a phone to a projector."""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>{{title}}</title><style>
:root{--bg:#f8fafc;--card:#fff;--ink:#0f172a;--soft:#64748b;--rule:#e2e8f0;--band:#f1f5f9;
--c0:#2563eb;--c1:#0d9488;--c2:#d97706;--c3:#9333ea;--c4:#dc2626;--c5:#475569;
--s0:#1e3a8a;--s1:#2563eb;--s2:#60a5fa;--s3:#bfdbfe;--s4:#e0e7ff;--s5:#f1f5f9}
@media(prefers-color-scheme:dark){:root{--bg:#0b1120;--card:#111a2e;--ink:#e2e8f0;--soft:#94a3b8;--rule:#24304a;--band:#16213a;
--c0:#60a5fa;--c1:#2dd4bf;--c2:#fbbf24;--c3:#c084fc;--c4:#f87171;--c5:#94a3b8}}
*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:1180px;margin:0 auto;padding:24px 16px 64px}h1{font-size:clamp(1.4rem,3vw,2.2rem);margin:.2em 0 .8em}
h2{font-size:1.15rem;margin:0 0 .5em}h3{font-size:.85rem;margin:0 0 .3em;color:var(--soft);font-weight:600}
section{background:var(--card);border:1px solid var(--rule);border-radius:12px;padding:18px;margin:0 0 18px}
.note{color:var(--soft);margin:0 0 .8em;font-size:.92rem}.missing{color:var(--soft);font-style:italic}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th{font-size:.8rem;color:var(--soft);font-weight:600}th,td{text-align:right;padding:6px 10px;border-bottom:1px solid var(--rule);white-space:nowrap}
th:first-child,td:first-child{text-align:left;font-weight:600}td code{font-size:.75rem;color:var(--soft);white-space:normal}
td[colspan]{text-align:left}small{color:var(--soft)}img,svg{display:block;width:100%;height:auto}
img{max-width:760px;margin:0 auto;border-radius:8px;background:#fff}figure{margin:0}figcaption{font-size:.85rem;color:var(--soft)}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(300px,1fr));gap:18px}
.grid3{display:grid;grid-template-columns:repeat(auto-fit,minmax(230px,1fr));gap:18px;margin-top:12px}
.tick{font-size:11px;fill:var(--soft)}.label{font-size:12px;fill:var(--soft)}.grid{stroke:var(--rule)}
.band{fill:none}.band.shaded{fill:var(--band)}.line{fill:none;stroke-width:2;stroke-linejoin:round}
.line.c0{stroke:var(--c0)}.line.c1{stroke:var(--c1)}.line.c2{stroke:var(--c2)}.line.c3{stroke:var(--c3)}.line.c4{stroke:var(--c4)}.line.c5{stroke:var(--c5)}
.area.s0{fill:var(--s0)}.area.s1{fill:var(--s1)}.area.s2{fill:var(--s2)}.area.s3{fill:var(--s3)}.area.s4{fill:var(--s4)}.area.s5{fill:var(--s5)}
.legend{display:flex;flex-wrap:wrap;gap:4px 14px;margin:.3em 0;font-size:.82rem}.key{display:inline-block;width:12px;height:12px;border-radius:3px;margin-right:5px;vertical-align:-1px}
i.c0{background:var(--c0)}i.c1{background:var(--c1)}i.c2{background:var(--c2)}i.c3{background:var(--c3)}i.c4{background:var(--c4)}i.c5{background:var(--c5)}
i.s0{background:var(--s0)}i.s1{background:var(--s1)}i.s2{background:var(--s2)}i.s3{background:var(--s3)}i.s4{background:var(--s4)}i.s5{background:var(--s5)}
.axes{display:grid;grid-template-columns:repeat(auto-fit,minmax(260px,1fr));gap:18px}
.bar{display:grid;grid-template-columns:3em 1fr 8.5em;gap:8px;align-items:center;font-size:.8rem;font-variant-numeric:tabular-nums}
.bar b{position:relative;height:14px;background:var(--band);border-radius:4px;overflow:hidden}.bar em{font-style:normal;color:var(--soft)}
.nest{position:absolute;left:0;top:0;bottom:0;border-right:2px solid var(--card)}
details{margin:.3em 0}summary{cursor:pointer;font-weight:600}pre{overflow-x:auto;font-size:.8rem;margin:.4em 0;white-space:pre-wrap}
.loads{display:flex;flex-wrap:wrap;gap:14px;align-items:flex-end;margin-bottom:10px}.loads>span{width:4em;font-weight:600}
.load>div{display:flex;gap:2px;height:48px;align-items:flex-end}.load i{width:9px;background:var(--c0);border-radius:2px 2px 0 0}
.samples{display:grid;grid-template-columns:repeat(auto-fit,minmax(300px,1fr));gap:14px}.sample pre{background:var(--band);padding:10px;border-radius:8px}
mark{background:none;color:var(--c0);font-weight:600}
@media(min-width:1800px){body{font-size:20px}main{max-width:1600px}}
</style></head><body><main><h1>{{title}}</h1>{{body}}</main></body></html>
"""
