"""A study in one file: accuracy halfway along the path, with its figure, words and section."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rft_fast.catalogue import Study, Task


class Halfway(Study):
    """Each data set at three positions of the path."""

    name = "halfway"
    help = "accuracy at a few positions (a toy)"
    most = 2
    ALPHAS = (0.25, 0.5, 0.75)

    def assumptions(self, request: Any) -> Iterator[str]:
        yield f"Halfway: {len(self.ALPHAS)} positions."

    def measure(self, task: Task) -> None:
        from rft_fast.studies.rows import Measured, scored

        record = Measured(self.name, len(self.ALPHAS), task.only, task.sink)
        for number, alpha in enumerate(self.ALPHAS):
            if record.wants(number):
                with task.path.at(alpha):
                    scores = task.evaluator.scores()
                rows = [scored(self.name, task.evaluator, data, scores, 0.0) for data in scores]
                record.add(number, [row | {"model": task.model, "alpha": alpha} for row in rows])

    def draw(self, facts: Any, file: Any, models: Any) -> None:
        from matplotlib import pyplot

        figure, panel = pyplot.subplots()
        for model, rows in facts.part(self.name).groupby("model"):
            panel.plot(rows["alpha"], rows["accuracy"], label=model)
        figure.savefig(file)
        pyplot.close(figure)

    def say(self, facts: Any) -> list[str]:
        best = facts.part(self.name)["accuracy"].max()
        return ["", f"halfway: at most {100 * best:.1f} %"]

    def findings(self, facts: Any) -> Iterator[Any]:
        from rft_fast.report.shown import Finding

        yield Finding("Halfway was measured.", self.name)

    def section(self, facts: Any) -> Any:
        from rft_fast.report.shown import Section

        return Section(self.name, "A toy", "Halfway there", "Accuracy at a few positions.")
