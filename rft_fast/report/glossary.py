"""The words of a report, each with its meaning: one table, for the page and for the documentation."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

from ..common.words import visible


@dataclass(frozen=True)
class Word:
    """A word and its meaning.

    Attributes:
        name: the word.
        means: its meaning, in one or two sentences.
        forms: other forms under which it stands in texts and tables.
        column: whether it has this meaning as the heading of a column only.
    """

    name: str
    means: str
    forms: tuple[str, ...] = ()
    column: bool = False

    @property
    def anchor(self) -> str:
        """Its place on the page."""
        return "word-" + re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


def _word(names: str, means: str) -> Word:
    name, *forms = names.lstrip(":").split("|")
    return Word(name, means, tuple(forms), names.startswith(":"))


WORDS = tuple(
    _word(names, means)
    for names, means in (
        ("zero-shot", "The CLIP model before fine-tuning: the end of the path at α = 0."),
        ("fine-tuned", "The model after training on a data set: the end of the path at α = 1."),
        ("path|paths", "The straight line in weight space from the zero-shot to the fine-tuned model."),
        (
            "alpha|α|alphas|position|positions",
            "Position on the path: 0 is zero-shot, 1 is fine-tuned. The weights there are (1 − α) · "
            "zero-shot + α · fine-tuned.",
        ),
        ("in distribution|in-distribution|ID", "Images of the kind that the model was fine-tuned on."),
        (
            "out of distribution|out-of-distribution|OOD",
            "Images of another kind than those that the model was fine-tuned on.",
        ),
        (":distribution", "Whether the images are of the kind that the model was fine-tuned on."),
        (":n|images|samples", "Number of images that were scored."),
        (":models", "Number of models over which the value is computed."),
        ("accuracy|acc.", "Share of images that are classified correctly."),
        (
            "loss|losses|clean loss",
            "Mean cross entropy of the images, in nats. Clean: without noise on the weights.",
        ),
        (
            "nats|nat",
            "Unit of the loss, with the natural logarithm. A uniform guess among k classes has a loss of "
            "ln k nats.",
        ),
        ("points|point", "Percentage points: from 50 % to 51 % is one point."),
        (
            "gain|gains|gained",
            "Eq. 2: highest accuracy on the path minus zero-shot accuracy. It is optimistic, as the "
            "position is chosen on the same images.",
        ),
        (":best gain", "Highest accuracy on the pruned path minus zero-shot accuracy, in points."),
        (":unpruned", "The same path with all weights kept."),
        ("best α", "The position of the highest accuracy."),
        ("held out", "The gain where α is chosen on four fifths of the images and measured on the others."),
        ("α of ID", "The position with the highest accuracy in distribution."),
        (
            "gain at α of ID",
            "The gain at the position that is best in distribution, so chosen on other images.",
        ),
        (
            "mode|modes",
            "Verdict on a path, by bounds that hold at all positions at once. Gain: some α beats "
            "zero-shot. High "
            "gain: by at least xi. Failure: no high gain is possible. Otherwise undecided.",
        ),
        ("high gain", "Some α beats zero-shot by at least xi, two points unless --xi says otherwise."),
        ("failure|fail|fails|failed|failing", "No α beats zero-shot, and no gain of xi or more is possible."),
        ("undecided", "The bounds include both no gain and a gain of xi or more."),
        ("xi|--xi", "The gain that counts as high: 0.02, which is two points, unless --xi says otherwise."),
        ("barrier", "Eq. 1: highest loss on the path minus zero-shot loss."),
        (
            "bump|bumps",
            "Largest rise of the loss above the straight line between the losses of the two ends. A loss "
            "that only slopes has none.",
        ),
        ("slope|slopes", "The loss rises above that at α = 0, but not above the line between its two ends."),
        (":shape of the loss|by a", "Bump: above the line between its ends. Slope: above zero-shot only."),
        ("rise|rise there|rise in loss", "Loss minus the loss at α = 0."),
        (
            "instability|unstable",
            "Def. 1: how much worse the worst position is than the mean of the two ends, in loss or in "
            "accuracy.",
        ),
        (
            "margin",
            "The size that counts: --straggler-margin for instability, --zero-margin for sharpness near "
            "zero.",
        ),
        ("layer|layers", "Weight and bias of one module, unless --granularity says otherwise."),
        (
            "straggler|stragglers",
            "Def. 1.2: a layer that is unstable when it alone moves along the path, while the others stay.",
        ),
        (
            "flat layer|flat layers|flat",
            "A layer whose layer-wise sharpness is near zero at every α above 0 by an equivalence test. "
            "The paper calls these stragglers, too.",
        ),
        (":flat within", "The margin of zero within which a layer counts as flat."),
        (
            "sharpness|general sharpness",
            "Eq. 3: mean rise of the loss when all weights get noise of size rho times their own magnitude.",
        ),
        ("layer-wise sharpness", "The sharpness with noise on the weights of one layer only."),
        ("rho|ρ", "Scale of the noise, relative to the magnitude of each weight."),
        ("noise", "Random changes of the weights, with mean zero."),
        ("draws|draw", "Number of independent realizations of the noise."),
        (":measured on|measured", "The images, the weights and the estimator of the sharpness."),
        (
            "saturated",
            "The perturbed model answers at chance. Its sharpness says nothing about flatness, and is not "
            "tested.",
        ),
        ("chance", "The accuracy of a guess: one over the number of classes."),
        (
            "pruning|pruned|prune",
            "Alg. 1: weights of some layers of the fine-tuned model are set to zero at random.",
        ),
        ("masks|mask", "Number of random choices of the weights that are removed."),
        ("control", "As many other layers, chosen at random and pruned, or held, in the same way."),
        (":criterion, method|criterion", "How the layers were chosen, and what happened to their weights."),
        (
            "coefficients|coefficient",
            "Factor of α for a layer: 0 keeps it at zero-shot.",
        ),
        ("plain path", "The path with the same α for all layers."),
        ("LiNeS", "Coefficients that rise in equal steps from the first block to the last."),
        (":layers held", "Number of layers with coefficient 0."),
        (":mean change", "Accuracy of the pruned path minus that of the unpruned one, mean over α > 0."),
        (":measure", "What is compared with accuracy or gain: a sharpness, or something that costs less."),
        (":against|outcome", "The quantity that the measure is compared with, out of distribution."),
        (
            "Kendall's τ|Kendall's tau|τ|tau",
            "Rank correlation over models: +1 for the same order, −1 for the reverse.",
        ),
        ("Spearman's ρ", "Rank correlation: the correlation of the ranks of the models."),
        (
            "rank correlation|rank correlations",
            "Whether models keep their order from one quantity to the other, −1 to +1.",
        ),
        ("τ given clean loss", "Kendall's τ after the part that the loss without noise explains is removed."),
        ("τ without one model", "Range of Kendall's τ with any one model left out."),
        (
            "size needed",
            "The smallest absolute Kendall's τ that would be significant with so many models and tests.",
        ),
        ("circular", "Measure and outcome are of the same images, which alone can make them agree."),
        (
            "p|p alone",
            "Probability of so strong an association if there were none, by permutation of the models.",
        ),
        ("p, corrected", "The same probability for the strongest of all tests of the same outcome (max-T)."),
        ("permutation", "The test reassigns the outcomes to the models in all or many random orders."),
        (
            "max-T",
            "Correction for many tests: each is compared with the largest of all of them under permutation.",
        ),
        ("Bonferroni", "Correction for many tests: the 5 % are divided among them."),
        ("corrected", "Adjusted so that all statements of the group hold together with 95 % confidence."),
        ("corrected lower end", "Lower end of the interval, corrected for all layers and positions."),
        ("pointwise", "With 95 % confidence for each value on its own, not for all of them together."),
        ("95 % bounds|bounds", "They hold at all positions at once, each side with 95 % confidence."),
        (
            "95 %|95 % interval|95 % intervals|interval|intervals",
            "Range that covers the true value in 95 % of such experiments.",
        ),
        ("standard error|standard errors|error bars", "Expected size of the random error of an estimate."),
        (
            "paired",
            "The difference is taken image by image on the same images, which removes their common part.",
        ),
        ("independent", "The two values are treated as measured on different images or noise."),
        (
            "Student's t",
            "Distribution of a mean whose spread is estimated from a few draws, masks or images.",
        ),
        (":verdict|what the interval says", "What the interval allows one to conclude."),
        ("too wide to conclude", "The interval includes both no effect and an effect that would count."),
        (":mean, failing", "Mean over the models that fail."),
        (":mean, gaining", "Mean over the models that gain."),
        ("significant|significantly", "The corrected p is at most 0.05."),
        (
            "soup|soups",
            "Mean of the weights of several fine-tuned models: of all, or of those a search keeps.",
        ),
        (
            "Model Stock",
            "Zero-shot plus t times the mean difference of the models, with t from their angles.",
        ),
        ("zoo", "A zero-shot model, models fine-tuned from it, and image sets."),
        ("SHA-256", "A fingerprint of a file: equal files have equal ones."),
        ("peak memory", "Largest memory of the process or of the GPU during the study."),
        (":B − A|difference", "Value of the second run minus that of the first."),
    )
)
"""All words, in the order of the studies. Forms are distinct."""


@cache
def _forms(column: bool) -> tuple[str, dict[str, Word]]:
    """A regular expression of all forms, in headings of columns or in sentences, and their words."""
    words = {form: word for word in WORDS for form in (word.name, *word.forms) if column or not word.column}
    words |= {form[0].upper() + form[1:]: word for form, word in words.items() if len(form) > 3}
    forms = "|".join(map(re.escape, sorted(words, key=len, reverse=True)))
    return rf"(?<![\w.%/-])(?:{forms})(?![\w-]|[./]\w)", words


def words_of(heading: str) -> list[Word]:
    """The words in the heading of a column."""
    pattern, words = _forms(column=True)
    return [*dict.fromkeys(words[form] for form in re.findall(pattern, heading))]


def split(text: str, names: Iterable[str] = ()) -> Iterator[tuple[str, Word | None]]:
    """Split a sentence at the first occurrence of each word.

    Args:
        text: any text.
        names: names of models, data sets and layers, in which no word is looked for.

    Yields:
        Parts of the text in their order, each with the word that it is, or None.
    """
    pattern, words = _forms(column=False)
    own = sorted({*names, *map(visible, names)} - {""}, key=len, reverse=True)
    alternatives = [*(rf"(?<!\w){re.escape(name)}(?!\w)" for name in own), f"(?P<word>{pattern})"]
    start, found = 0, set[Word]()
    for match in re.finditer("|".join(alternatives), text):
        if match["word"] is None or (word := words[match[0]]) in found:
            continue
        found.add(word)
        if match.start() > start:
            yield text[start : match.start()], None
        yield match[0], word
        start = match.end()
    if start < len(text):
        yield text[start:], None
