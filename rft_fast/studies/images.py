"""Results of single images: what a study keeps of each image beside the means in its rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ..common.words import some

if TYPE_CHECKING:
    from ..evaluate import Scores

NO_CLASS = 65535
"""Stands for the prediction of logits with NaN."""


@dataclass(frozen=True, eq=False)
class ImageScores:
    """Results of the images of one row.

    Attributes:
        hits: Whether each image is classified correctly, bool [n]. Their mean is the row's accuracy, exactly.
        losses: Cross entropy in nats, rounded to float16 [n]: to 1 part in 2,000, or 3e-8 near 0; inf above
            65,504. The row's loss is the mean of losses in float32.
        predictions: Predicted class, uint16 [n]: a row of the head, as in :class:`rft_fast.evaluate.Scores`;
            :data:`NO_CLASS` for logits with NaN. None: not known.
    """

    hits: NDArray[np.bool_]
    losses: NDArray[np.float16]
    predictions: NDArray[np.uint16] | None

    @classmethod
    def of(cls, scores: Scores) -> ImageScores:
        """Convert scores.

        Raises:
            ValueError: A predicted class does not fit into 16 bits.
        """
        with np.errstate(over="ignore"):
            losses = scores.losses.numpy().astype(np.float16)
        predictions = None
        if scores.predictions is not None:
            found = scores.predictions.numpy()
            if found.max(initial=-1) >= NO_CLASS:
                raise ValueError(
                    f"images: predictions are kept in 16 bits, which number the classes 0 to {NO_CLASS - 1}; "
                    f"got class {found.max()}; measure without results of single images"
                )
            predictions = np.where(found < 0, NO_CLASS, found).astype(np.uint16)
        return cls(scores.correct.numpy().copy(), losses, predictions)

    def __len__(self) -> int:
        return len(self.hits)


Kept = MutableMapping[int, Sequence[ImageScores]]
"""Number of a measurement -> results of the images of each of its rows."""


@dataclass(frozen=True, eq=False)
class ImageResults:
    """Results of the same images in several rows, such as the positions of a path.

    Attributes:
        rows: The k rows, with the columns of :data:`rft_fast.studies.COLUMNS`.
        hits: Whether an image is classified correctly, bool [k, n].
        losses: Cross entropy in nats, float16 [k, n], as :attr:`ImageScores.losses`.
        predictions: Predicted class, uint16 [k, n], as :attr:`ImageScores.predictions`; None if some row has
            none.
    """

    rows: pd.DataFrame
    hits: NDArray[np.bool_]
    losses: NDArray[np.float16]
    predictions: NDArray[np.uint16] | None

    @classmethod
    def stack(cls, rows: pd.DataFrame, scores: Sequence[ImageScores]) -> ImageResults:
        """Join the results of rows, at least one, that were measured on the same images.

        Args:
            rows: The rows.
            scores: The results of each row, in the same order.
        """
        known = [each.predictions for each in scores if each.predictions is not None]
        return cls(
            rows.reset_index(drop=True),
            np.stack([each.hits for each in scores]),
            np.stack([each.losses for each in scores]),
            np.stack(known) if len(known) == len(scores) else None,
        )

    def ordered(self, order: NDArray[np.intp]) -> ImageResults:
        """Return them with their rows in another order."""
        predictions = None if self.predictions is None else self.predictions[order]
        rows = self.rows.iloc[order].reset_index(drop=True)
        return ImageResults(rows, self.hits[order], self.losses[order], predictions)

    @property
    def alphas(self) -> NDArray[np.float64]:
        """Position of each row, [k]."""
        found: NDArray[np.float64] = self.rows["alpha"].to_numpy(np.float64)
        return found


class Images(Protocol):
    """Where the results of single images come from, such as the directory of a run."""

    def of(self, study: str, model: str, dataset: str) -> ImageResults | None:
        """Return those of a study of a model on a data set, in the order of its rows; None: not kept."""


def check_images(images: object, caller: str) -> None:
    """Raise TypeError unless ``images`` is None or gives results of single images."""
    if images is not None and not callable(getattr(images, "of", None)):
        raise TypeError(
            f"{caller}: expected images as None or results of single images, such as "
            f"rft_fast.results.Stored(directory), got {type(images).__name__}"
        )


@dataclass(frozen=True)
class Renamed:
    """Image results of models and data sets under other names.

    Attributes:
        images: Those under the original names.
        original: New names of a model and a data set -> the original ones.
    """

    images: Images
    original: Mapping[tuple[str, str], tuple[str, str]]

    def of(self, study: str, model: str, dataset: str) -> ImageResults | None:
        """As :meth:`Images.of`. The rows in it have the original names."""
        known = self.original.get((model, dataset))
        return None if known is None else self.images.of(study, *known)


def image_results(
    rows: pd.DataFrame, kept: Mapping[int, Sequence[ImageScores]], dataset: str
) -> ImageResults:
    """Return the results of single images that a study has filled into its argument ``images``.

    Args:
        rows: The table that the study has returned.
        kept: What it has filled.
        dataset: Name of the data set.

    Raises:
        ValueError: There are no rows of this data set, or ``kept`` does not belong to ``rows``.
    """
    scores = [each for number in sorted(kept) for each in kept[number]]
    if len(scores) != len(rows):
        raise ValueError(
            f"image_results: expected results of the {len(rows)} rows, got {len(scores)}; give the table and "
            "the dictionary of the same call, in which nothing was before"
        )
    here = np.flatnonzero(rows["dataset"] == dataset)
    if not len(here):
        raise ValueError(f"image_results: no row of {dataset!r}; there are {names(rows['dataset'])}")
    return ImageResults.stack(rows.iloc[here], [scores[place] for place in here])


def names(values: Iterable[object]) -> str:
    """The different names among values, for a message."""
    return some(list(dict.fromkeys(map(str, values))), 6)
