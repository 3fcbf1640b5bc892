"""The looks of the page: light and dark, desktop and phone, and on paper."""

from minirlhf.run.terminal import heat

SHADES = 8  # of the heat of a token, in either direction

_LIGHT = """
color-scheme:light dark;--back:#fff;--soft:#f4f6f8;--ink:#1c2127;--faint:#5b6570;--line:#d9dde3;
--mark:#9a4b00;--run0:#1f6feb;--run1:#c2410c;--run2:#15803d;--run3:#9333ea;--run4:#0e7490;
--run5:#be185d;--run6:#854d0e;--run7:#475569;"""
_DARK = """
--back:#14181d;--soft:#1d232a;--ink:#e4e8ec;--faint:#9aa5b1;--line:#39424d;--mark:#f2b366;
--run0:#6ea8fe;--run1:#fb923c;--run2:#4ade80;--run3:#c084fc;--run4:#22d3ee;--run5:#f472b6;
--run6:#facc15;--run7:#cbd5e1;--above:176,80,42;--below:38,104,148;"""

_RULES = """
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--ink);overflow-wrap:anywhere;
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","Noto Sans CJK SC",sans-serif}
main,header,footer{max-width:1240px;margin:0 auto;padding:0 20px}
header{padding-top:28px}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 4px}
h2{font-size:1.2rem;margin:36px 0 10px;padding-top:12px;border-top:1px solid var(--line)}
h3{font-size:.95rem;margin:0;font-weight:650}
p{margin:6px 0}
.faint,.cut,footer,figcaption p,.unit{color:var(--faint)}
.cut{font-size:.85em;white-space:nowrap}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(230px,100%),1fr));
gap:10px 20px;margin:14px 0 0}
.facts dt{color:var(--faint);font-size:.8rem}
.facts dd{margin:0}
.grid-of{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(330px,100%),1fr));gap:16px}
figure,.card{margin:0;padding:12px 14px;background:var(--soft);border-radius:8px;min-width:0;
break-inside:avoid}
figcaption p{font-size:.84rem;line-height:1.4}
.card+.card{margin-top:14px}
.pair>.card{margin-top:0}
.prompt{color:var(--faint);border-left:3px solid var(--line);padding-left:10px}
.prompt:not(:first-child){margin-top:18px}
.top{display:flex;justify-content:space-between;gap:12px;align-items:baseline}
.top b{white-space:nowrap;font-variant-numeric:tabular-nums}
svg{display:block;width:100%;height:auto;margin:6px 0}
svg text{fill:var(--faint);font-size:11px}
.grid{stroke:var(--line);stroke-width:1}
polyline{fill:none;stroke-width:2;stroke-linecap:round;stroke-linejoin:round}
polyline.dot{stroke-width:7}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;margin:8px 0;padding:0;list-style:none}
.lasts{margin:0;padding:0;list-style:none;display:flex;flex-wrap:wrap;gap:2px 14px;
font-variant-numeric:tabular-nums;font-size:.9rem}
.key{display:inline-block;width:22px;height:0;border-top:3px solid;margin-right:7px;
vertical-align:middle}
.alarm{border-left:4px solid var(--mark);margin:10px 0}
.alarm h3{color:var(--mark)}
.text{white-space:pre-wrap;margin:6px 0;max-height:26em;overflow-y:auto}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(300px,100%),1fr));gap:14px}
.pair>*{min-width:0}
.score{font-variant-numeric:tabular-nums;font-weight:650}
.heat{white-space:pre-wrap;line-height:1.9;margin:8px 0;max-height:30em;overflow-y:auto}
.heat span,.scale span{padding:2px 0;border-radius:3px;-webkit-print-color-adjust:exact;
print-color-adjust:exact}
.scale{font-size:.84rem;color:var(--faint)}
.scale span{padding:2px 8px;color:var(--ink)}
.wide{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;font-size:.9rem}
th,td{text-align:left;padding:5px 16px 5px 0;border-bottom:1px solid var(--line);
vertical-align:top;min-width:5em;max-width:24em;overflow-wrap:break-word}
th[scope=row]{font-weight:500;color:var(--faint)}
pre,code{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.85rem}
pre{background:var(--soft);padding:12px 14px;border-radius:8px;white-space:pre-wrap;margin:8px 0}
details{margin:12px 0}
summary{cursor:pointer;color:var(--run0)}
summary:focus-visible,.wide:focus-visible,.text:focus-visible{outline:2px solid var(--run0);
outline-offset:2px}
footer{margin-top:40px;padding-bottom:30px;font-size:.84rem}
@media (max-width:480px){main,header,footer{padding:0 14px}header{padding-top:18px}
h1{font-size:1.35rem}body{font-size:15px}
.facts{grid-template-columns:1fr 1fr}}
@media print{body{background:none;font-size:11px}.text,.heat{max-height:none}
details::details-content{content-visibility:visible}figure,.card{border:1px solid var(--line)}}
"""


def style() -> str:
    """The style sheet; a token's heat has the colours of `terminal.heat`."""
    above, below = (",".join(map(str, heat(end))) for end in (1.0, -1.0))
    shades = "".join(
        f".{sign}{k}{{background:rgba(var(--{name}),{k / SHADES:.3f})}}"
        for sign, name in (("p", "above"), ("n", "below")) for k in range(1, SHADES + 1)
    )
    dashed = ";stroke-dasharray:8 5;border-top-style:dashed"  # so that eight are told apart
    runs = "".join(
        f".run{k}{{stroke:var(--run{k});border-color:var(--run{k}){dashed if k > 3 else ''}}}"
        for k in range(8)
    )
    return (f":root{{{_LIGHT}--above:{above};--below:{below}}}"
            f"@media (prefers-color-scheme:dark){{:root{{{_DARK}}}}}{_RULES}{runs}{shades}").strip()
