"""The page of `icone reproduce --flickr8k`: figures alone, beside what others report.

No image and no caption of the corpus stands in it, and nothing that a model retrieves: they are not ours to show.
"""

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from .experiments import (
    PAPER_TEMPERATURE,
    experiments_file,
    experiments_of,
    published,
    published_on_flickr8k,
)
from .page_parts import PACKAGE, Key, Page, header, label_of, line, ranking

PROTOCOL = "flickr8k"
_RECALLS = ("t2i_r1", "t2i_r5", "t2i_r10", "i2t_r1", "i2t_r5", "i2t_r10")


class Flickr8kPage(Page):
    """Set others' results and icone_hf's side by side."""

    def lines(self) -> Iterator[str]:
        """Yield the whole page."""
        # What the page is, and how its tables are to be read.
        yield f"# On photographs: {self.scale['datasets'][PROTOCOL]['label']}"
        yield ""
        yield "Written by `icone reproduce`; don't edit it, change `results.json` or the code. " + self.scale["about"]
        yield ""
        yield (
            'The corpus: M. Hodosh, P. Young, J. Hockenmaier, "Framing Image Description as a Ranking Task", JAIR 47 '
            "(2013), 853-899. Its pictures belong to those who took them, so this page has numbers and curves alone. "
            f"*{PACKAGE}*: mean ± standard deviation over n seeds. t2i: text to image, i2t: image to text; R@K and "
            "Rsum in percent. *-*: not given."
        )

        # One section for each experiment.
        for name in self.results["experiments"]:
            yield from ("", f"## {experiments_of(self.results['scale'])[name]['title']}", "")
            yield from {"table1": self._comparison, "table3": self._recipes, "figure3": self._temperatures}[name]()
            if name.startswith("figure"):
                yield from self.figure(name)
        yield from self.setting()

        # Where others' numbers stand.
        yield from ("", "## Others' results", "")
        yield from (f"- {note}" for note in published_on_flickr8k()["reading"])
        for number, source in published_on_flickr8k()["sources"].items():
            yield f"- [{number}] [{_short(source['address'])}]({source['address']}): {source['what']}."

    def _comparison(self) -> Iterator[str]:
        """Yield others' results, then icone_hf's."""
        others = published_on_flickr8k()
        columns = [*others["columns"], "rsum"]
        yield from header(self.protocol(PROTOCOL), "towers", *map(label_of, columns))
        for row in others["rows"]:
            method = f"{row['method']} ({row['work']}) {' '.join(f'[{number}]' for number in row['sources'])}"
            values = dict(zip(others["columns"], row["values"], strict=True))
            recalls = [values[name] for name in _RECALLS]
            rsum = None if None in recalls else sum(recalls)
            yield line(method, row["towers"], *map(_given, row["values"]), "-" if rsum is None else f"{rsum:.1f}")
        for key in self._keys("table1"):
            recipe = experiments_file()["recipes"][key[3]]
            yield line(
                f"**{PACKAGE}: {recipe['label']}**",
                f"{key[1]}, {'trained' if _trains_towers(recipe) else 'frozen'}",
                *self.measured(key, PROTOCOL, columns),
            )
        yield ""

    def _recipes(self) -> Iterator[str]:
        """Yield one row a recipe, and their order."""
        columns = published()["columns"]
        recipes = experiments_file()["recipes"]
        yield from header(f"{PACKAGE}: {self.protocol(PROTOCOL)}", "towers", *map(label_of, columns))
        for key in self._keys("table3"):
            towers = "trained" if _trains_towers(recipes[key[3]]) else "frozen"
            yield line(recipes[key[3]]["label"], towers, *self.measured(key, PROTOCOL, columns))
        yield ""

        # Frozen and trained towers are no rivals: the one costs seconds, the other an hour.
        for towers in ("frozen", "trained"):
            rsums: dict[str, float | None] = {}
            for key in self._keys("table3"):
                recipe = recipes[key[3]]
                if _trains_towers(recipe) == (towers == "trained"):
                    values = self.values(key, PROTOCOL, "rsum")
                    rsums[recipe["label"]] = statistics.mean(values) if values else None
            yield f"Rsum from high to low, towers {towers}: {ranking(rsums)}."
            yield ""

    def _temperatures(self) -> Iterator[str]:
        """Yield Rsum over the temperature, validation beside test."""
        experiment = experiments_of(self.results["scale"])["figure3"]
        temperatures = experiment["temperatures"]
        yield from header("Rsum, towers frozen", "split", *(f"τ = {temperature:g}" for temperature in temperatures))
        for recipe in experiment["recipes"]:
            label = experiments_file()["recipes"][recipe]["label"]
            keys = [key for key in self._keys("figure3") if key[3] == recipe]
            validation = []
            for key in keys:
                values = [list(record["validation"].values())[-1]["rsum"] for record in self.runs.get(key, [])]
                validation.append(f"{statistics.mean(values):.1f}" if values else "not run")
            yield line(label, "validation", *validation)
            yield line("", "test", *(self.measured(key, PROTOCOL, ["rsum"])[0] for key in keys))
        yield ""
        yield f"The paper's highest Rsum, on Flickr30k, is at τ = {published()['figures']['figure3']['peak']:g}."
        yield ""

    def _keys(self, name: str) -> list[Key]:
        """List an experiment's cells, in its order."""
        experiment = experiments_of(self.results["scale"])[name]
        return [
            (PROTOCOL, image, text, recipe, temperature)
            for image, text in experiment["encoders"]
            for recipe in experiment["recipes"]
            for temperature in experiment.get("temperatures", [PAPER_TEMPERATURE])
        ]


def _trains_towers(recipe: Mapping[str, Any]) -> bool:
    return any(stage["train_encoders"] for stage in recipe["stages"])


def _given(value: float | None) -> str:
    return "-" if value is None else str(value)


def _short(address: str) -> str:
    """Shorten an address on GitHub to repository and page."""
    owner, name, *rest = address.removeprefix("https://github.com/").split("/")
    return f"{owner}/{name}, {' '.join(rest) if rest[0] == 'issues' else rest[-1]}"
