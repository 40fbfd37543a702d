"""How sharpness is measured: estimator, noise, number of draws; all checked before anything runs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...kernels.contract import Write
from ...names import (
    COUPLINGS,
    ESTIMATORS,
    NOISE,
    NOISE_BATCH,
    ON,
    SAMPLING,
    WORST_CASE,
    Coupling,
    Estimator,
    Noise,
    On,
)
from ...settings import check_draws
from ..rows import SEEDS, as_number

VARIANCE = {"normal": 1.0, "uniform": 1 / 3, "rademacher": 1.0}


@dataclass(frozen=True)
class Protocol:
    """How sharpness is measured. The same noise serves every alpha, model and data set.

    Args:
        estimator: how the expectation is estimated:

            - ``"plain"``: mean over draws of L(w + delta) - L(w);
            - ``"antithetic"``: draws in pairs +delta, -delta, so that odd terms cancel;
            - ``"gradient"``: each draw less <gradient, delta>, whose mean is zero. One backward pass serves
              all layers and draws. Unbiased; most effective at small rho;
            - ``"hessian"``: rho^2 / 2 times the trace of |w| H |w|, the limit of small rho (Prop. A.1), by
              Hutchinson's products with random signs, all layers at once; ``draws`` counts products;
            - ``"apgd-l2"``, ``"apgd-linf"``: not the average but the worst case over ||delta / c|| <= rho (c
              = |w| if adaptive), by Auto-PGD with ``draws`` steps: a lower bound, without a standard error.
              Needs
              memory for five copies of the layer's weights.

        on: weights that the noise is added to: ``"interpolated"`` (Eq. 3) or ``"finetuned"`` (Sec. 3.1);
            None: as the study defines it.
        noise: ``"normal"``, ``"uniform"`` on (-1, 1) or ``"rademacher"``.
        adaptive: whether noise is scaled by |w|.
        seed: seed of the noise, in [0, 2**63), as tables hold signed integers. A draw is determined by its
            number and the seed, on every device.
        noise_batch: images per draw of noise (m-sharpness; 128 in the published code); None: one draw for the
            whole data set, or with noise per image one base perturbation for each 128 images.
        coupling: how the noises of different images are coupled; the expectation is the same:

            - ``"shared"``: they are the same for all images of a ``noise_batch``;
            - ``"image"``: each image has noise of its own, by random signs of its own for the rows and
              columns of each weight (flipout; Wen et al., ICLR 2018, arXiv 1803.04386). One pass over the
              images is worth many shared draws. The control of ``"gradient"`` is taken image by image: it
              needs memory for the layer's inputs and outputs of the images at hand. The standard error is
              from the draws of each ``noise_batch``. Weights that images cannot differ in get noise per
              ``noise_batch``, with a warning.

        goal: standard error to reach, in nats: drawing continues until every target has reached it, or
            ``most`` draws are made; None: a fixed number of draws.
        most: largest number of draws with a goal.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: an argument is out of range, or does not apply to the estimator; the message names it.
    """

    estimator: Estimator = "gradient"
    on: On | None = None
    noise: Noise = "normal"
    adaptive: bool = True
    seed: int = 0
    noise_batch: int | None = None
    goal: float | None = None
    most: int = 1000
    coupling: Coupling = "shared"

    def __post_init__(self) -> None:
        for name, offered in (
            ("estimator", ESTIMATORS),
            ("on", (None, *ON)),
            ("noise", NOISE),
            ("coupling", COUPLINGS),
        ):
            if getattr(self, name) not in offered:
                raise ValueError(
                    f"sharpness: {name} must be one of {', '.join(filter(None, offered))}; "
                    f"got {getattr(self, name)!r}"
                )
        Write(0.0, adaptive=self.adaptive, seed=self.seed)  # refuses what no write could do
        if self.seed >= SEEDS:
            raise ValueError(
                "sharpness: seed must lie in [0, 2**63), since tables hold signed 64-bit integers; "
                f"got {self.seed}"
            )
        if self.noise_batch is not None and (not _is_int(self.noise_batch) or self.noise_batch < 1):
            raise ValueError(
                f"sharpness: noise_batch must be a number of images or None; got {self.noise_batch!r}"
            )
        if not _is_int(self.most) or self.most < 1:
            raise ValueError(f"sharpness: most must be a number of draws, at least 1; got {self.most!r}")
        if self.goal is not None and not 0 < as_number("sharpness: goal", self.goal) < math.inf:
            raise ValueError(
                f"sharpness: goal must be a standard error above 0, in nats, or None; got {self.goal!r}"
            )
        if self.goal is not None and self.estimator in WORST_CASE:
            raise ValueError(
                f"sharpness: a goal needs a standard error, and {self.estimator!r} has none; leave it out"
            )
        if self.estimator not in SAMPLING and self.noise_batch is not None:
            raise ValueError(
                f"sharpness: {self.estimator!r} draws no such noise; leave noise_batch (--noise-batch) out"
            )
        if self.estimator not in SAMPLING and self.coupling == "image":
            raise ValueError(
                f"sharpness: {self.estimator!r} draws no noise for images to have of their own; coupling "
                f"(--coupling) 'image' goes with the estimators {', '.join(SAMPLING)}"
            )

    @property
    def images_per_noise(self) -> int | None:
        """Images per draw of noise, or per base perturbation; None: all."""
        if self.coupling == "image" and self.noise_batch is None:
            return NOISE_BATCH
        return self.noise_batch

    @property
    def where(self) -> On:
        """``on``, or Eq. 3's ``"interpolated"`` if that is None."""
        return self.on or "interpolated"

    def check_draws(self, draws: int) -> None:
        """Raise TypeError or ValueError unless this number of draws can be made."""
        if not _is_int(draws):
            raise TypeError(f"sharpness: draws must be an integer; got {draws!r}")
        check_draws(draws, self.estimator, self.goal, self.most)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
