"""Settings of the documentation site; `make docs` builds it."""

import sys
from pathlib import Path

from diffusion_cli import __version__

sys.path.insert(0, str(Path(__file__).parent / "extensions"))

project = "diffuse"
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "docstrings",
    "mathml",
    "yaml_reference",
]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
default_role = "code"  # single backticks in docstrings

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
autodoc_preserve_defaults = True
nitpick_ignore_regex = [("py:(class|obj)", ".*")]  # types in signatures

html_theme = "furo"
html_title = f"diffuse {release}"
html_math_renderer = "mathml"
html_copy_source = False
html_show_copyright = False
html_static_path = ["static"]
html_css_files = ["site.css"]
html_theme_options = {"top_of_page_buttons": []}
