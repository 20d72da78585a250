"""One self-contained page, and its figures as PNG, from what the benchmarks wrote.

    python benchmarks/report.py RESULT.json ... --out benchmarks/results/report.html

Takes the JSON of `pytest benchmarks/ --benchmark-json`, of `bench_training.py` and of `scaling.py`,
any number of each, in any order.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
from pathlib import Path
from typing import Any

import figures
import matplotlib.pyplot as plt
import paper_results
import tables
from matplotlib.figure import Figure

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1250px; margin: 2em auto; padding: 0 1em;
       color: #1a1a1a; }
h1 { font-size: 1.6em; } h2 { margin-top: 2em; border-bottom: 1px solid #ccc; }
h3 { margin-bottom: .3em; font-family: ui-monospace, monospace; }
img { max-width: 100%; } .wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 12px; margin: .6em 0; }
th { text-align: left; border-bottom: 2px solid #999; padding: .25em .55em; vertical-align: bottom;
     white-space: nowrap; }
td { border-bottom: 1px solid #e4e4e4; padding: .2em .55em; white-space: nowrap; }
th.n, td.n { text-align: right; }
td.n { font-variant-numeric: tabular-nums; } td:last-child { white-space: normal; }
tr:nth-child(odd) td { background: #fafafa; }
p { max-width: 48em; }
@page { size: A3 landscape; margin: 1cm; }
"""


class Page:
    """Collects sections; figures go into the page, and beside it as PNG."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.parts: list[str] = []
        self.names: list[str] = []

    def section(self, title: str, *paragraphs: str) -> None:
        self.parts.append(f"<h2>{html.escape(title)}</h2>")
        self.parts += [f"<p>{html.escape(text)}</p>" for text in paragraphs]

    def add(self, markup: str) -> None:
        self.parts.append(markup)

    def figure(self, name: str, figure: Figure, what: str) -> None:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130)
        plt.close(figure)
        self.names.append(name)
        if (n := self.names.count(name)) > 1:  # of another document
            name = f"{name}-{n}"
        self.out.with_name(f"{self.out.stem}-{name}.png").write_bytes(buffer.getvalue())
        data = base64.b64encode(buffer.getvalue()).decode()
        self.add(f'<img alt="{html.escape(what)}" src="data:image/png;base64,{data}">')

    def write(self) -> None:
        title = "sparsegrad_kernels: benchmarks"
        head = f'<meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        body = f"<h1>{title}</h1>{''.join(self.parts)}"
        self.out.write_text(
            f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>'
        )


def training_section(page: Page, document: dict[str, Any]) -> None:
    settings = document["settings"]
    how = settings["dtype"] + " as tf32" * settings.get("tf32", False)
    how += ", as CUDA graphs" * settings.get("graph", False)
    page.section(
        f"Training on {document['provenance'].get('card') or document['provenance']['CPU']}",
        "The paper's Table 3: averages over the tasks, and ratios to regular fine-tuning of the "
        f"same model. The paper's column: {paper_results.SOURCE}. Its SparseGrad with "
        "sparse-by-dense products stands beside ours too. As there, all else in the model is "
        "trained by AdamW in every method.",
        f"Settings: layers {settings['layers'] or 'all'}, {how}, "
        f"{settings['turns']} turns of {settings['steps']} steps, medians; bases from "
        f"{settings['basis_steps']} batches. "
        "Lengths are a model of GLUE's (benchmarks/glue.py), weights are random but MiniLM's: "
        "the ranks that an energy leaves are a random network's.",
    )
    page.add(tables.averages_table(document["rows"]))
    models = "-".join(dict.fromkeys(row["model"] for row in document["rows"]))
    name = f"training-{document['provenance']['device']}-{models}"
    page.figure(name, figures.training(document["rows"]), "speed and memory")
    page.section(
        "By task",
        "The paper's Tables 7 and 8. SparseGrad's fold counts as forward. Out of memory is a row.",
    )
    page.add(tables.tasks_table(document["rows"]))


def operators_section(page: Page, documents: list[dict[str, Any]]) -> None:
    benchmarks = [benchmark for document in documents for benchmark in document["benchmarks"]]
    page.section(
        "Operators",
        "All contenders of a case take turns in one run and are checked before; medians. The "
        "bound is the least that has to be done, done by torch (one read, or the dense product of "
        "what is not zero), or bytes over bandwidth where no run does it. Of the "
        "reference and the peers the tables have their time over ours.",
    )
    for index, document in enumerate(documents):
        found = document["benchmarks"]
        info = document["machine_info"]["sparsegrad"]
        name = f"{info['device']}-{found[0]['file_backend']}-{index}"
        page.figure(f"peers-{name}", figures.peers(found), "time of each peer over ours")
        if "roofs" in document["machine_info"]:
            title = str(info.get("card") or info["CPU"])
            roofs = document["machine_info"]["roofs"]
            page.figure(f"roofline-{name}", figures.roofline(found, roofs, title), "roofline")
    for op in dict.fromkeys(b["extra_info"]["op"] for b in benchmarks):
        page.add(f"<h3>{op}</h3>" + tables.operators_table(op, benchmarks))


def scaling_section(page: Page, document: dict[str, Any]) -> None:
    provenance = document["provenance"]
    page.section(
        f"Scaling of one linear's step on {provenance.get('card') or provenance['CPU']}",
        "Forward, backward and optimizer. The bound is the dense forward and the input gradient of "
        "the tokens that have one. Dotted: where SparseGrad costs what dense training does.",
    )
    page.figure(f"scaling-{provenance['device']}", figures.scaling(document["curves"]), "scaling")
    page.add(tables.crossings_table(document["curves"]))


def communication_section(page: Page, rows: list[dict[str, Any]]) -> None:
    page.section(
        "Communication of data-parallel training, on paper",
        "From shapes, not measured: benchmarks/communication.py says what is assumed. Gathering "
        "each rank's own k entries grows with the ranks and loses to reducing the dense gradient "
        "beyond 1 / density of them, 100 at 1%; in a truncated basis the gradient is small and is "
        "reduced.",
    )
    page.figure("communication", figures.communication(rows), "bytes per rank and step")
    page.add(tables.communication_table(rows))


def read(paths: list[Path]) -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """Name and document of each file, by kind."""
    found: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for path in paths:
        document = json.loads(path.read_text())
        kind = document.get("kind", "operators" if "benchmarks" in document else None)
        if kind is None:
            raise SystemExit(f"{path}: neither pytest-benchmark's JSON nor ours")
        if kind == "operators":
            document["provenance"] = document["machine_info"]["sparsegrad"]
            backends = [b["extra_info"].get("backend") for b in document["benchmarks"]]
            for benchmark in document["benchmarks"]:
                benchmark["file_backend"] = next(filter(None, backends), "?")
        found.setdefault(kind, []).append((path.name, document))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT.json")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/report.html"))
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    found = read(options.results)
    page = Page(options.out)
    for _, document in found.get("training", []):
        training_section(page, document)
    if "operators" in found:
        operators_section(page, [document for _, document in found["operators"]])
    for _, document in found.get("scaling", []):
        scaling_section(page, document)
    if "scaling" in found:
        communication_section(page, found["scaling"][0][1]["communication"])
    page.section("Hardware and versions")
    documents = [item for items in found.values() for item in items]
    page.add(tables.provenance_table((name, d["provenance"]) for name, d in documents))
    page.write()
    print(options.out)


if __name__ == "__main__":
    main()
