"""The documentation site (CONTRIBUTING.md, Documentation)."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_extensions"), str(HERE.parent)]

from rft_fast import __version__  # noqa: E402

project = "rft_fast"
author = "The rft_fast authors"
version = release = __version__
html_title = "rft_fast"
html_show_copyright = html_show_sourcelink = html_copy_source = False

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "command_reference",
    "mathml",
    "repository",
]
exclude_patterns = ["_extensions", "_static", "Thumbs.db"]
smartquotes = False  # it would make one dash of the two of an option
source_suffix = {".md": "markdown"}

# Headings are link targets under the names that GitHub gives them: `page.md#a-heading`.
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_links_external_new_tab = False
suppress_warnings = ["myst.header"]  # a changelog starts anew at each version

# Seconds to import, and nothing of them is documented here.
autodoc_mock_imports = ["huggingface_hub", "matplotlib", "open_clip", "timm", "torchvision"]
autodoc_type_aliases = {name: name for name in ("Each", "Listed", "Requests", "Tensors")}
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": False}
napoleon_numpy_docstring = False
python_use_unqualified_type_names = True
add_module_names = False
maximum_signature_line_length = 80

html_theme = "pydata_sphinx_theme"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "logo": {"text": "rft_fast"},
    "navbar_align": "left",
    "header_links_before_dropdown": 8,
    "navbar_end": ["theme-switcher"],
    "show_toc_level": 2,
    "show_nav_level": 1,
    "search_as_you_type": True,
    "footer_start": ["sphinx-version"],
    "footer_end": [],
    "secondary_sidebar_items": ["page-toc"],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
html_sidebars = {name: [] for name in ("index", "start", "faq", "recipes/index")} | {"**": ["sidebar-nav-bs"]}
copybutton_prompt_text = "$ "
