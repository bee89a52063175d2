"""Settings of the site of these pages: sphinx-build -W --keep-going -c docs . site, then open site/docs/index.html."""

import lape

project, author = "lape", "The lape authors"
version = release = lape.__version__
extensions = ["myst_nb"]
root_doc = "docs/index"
include_patterns = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/*.md", "docs/notebooks/*.ipynb"]
include_patterns += ["benchmarks/results/**/*.md"]
exclude_patterns = [".venv", "site", "runs"]
html_theme, html_title = "furo", f"lape {version}"
html_show_sourcelink = False
myst_heading_anchors = 4  # links to headings, as code hosts know them
nb_execution_mode = "force"  # notebooks are kept without their outputs, and run whenever the site is built
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_output_stderr = "remove"  # warnings of other libraries


def _titled(_: object, page: str, content: list[str]) -> None:
    """Give filed tables the name of their folder as title."""
    folder = "benchmarks/results/"
    if page.startswith(folder) and not content[0].startswith("# "):
        content[0] = f"# {page.removeprefix(folder)}\n\n{content[0]}"


def setup(app: object) -> None:
    """Tell Sphinx."""
    app.connect("source-read", _titled)  # pyright: ignore[reportAttributeAccessIssue]
