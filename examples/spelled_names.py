"""Names as people spell them: Americans' first names and surnames, and the places that post goes to.

Nearly a third of AN4 is spelled letters, mostly names, and a letter that is hard to hear (b, d, e, g, p, t, v) is often
told by those around it. The lists are public ones, and nothing in them comes from AN4: first names and surnames of the
census of 1990 (package ``names``), a year before AN4 was recorded, and post offices (package ``zipcodes``).
"""

from __future__ import annotations

from collections import defaultdict
from functools import cache
from typing import Any

import names
import numpy as np
import zipcodes

LONGEST = 14  # letters


@cache
def name_lists() -> list[tuple[list[str], np.ndarray]]:
    """First names, surnames, places: upper case without spaces, and how likely each one and those before it are.

    A name is drawn by how many bear it, a place by how many post codes it has, to the power of 3/4: what is common
    comes often, and still most of what is drawn is rare.
    """
    first: defaultdict[str, float] = defaultdict(float)
    last: defaultdict[str, float] = defaultdict(float)
    places: defaultdict[str, float] = defaultdict(float)
    for kind, path in names.FILES.items():
        with open(path, encoding="ascii") as file:
            for line in file:
                name, percent = line.split()[:2]
                (last if kind == "last" else first)[name] += max(float(percent), 0.0005)  # the least is printed as 0
    post_codes: Any = zipcodes  # its functions have no types
    for place in post_codes.list_all():
        if place["zip_code_type"] != "MILITARY":
            places["".join(letter for letter in place["city"].upper() if "A" <= letter <= "Z")] += 1
    lists = []
    for counts in (first, last, places):
        kept = {name: count for name, count in counts.items() if 2 <= len(name) <= LONGEST}
        weights = np.fromiter(kept.values(), float) ** 0.75
        lists.append((list(kept), np.cumsum(weights / weights.sum())))
    return lists


def random_name(rng: np.random.Generator) -> str:
    """A first name, a surname or a place, equally often."""
    listed, ends = name_lists()[int(rng.integers(3))]
    return listed[min(int(np.searchsorted(ends, rng.random())), len(listed) - 1)]
