"""Links from pages to other files of the repository work on the site.

Pages link to sources, benchmarks and examples by their relative paths, as on any host of the
repository. Each such file becomes a page of the site, ``files/<path>.html``: Markdown as a page,
images as they are, everything else as highlighted source. A folder stands for its README.
"""

import shutil
from collections.abc import Iterator
from os.path import relpath
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from docutils import nodes
from markdown_it import MarkdownIt
from markdown_it.token import Token
from mdit_py_plugins.anchors import anchors_plugin
from pygments.lexers import get_lexer_for_filename
from pygments.util import ClassNotFound
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util import logging

logger = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parents[2]
AS_THEY_ARE = {".png", ".svg", ".jpg", ".gz"}


def page_of(path: Path) -> str:
    """Returns the name of the page that shows a file of the repository."""
    return f"files/{path.relative_to(ROOT).as_posix()}"


def url_of(path: Path) -> str:
    """Returns the address of a file within the site."""
    return page_of(path) + ("" if path.suffix in AS_THEY_ARE else ".html")


def file_of(path: Path) -> Path | None:
    """Returns the file that a link leads to, if it is one of the repository."""
    path = path.resolve()
    if path.is_dir() and (path / "README.md").is_file():
        path = path / "README.md"
    return path if path.is_file() and path.is_relative_to(ROOT) else None


def target_of(node: nodes.Element, source: Path) -> tuple[Path | None, str]:
    """Returns the file that a node of MyST refers to, and the place in it."""
    target, _, place = unquote(node["reftarget"]).partition("#")
    place = place or node.get("reftargetid") or ""
    if node.get("refdomain") == "doc":  # A Markdown file outside docs/, without its suffix.
        target += ".md"
    return file_of(source.parent / target), place


def resolve_links(app: Sphinx, document: nodes.document) -> None:
    """Replaces the links of a page to files that are not pages."""
    env = app.env
    source = Path(env.doc2path(env.docname))
    linked: set[Path] = env.repository_files.setdefault(env.docname, set())  # type: ignore[attr-defined]
    kinds = (addnodes.pending_xref, addnodes.download_reference)
    for node in [node for kind in kinds for node in document.findall(kind)]:
        if node.get("reftype") != "myst" or node["reftarget"] in env.found_docs:
            continue
        path, place = target_of(node, source)
        if path is None or env.path2doc(path) in env.found_docs:
            continue
        linked.add(path)
        depth = env.docname.count("/")
        uri = "../" * depth + url_of(path) + (f"#{place}" if place else "")
        reference = nodes.reference("", "", internal=True, refuri=uri)
        reference += [child.deepcopy() for child in node.children]
        node.replace_self(reference)


class MarkdownPages:
    """Renders Markdown files, and collects the files that they link to."""

    def __init__(self, app: Sphinx) -> None:
        """Renders for the site that ``app`` builds."""
        self.app = app
        self.found: set[Path] = set()
        self.source = ROOT
        options = {"html": False, "highlight": self.highlight}
        self.renderer = MarkdownIt("commonmark", options).enable("table").use(anchors_plugin)

    def highlight(self, code: str, language: str, _: str) -> str:
        """Returns highlighted source."""
        return highlighted(self.app, code, language or "text")

    def render(self, source: Path) -> str:
        """Returns the HTML of a file."""
        self.source = source
        tokens = self.renderer.parse(source.read_text())
        for token in tokens:
            for child in token.children or []:
                self.resolve(child)
        html: str = self.renderer.renderer.render(tokens, self.renderer.options, {})
        return html.replace(
            "<table>", '<div class="table-wrapper"><table class="docutils">'
        ).replace("</table>", "</table></div>")

    def resolve(self, token: Token) -> None:
        """Replaces the address of a link or image."""
        for name in ("href", "src"):
            target, hash_, place = str(token.attrGet(name) or "").partition("#")
            if not target or "://" in target:
                continue
            path = file_of(self.source.parent / unquote(target))
            here = (Path("/") / page_of(self.source)).parent
            if path is None:
                logger.warning("%s: no file %s", self.source.relative_to(ROOT), target)
                continue
            docname = self.app.env.path2doc(path)
            if docname in self.app.env.found_docs:
                url = f"{docname}.html"
            else:
                self.found.add(path)
                url = url_of(path)
            token.attrSet(name, relpath(Path("/") / url, here) + hash_ + place)


def highlighted(app: Sphinx, code: str, language: str) -> str:
    """Returns highlighted source in the site's colours."""
    return app.builder.highlighter.highlight_block(code, language)  # type: ignore[attr-defined,no-any-return]


def language_of(path: Path) -> str:
    """Returns the name of the lexer for a file."""
    if path.suffix == ".cu":
        return "cuda"
    try:
        return str(get_lexer_for_filename(path.name).aliases[0])
    except ClassNotFound:
        return "bash" if path.read_text().startswith("#!") else "text"


def collect_pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yields a page for each file that a page of the site, or such a file, links to."""
    markdown = MarkdownPages(app)
    markdown.found = set().union(*app.env.repository_files.values())  # type: ignore[attr-defined]
    done: set[Path] = set()
    while waiting := sorted(markdown.found - done):
        for path in waiting:
            done.add(path)
            name = path.relative_to(ROOT).as_posix()
            if path.suffix in AS_THEY_ARE:
                copy = Path(app.outdir) / url_of(path)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
                continue
            if path.suffix == ".md":
                body = markdown.render(path)
            else:
                body = f"<h1>{name}</h1>" + highlighted(app, path.read_text(), language_of(path))
            yield page_of(path), {"title": name, "body": body}, "page.html"


def setup(app: Sphinx) -> dict[str, Any]:
    """Registers the extension."""

    def start(app: Sphinx) -> None:
        if not hasattr(app.env, "repository_files"):
            app.env.repository_files = {}  # type: ignore[attr-defined]

    def purge(app: Sphinx, env: Any, docname: str) -> None:
        env.repository_files.pop(docname, None)

    app.connect("builder-inited", start)
    app.connect("env-purge-doc", purge)
    app.connect("doctree-read", resolve_links, priority=100)
    app.connect("html-collect-pages", collect_pages)
    return {"parallel_read_safe": False}
