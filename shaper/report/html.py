"""One self-contained HTML file: text, tables and plots, no address outside it.

The plotting library is put in once. Colours follow the reader's light or dark
setting: the page through CSS, the plots through a few lines of script that
restyle them when the setting changes.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


@dataclass(frozen=True, slots=True)
class Plot:
    """A figure with its title and a sentence on how to read it."""

    title: str
    figure: Figure
    caption: str = ""
    height_pixels: int = 380
    wide: bool = True
    """False: two of them share a row where the screen has room."""


@dataclass(frozen=True, slots=True)
class Block:
    """A piece of HTML that is put in as it is; the caller has escaped it."""

    markup: str


@dataclass(frozen=True, slots=True)
class Section:
    """A heading and what stands under it."""

    title: str
    parts: tuple[Plot | Block, ...]


def paragraph(text: str, css_class: str = "") -> Block:
    """A paragraph of plain text."""
    attribute = f' class="{html.escape(css_class)}"' if css_class else ""
    return Block(f"<p{attribute}>{html.escape(text)}</p>")


def definitions(pairs: Sequence[tuple[str, str]]) -> Block:
    """A list of names and what they are."""
    rows = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in pairs)
    return Block(f"<dl>{rows}</dl>")


def checks(lines: Sequence[tuple[bool | None, str]]) -> Block:
    """A list of statements that hold, don't hold, or could not be judged (None)."""
    words = {True: ("yes", "holds"), False: ("no", "does not hold"), None: ("open", "not judged")}
    rows = "".join(
        f'<li><span class="mark {words[held][0]}">{words[held][1]}</span> {html.escape(text)}</li>'
        for held, text in lines
    )
    return Block(f'<ul class="checks">{rows}</ul>')


def render(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The whole page.

    Args:
        title: of the page.
        lead: a sentence or two under it.
        sections: in order.
    """
    body: list[str] = []
    scripts: list[str] = []
    for section in sections:
        parts = [_part(part, scripts) for part in section.parts]
        heading = html.escape(section.title)
        body.append(
            f'<section><h2>{heading}</h2><div class="grid">{"".join(parts)}</div></section>'
        )
    library = f"<script>{_library()}</script>" if scripts else ""
    drawing = f"<script>{_SCRIPT}{''.join(scripts)}</script>" if scripts else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body><main>"
        f'<h1>{html.escape(title)}</h1><p class="lead">{html.escape(lead)}</p>'
        f"{''.join(body)}</main>{library}{drawing}</body></html>\n"
    )


def _library() -> str:
    """The plotting library without the addresses it holds (map tiles, a chart service).

    No plot here uses them; without them the page can't reach for anything. The
    names of XML dialects look like addresses and stay.
    """
    from plotly.offline import get_plotlyjs

    return re.sub(r"https?://(?!www\.w3\.org/)", "about:blank#", get_plotlyjs())


def _part(part: Plot | Block, scripts: list[str]) -> str:
    if isinstance(part, Block):
        return f'<div class="wide">{part.markup}</div>'
    name = f"plot{len(scripts)}"
    # "</" would end the script element wherever it stood in a string.
    data = str(part.figure.to_json()).replace("</", "<\\/")
    scripts.append(f"shaperPlot({name!r},{data});")
    caption = f"<figcaption>{html.escape(part.caption)}</figcaption>" if part.caption else ""
    size = "wide" if part.wide else "half"
    return (
        f'<figure class="{size}"><h3>{html.escape(part.title)}</h3>'
        f'<div id="{name}" class="plot" style="height:{part.height_pixels}px"></div>'
        f"{caption}</figure>"
    )


_STYLE = """
:root{--fg:#1b1f24;--soft:#59636e;--bg:#fff;--card:#f6f8fa;--line:#d1d9e0;--bad:#b3261e;
--good:#1a7f37}
@media(prefers-color-scheme:dark){:root{--fg:#e6edf3;--soft:#9aa5b1;--bg:#0f1318;--card:#171d24;
--line:#313a44;--bad:#ff8a80;--good:#56d364}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1180px;margin:0 auto;padding:1.2rem 1rem 3rem}
h1{font-size:1.6rem;line-height:1.25;margin:.4rem 0}
h2{font-size:1.2rem;margin:2.2rem 0 .6rem;padding-top:.6rem;border-top:1px solid var(--line)}
h3{font-size:1rem;margin:0 0 .3rem}
.lead{color:var(--soft);margin:.2rem 0 1rem;max-width:75ch}
.grid{display:grid;grid-template-columns:minmax(0,1fr) minmax(0,1fr);gap:1rem}
.wide{grid-column:1/-1;min-width:0}.half{min-width:0}
figure{margin:0;padding:.8rem .8rem .6rem;background:var(--card);border:1px solid var(--line);
border-radius:8px}
figcaption,.note{color:var(--soft);font-size:.88rem;max-width:90ch}
.plot{width:100%}
.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:8px}
table{border-collapse:collapse;width:100%;font-size:.92rem;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .7rem;text-align:left;font-weight:400;white-space:nowrap;
border-bottom:1px solid var(--line)}
tbody tr:last-child>*{border-bottom:0}
thead th{font-weight:600;background:var(--card)}
tr.h th{font-weight:600;background:var(--card);white-space:normal}
.n{text-align:right}
tr.worse td:last-child{color:var(--bad);font-weight:600}
tr.worse td:last-child::after{content:" worse";font-size:.75em}
dl{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:.15rem 1rem;font-size:.92rem;
margin:0}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
.checks{list-style:none;padding:0;margin:0}.checks li{margin:.25rem 0}
.mark{display:inline-block;min-width:7.2em;margin-right:.6em;font-weight:600}
.mark.yes{color:var(--good)}.mark.no{color:var(--bad)}.mark.open{color:var(--soft)}
@media(max-width:760px){.grid{grid-template-columns:minmax(0,1fr)}main{padding:.6rem .6rem 2rem}
figure{padding:.5rem .3rem}dl{grid-template-columns:minmax(0,1fr)}dd{margin:0 0 .4rem}
th,td{padding:.25rem .45rem}}
"""

_SCRIPT = """
const shaperDark=window.matchMedia('(prefers-color-scheme: dark)');
const shaperNarrow=window.matchMedia('(max-width: 760px)');
const shaperPlots=[];
function shaperStyle(layout){
  const dark=shaperDark.matches,out={'font.color':dark?'#e6edf3':'#1b1f24'};
  const line=dark?'#313a44':'#d1d9e0';
  for(const key of Object.keys(layout))if(/^[xy]axis\\d*$/.test(key)){
    out[key+'.gridcolor']=line;out[key+'.linecolor']=line;out[key+'.zerolinecolor']=line;}
  out['hoverlabel.bgcolor']=dark?'#171d24':'#ffffff';
  out['font.size']=shaperNarrow.matches?11:13;
  return out;}
function shaperPlot(name,figure){
  const element=document.getElementById(name),layout=figure.layout;
  layout.autosize=true;
  for(const [path,value] of Object.entries(shaperStyle(layout))){
    const [group,key]=path.split('.');(layout[group]??={})[key]=value;}
  Plotly.newPlot(element,figure.data,layout,
    {responsive:true,displaylogo:false,displayModeBar:false,plotlyServerURL:'',scrollZoom:false});
  shaperPlots.push(element);}
function shaperRestyle(){for(const element of shaperPlots)
  Plotly.relayout(element,shaperStyle(element.layout));}
shaperDark.addEventListener('change',shaperRestyle);
shaperNarrow.addEventListener('change',shaperRestyle);
"""
