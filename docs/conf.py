"""The site: Markdown pages, Python's reference from docstrings, that of C++ from the headers."""

import shutil
import subprocess
import sys
from pathlib import Path

import tomllib
from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.errors import ConfigError
from sphinx.pycode import ModuleAnalyzer

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path[:0] = [str(DOCS), str(DOCS / "_extensions")]

from check_search import QUERIES  # noqa: E402

project = "torch-rope"
author = "torch-rope contributors"
copyright = author
version = release = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]

extensions = [
    "breathe",
    "myst_parser",
    "repository_files",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_*"]
nitpicky = True

# ---- Pages ----

myst_enable_extensions = ["deflist", "colon_fence"]
myst_heading_anchors = 4
suppress_warnings = ["config.cache"]

html_theme = "furo"
html_title = f"torch-rope {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["errors.js"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
highlight_language = "text"


def add_search_terms(app: Sphinx, document: nodes.document) -> None:
    """Puts the pages that answer a query first, as terms of the index."""
    section = next(document.findall(nodes.section))
    terms = [query.lower() for query, pages in QUERIES.items() if app.env.docname in pages]
    entries = [("single", term, section["ids"][0], "main", None) for term in terms]
    section.insert(1, addnodes.index(entries=entries))


# ---- Python ----

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
napoleon_use_ivar = True
napoleon_use_rtype = False
add_module_names = False

analyze = ModuleAnalyzer.analyze


def analyze_without_overloads(self: ModuleAnalyzer) -> None:
    """Has autodoc show one signature with all options, not those for type checkers."""
    analyze(self)
    self.overloads.clear()


ModuleAnalyzer.analyze = analyze_without_overloads  # type: ignore[method-assign]


def name_types(app: Sphinx, kind: str, name: str, *_: object) -> None:
    """Replaces the names of private types by what they stand for."""
    annotations = app.env.current_document.autodoc_annotations.get(name, {})
    for argument, annotation in annotations.items():
        if annotation.endswith("Rotated"):
            annotations[argument] = "torch.Tensor | tuple[torch.Tensor, torch.Tensor]"


def setup(app: Sphinx) -> None:
    """Registers what this file adds."""
    app.connect("autodoc-process-signature", name_types, priority=900)
    app.connect("doctree-read", add_search_terms)


# ---- C++: doxygen's XML ----

XML = ROOT / "build" / "doxygen"
breathe_projects = {"rope": str(XML / "xml")}
breathe_default_project = "rope"
breathe_default_members = ("members", "undoc-members")
breathe_show_include = False
cpp_maximum_signature_line_length = 80


def run_doxygen() -> None:
    """Writes the XML of the public headers."""
    doxygen = shutil.which("doxygen")
    if doxygen is None:
        raise ConfigError(
            "the C++ reference needs doxygen: pip install -r docs/requirements.txt, or the package "
            "doxygen of the system"
        )
    XML.mkdir(parents=True, exist_ok=True)
    settings = (DOCS / "Doxyfile").read_text() + f"\nOUTPUT_DIRECTORY = {XML}\n"
    subprocess.run([doxygen, "-"], input=settings, text=True, cwd=ROOT, check=True)


run_doxygen()

# What nitpicky finds and this site does not document: the types of others, and private ones.
nitpick_ignore_regex = [
    ("py:.*", r"(collections|contextlib|torch|transformers|types|typing|typing_extensions)(\..*)?"),
    ("cpp:identifier", r"(at|c10|rope|std|torch)(::.*)?|NormWeight"),
]
