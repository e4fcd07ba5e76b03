"""What the pages that kvx draws have in common: HTML with inline SVG, no scripts, nothing loaded from elsewhere."""

from __future__ import annotations

SVG_NAMESPACE = "http://www.w3.org/2000/svg"
DIGIT = 8  # the width of a character, in units of the SVG
STYLE = """
:root { color-scheme: light dark; --surface: #fcfcfb; --ink: #0b0b0b; --soft: #52514e; --grid: #e1e0d9;
  --axis: #a9a8a0; --first: #2a78d6; --second: #d95926; }
@media (prefers-color-scheme: dark) { :root { --surface: #1a1a19; --ink: #ffffff; --soft: #c3c2b7; --grid: #32322f;
  --axis: #6b6a64; --first: #3987e5; --second: #d95926; } }
body { margin: 0 auto; max-width: 1360px; padding: 24px; background: var(--surface); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 22px; overflow-wrap: anywhere; }
h2 { margin: 0; font-size: 16px; }
p { margin: 4px 0; color: var(--soft); overflow-wrap: anywhere; }
main { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 32px;
  margin-top: 24px; }
figure { margin: 0; }
svg { display: block; width: 100%; height: auto; font: 13px system-ui, sans-serif;
  font-variant-numeric: tabular-nums; }
text { fill: var(--soft); }
.value { fill: var(--ink); }
.grid { stroke: var(--grid); }
.axis { stroke: var(--axis); }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.point { stroke: var(--surface); stroke-width: 2; }
.first.line { stroke: var(--first); }
.first.point { fill: var(--first); }
.second.line { stroke: var(--second); stroke-dasharray: 5 5; }
.second.point { fill: var(--second); }
"""


def page(title: str, body: str, style: str = STYLE) -> str:
    """A whole page; title and body are HTML."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""
