"""A page opened from a disk: the theme's requests that only a server could answer are taken out of the built pages."""
import re
from pathlib import Path

# fonts of icons that are drawn as SVG anyway, and cells run live on somebody's server, which this book has none of
ONLINE = re.compile(r'\s*<link rel="preload" as="font"[^>]*>|\s*<script[^>]*sphinx-thebe[^>]*></script>'
                    r'|\s*<script>const THEBE_JS_URL[^<]*</script>')


def clean(app, exception):
    """Rewrites every page once it is written."""
    if exception is None and app.builder.format == "html":
        for page in Path(app.outdir).rglob("*.html"):
            page.write_text(ONLINE.sub("", page.read_text(encoding="utf-8")), encoding="utf-8")


def setup(app):
    """Runs after the last page."""
    app.connect("build-finished", clean)
    return {"parallel_read_safe": True}
