"""What the distribution says of itself that hangs on the project's public address: links, and the README on an index.

`repository: url` in `_config.yml` is the one place that holds the address. An index shows the README without the folder
it stands in: pictures and links lead to that address, and as long as there is none the README goes without them.
"""
import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

NEAR = r"\((?!\w+:|#)"   # of a link that is no address: it leads to a file of this folder


def on_an_index(text, url, branch):
    """The README as it reads elsewhere."""
    if not url:
        text = re.sub(rf"!\[[^]]*\]{NEAR}[^)]+\)\n\n\*.*\*\n\n", "", text)   # a picture and its caption
        return re.sub(rf"\[([^]]*)\]{NEAR}[^)]+\)", r"\1", text)
    text = re.sub(rf"(!\[[^]]*\]){NEAR}", rf"\1({url}/raw/{branch}/", text)
    return re.sub(rf"(\]){NEAR}", rf"\1({url}/blob/{branch}/", text)


class Address(MetadataHookInterface):
    """Fills in the fields that `pyproject.toml` calls dynamic; hatchling calls it."""
    def update(self, metadata):
        """Adds to the `project` table in place."""
        root = Path(self.root)
        said = re.search(r'^repository:.*\n +url: "(.*)"\n +branch: (\w+)', (root / "_config.yml").read_text(encoding="utf-8"), re.M)
        url, branch = said.groups()
        text = on_an_index((root / "README.md").read_text(encoding="utf-8"), url, branch)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
        if url: metadata["urls"] = {"Repository": url, "Issues": f"{url}/issues"}
