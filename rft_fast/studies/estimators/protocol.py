"""How sharpness is measured: estimator, noise, number of draws; all checked before anything runs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...kernels.contract import Write
from ...names import (
    ESTIMATOR_CHOICES,
    NOISE,
    NOISE_BATCH,
    ON,
    WORST_CASE,
    Estimator,
    EstimatorChoice,
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
        estimator: how the expectation over noise is estimated. It is taken image by image, so noise may
            differ between images; one pass over the images is then worth many draws that they share.

            - ``"auto"``: ``"per-image-gradient"`` or ``"per-image"``, whichever has the lower product of
              variance and cost in the first draws of each target and rho; rows name the choice. Weights that
              cannot differ between images get ``"gradient"`` or ``"plain"``, with a warning;
            - ``"plain"``: mean over draws of L(w + delta) - L(w), the published protocol. The images of a
              ``noise_batch`` share each draw;
            - ``"gradient"``: the same, each draw minus <gradient, delta>, whose mean is zero (a control
              variate). Unbiased; most effective at small rho;
            - ``"per-image"``: each image has noise of its own, by random signs of its own for the rows and
              columns of each weight (flipout; Wen et al., ICLR 2018, arXiv 1803.04386). One base perturbation
              serves the images of a ``noise_batch``; with the scale of the noise it takes the memory of two
              float32 copies of the perturbed weights;
            - ``"per-image-antithetic"``: in pairs +delta, -delta, so that odd terms cancel;
            - ``"per-image-gradient"``: each image's rise minus <gradient of its loss, its perturbation>. One
              backward pass serves all draws and rhos, and the layers of two blocks. It needs memory for the
              inputs and outputs of these layers, for the images at hand;
            - ``"hessian"``: rho^2 / 2 times the trace of |w| H |w|, the limit of small rho (Prop. A.1), by
              Hutchinson's products with random signs, all layers at once; ``draws`` counts products;
            - ``"apgd-l2"``, ``"apgd-linf"``: not the average but the worst case over ||delta / c|| <= rho (c
              = |w| if adaptive), by Auto-PGD (Croce & Hein 2020), ``draws`` steps for each ``noise_batch``,
              and the mean over these: a lower bound. Needs memory for seven copies of the layer's weights,
              nine with restarts, and for l2 briefly for float64 copies of one tensor;
            - ``"apgd-l2-published"``, ``"apgd-linf-published"``: the same by the loop of the published code,
              for comparison with its numbers. It usually finds a lower loss, see docs/estimators.md.

        on: weights that the noise is added to: ``"interpolated"`` (Eq. 3) or ``"finetuned"`` (Sec. 3.1);
            None: as the study defines it.
        noise: ``"normal"``, ``"uniform"`` on (-1, 1) or ``"rademacher"``.
        adaptive: whether noise is scaled by |w|.
        seed: seed of the noise, in [0, 2**63), as tables hold signed integers. A draw is determined by its
            number and the seed, on every device.
        noise_batch: images per draw of noise, per base perturbation, per Hessian product or per worst case
            (m-sharpness; 128 in the published code); None: the whole data set. The standard error is from
            the draws of each of these parts. Where a text tower makes the head, all images share it, and so
            the noise: None is used, with a warning.
        goal: standard error to reach, in nats; None: a fixed number of draws. A pilot of ``draws`` in all
            parts together decides how many further draws are made (Stein's two-stage rule); only these make
            the result.
        most: largest number of draws with a goal, with those of the pilot.
        restarts: starts of each search for the worst case, of which the highest loss counts. Start 0 is at
            the clean weights; start r of part p of P is random, from the noise of draw r P + p: uniform in
            the ball (linf), or uniform on the sphere in units of c (l2).

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: an argument is out of range, or does not apply to the estimator; the message names it.
    """

    estimator: EstimatorChoice = "auto"
    on: On | None = None
    noise: Noise = "normal"
    adaptive: bool = True
    seed: int = 0
    noise_batch: int | None = NOISE_BATCH
    goal: float | None = None
    most: int = 1000
    restarts: int = 1

    def __post_init__(self) -> None:
        for name, offered in (
            ("estimator", ESTIMATOR_CHOICES),
            ("on", (None, *ON)),
            ("noise", NOISE),
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
        if not _is_int(self.restarts) or self.restarts < 1:
            raise ValueError(
                f"sharpness: restarts must be a number of starts, at least 1; got {self.restarts!r}"
            )
        if self.restarts > 1 and self.estimator not in WORST_CASE:
            raise ValueError(
                "sharpness: restarts (--restarts) are only for estimators of the worst case, "
                f"{', '.join(WORST_CASE)}; leave it out with {self.estimator!r}, got {self.restarts}"
            )
        if self.goal is not None and not 0 < as_number("sharpness: goal", self.goal) < math.inf:
            raise ValueError(
                f"sharpness: goal must be a standard error above 0, in nats, or None; got {self.goal!r}"
            )
        if self.goal is not None and self.estimator in WORST_CASE:
            raise ValueError(
                f"sharpness: a goal needs a standard error over draws, and {self.estimator!r} has "
                "none; leave the goal out"
            )

    @property
    def per_image(self) -> bool:
        """Whether images have noise of their own."""
        return self.estimator in ("auto", "per-image", "per-image-antithetic", "per-image-gradient")

    @property
    def antithetic(self) -> bool:
        """Whether draws come in pairs."""
        return self.estimator == "per-image-antithetic"

    @property
    def control(self) -> bool | None:
        """Whether a gradient is the control variate; None: the first draws decide."""
        return None if self.estimator == "auto" else self.estimator in ("gradient", "per-image-gradient")

    @property
    def used(self) -> Estimator:
        """The estimator that is named where nothing is drawn."""
        return "per-image-gradient" if self.estimator == "auto" else self.estimator

    @property
    def where(self) -> On:
        """``on``, or Eq. 3's ``"interpolated"`` if that is None."""
        return self.on or "interpolated"

    def check_draws(self, draws: int) -> None:
        """Raise TypeError or ValueError unless this number of draws can be made."""
        if not _is_int(draws):
            raise TypeError(f"sharpness: draws must be an integer; got {draws!r}")
        check_draws(draws, self.estimator, self.goal, self.most)

    def pilot(self, draws: int, parts: int) -> int:
        """Draws of a pilot of so many draws in all parts together: two or more, in pairs where they are."""
        unit = 2 if self.antithetic else 1
        return unit * max(2, math.ceil(draws / (unit * parts)))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
