"""The bibliography's labels, in the words of the text: Lu *et al.*, 2022."""
from collections import Counter

from pybtex.plugin import register_plugin
from pybtex.style.formatting.alpha import Style
from pybtex.style.labels import BaseLabelStyle


class AuthorYear(BaseLabelStyle):
    """Who wrote it and when, with a letter where that is not enough."""
    def format_labels(self, entries):
        """A label for each entry."""
        names = [["".join(person.last_names) or str(person) for person in entry.persons["author"]] for entry in entries]
        who = [" and ".join(n) if len(n) < 3 else f"{n[0]} et al." for n in names]
        labels = [f"{name}, {entry.fields['year']}" for name, entry in zip(who, entries)]
        seen, often = Counter(), Counter(labels)
        for label in labels:
            seen[label] += 1
            yield label + ("abcdefgh"[seen[label] - 1] if often[label] > 1 else "")


class AuthorYearStyle(Style):
    """Alpha with those labels."""
    default_label_style = AuthorYear


def setup(app):
    """Makes this module a Sphinx extension."""
    register_plugin("pybtex.style.formatting", "author_year", AuthorYearStyle)
    return {"parallel_read_safe": True}
