"""Buttons that need the book's public address: repository, issues, edits, Colab and Binder.

`repository: url` in `_config.yml` is the one place that holds it. As long as it is empty no button is shown.
"""
LAUNCH = {"notebook_interface": "jupyterlab", "binderhub_url": "https://mybinder.org",
          "colab_url": "https://colab.research.google.com"}


def switch_on(app, config):
    """Turns the buttons on where there is an address for them to lead to."""
    if not config.html_theme_options.get("repository_url"): return
    config.html_theme_options |= {"use_repository_button": True, "use_issues_button": True, "use_edit_page_button": True,
                                  "launch_buttons": LAUNCH}


def setup(app):
    """Runs when Sphinx has read the configuration, before the theme looks at it."""
    app.connect("config-inited", switch_on, priority=100)
    return {"parallel_read_safe": True}
