"""The figures of a run: where they are, and how they are drawn."""

from __future__ import annotations

import pathlib

from .. import figures
from ..catalogue import Study
from ..common import disk
from ..config.settings import Figures
from ..figures import stylefile
from ..names import FIGURE_FORMATS, Names
from ..results.directory import FIGURES, figure_file
from ..studies.facts import Facts


class Pictures:
    """Draws the figures of a run.

    Args:
        directory: directory of the run.
        how: how figures are presented; a style file is read now, once.

    Raises:
        OSError, ValueError: as :func:`rft_fast.figures.stylefile.read`.
    """

    def __init__(self, directory: pathlib.Path, how: Figures) -> None:
        self.folder = directory / FIGURES
        self._directory, self._how = directory, how
        self._style = {} if how.style is None else stylefile.read(how.style)

    def draw(
        self, study: Study, facts: Facts, models: Names | None, everyone: Names = ()
    ) -> list[pathlib.Path]:
        """Draw the figure of a study in all formats, and write its caption; earlier files are replaced.

        Without captions in files, an earlier one goes, unless a figure in another format stays.

        Args:
            study: a study that has something to show.
            facts: facts of the run's rows.
            models: names of models to show; None: the study's own choice.
            everyone: all models of the run, in the order of their colours.

        Returns:
            The files of the figure.

        Raises:
            OSError: a file cannot be written.
            ValueError: a file is a link or no plain file, or the study refuses the facts.
        """
        files = [figure_file(self._directory, study.name, kind) for kind in self._how.formats]
        caption = figure_file(self._directory, study.name, "txt")
        disk.check_targets([*files, caption], folders=[self.folder])
        self.folder.mkdir(exist_ok=True)  # which a copy of a run may lack
        others = (figure_file(self._directory, study.name, kind) for kind in FIGURE_FORMATS)
        if self._how.captions != "file" and not any(file.exists() for file in others if file not in files):
            caption.unlink(missing_ok=True)  # it describes a figure that is replaced
        with figures.look(
            width=self._how.width, captions=self._how.captions, style=self._style, models=everyone
        ):
            for file in files:
                study.draw(facts, file, models)
        return files
