"""The style sheet of a report: a phone, a wide screen, the dark and paper, without a font or a file from elsewhere."""

from __future__ import annotations

from fedtune.report.styles import COLOURS

DARK = ("#56B4E9", "#F08A3C", "#2FC79A", "#E59AC6", "#9AD3F5", "#F2C14E", "#B5B5B5")  # COLOURS, lighter, in their order


def _series(colours: tuple[str, ...]) -> str:
    return "".join(f"--s{number}:{colour};" for number, colour in enumerate(colours))


_RULES = "".join(
    f".s{number}{{stroke:var(--s{number});color:var(--s{number})}}.f{number}{{fill:var(--s{number})}}"
    for number in range(len(COLOURS))
)

LIGHT = "--ground:#fff;--raised:#f6f7f9;--ink:#1a1d21;--quiet:#59616b;--rule:#d9dde2;"
NIGHT = "--ground:#14171a;--raised:#1d2125;--ink:#e8eaed;--quiet:#a3abb5;--rule:#363c43;"
SIGNS = "--accent:#0072B2;--bad:#b3261e;--wait:#8a5a00;"
NIGHT_SIGNS = "--accent:#6cbdf0;--bad:#ff8a80;--wait:#f2c14e;"

STYLE = f"""
:root{{color-scheme:light dark;{LIGHT}{SIGNS}{_series(COLOURS)}}}
@media screen and (prefers-color-scheme:dark){{:root{{{NIGHT}{NIGHT_SIGNS}{_series(DARK)}}}}}
{_RULES}
*{{box-sizing:border-box}}
body{{margin:0;background:var(--ground);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",
 "DejaVu Sans",sans-serif;-webkit-text-size-adjust:100%}}
main{{max-width:1160px;margin:0 auto;padding:20px 16px 48px}}
h1{{font-size:1.6rem;line-height:1.25;margin:0 0 4px;overflow-wrap:anywhere}}
h2{{font-size:1.2rem;margin:40px 0 12px;padding-bottom:4px;border-bottom:1px solid var(--rule)}}
h3{{font-size:1rem;margin:0 0 6px}}
p{{margin:0 0 8px}}
.quiet{{color:var(--quiet)}}
.path,.reply,dd{{overflow-wrap:anywhere}} td{{overflow-wrap:break-word;max-width:30em}}
.code{{font-family:ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:.86em}}
.short{{white-space:nowrap}}
.state{{display:inline-block;margin:8px 0;padding:3px 12px;border:1.5px solid currentColor;border-radius:99px;font-weight:600;
 font-size:.9rem;color:var(--accent)}}
.state.bad{{color:var(--bad)}} .state.wait{{color:var(--wait)}}
.notice{{border-left:4px solid var(--bad);background:var(--raised);padding:10px 14px;margin:10px 0;white-space:pre-wrap;
 overflow-wrap:anywhere}}
.tiles{{display:grid;grid-template-columns:repeat(auto-fit,minmax(230px,1fr));gap:10px;margin:16px 0 0}}
.tile{{background:var(--raised);border:1px solid var(--rule);border-radius:10px;padding:10px 14px}}
.tile .name{{font-size:.84rem;color:var(--quiet)}}
.tile .value{{font-size:1.25rem;font-weight:650;line-height:1.3;font-variant-numeric:tabular-nums}}
.tile .more{{font-size:.84rem;color:var(--quiet)}}
.charts{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:24px 28px}}
figure{{margin:0;min-width:0;break-inside:avoid}}
.chart{{display:block;width:100%;height:auto;max-width:640px}}
.chart text{{fill:var(--quiet);font-size:11.5px}}
.chart .title{{fill:var(--ink);font-size:11.5px}}
.middle{{text-anchor:middle}} .end{{text-anchor:end}}
.grid{{stroke:var(--rule);stroke-width:.8}} .axis{{stroke:var(--quiet);stroke-width:1}}
.line{{fill:none;stroke-width:1.8;stroke-linejoin:round}}
.mark{{fill:var(--ground);stroke-width:1.5}}
.chart g:hover>.mark{{fill:currentColor}}
.pattern{{stroke:none}} .hatch{{stroke:var(--ground);stroke-width:1.6;fill:none}} .bar{{stroke:var(--ground);stroke-width:.4}}
.legend{{list-style:none;margin:4px 0 0;padding:0;display:flex;flex-wrap:wrap;gap:2px 18px;font-size:.88rem}}
.legend li{{display:flex;align-items:center;gap:6px;min-width:0;overflow-wrap:anywhere}}
.sign{{width:36px;height:14px;flex:none}} .swatch{{width:22px;height:14px;flex:none}}
.hidden{{position:absolute}}
.empty{{color:var(--quiet);font-style:italic}}
.wide{{overflow-x:auto;-webkit-overflow-scrolling:touch;max-width:100%}}
table{{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}}
th,td{{text-align:left;padding:5px 14px 5px 0;border-bottom:1px solid var(--rule);vertical-align:top}}
th{{font-weight:600;color:var(--quiet);white-space:nowrap}}
th[scope=row]{{color:var(--ink)}}
.right{{text-align:right;white-space:nowrap}}
.level{{display:inline-block;width:96px;height:10px;vertical-align:middle}}
.level .room{{fill:var(--rule)}} .level .full{{fill:var(--accent)}}
.answers{{display:grid;gap:14px}}
.answer{{border:1px solid var(--rule);border-radius:10px;padding:12px 14px;break-inside:avoid;min-width:0}}
.reply{{white-space:pre-wrap;unicode-bidi:isolate;margin:0}}
.answer .name{{font-size:.8rem;color:var(--quiet);margin:8px 0 0}}
.answer .name:first-child{{margin-top:0}}
.pair{{display:grid;gap:0 24px;grid-template-columns:repeat(auto-fit,minmax(min(100%,240px),1fr))}}
.settings{{columns:3 300px;column-gap:32px;margin:0;font-size:.9rem}}
.settings div{{display:flex;justify-content:space-between;gap:12px;border-bottom:1px solid var(--rule);padding:3px 0;
 break-inside:avoid}}
.settings dt{{color:var(--quiet);overflow-wrap:anywhere;min-width:6em}} .settings dd{{margin:0;text-align:right;min-width:0}}
.settings .given dt,.settings .given dd{{color:var(--ink);font-weight:650}}
footer{{margin-top:40px;color:var(--quiet);font-size:.84rem}}
@media (max-width:520px){{h1{{font-size:1.35rem}} main{{padding:14px 14px 40px}} .tiles{{grid-template-columns:1fr 1fr}}
 .tile .value{{font-size:1rem}} .tile{{padding:8px 10px}} .chart text,.chart .title{{font-size:13.5px}}}}
@media print{{
 @page{{margin:14mm 12mm}}
 body{{font-size:10.5pt}} main{{max-width:none;padding:0}}
 .wide{{overflow:visible}} table{{font-size:8pt}} th,td,.right{{padding-right:7px;white-space:normal}} td{{max-width:16em}}
 td .code{{overflow-wrap:anywhere}}
 .charts{{grid-template-columns:1fr 1fr;gap:14px 18px}}
 .tiles{{grid-template-columns:repeat(4,1fr)}} .tile .value{{font-size:11pt}}
 .tile .name,.tile .more{{font-size:8pt}} .legend{{font-size:8.5pt}}
 h2{{break-after:avoid;margin-top:22px}} tr,.tile{{break-inside:avoid}} thead{{display:table-header-group}}
 .bar,.pattern,.tile,.level *{{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
 .settings{{columns:2}} .pair{{grid-template-columns:repeat(3,1fr)}} .answer{{font-size:9pt}}
}}
"""
