"""Names that people choose by, and numbers that options start from: in one place that loads nothing.

The command line is parsed with these before torch and the rest are imported. What each name stands for is
defined where it is computed.
"""

from __future__ import annotations

import math
from pathlib import Path

# --- what is measured ---------------------------------------------------------------------------------

STUDIES = ("interpolation", "layers", "sharpness", "layer-sharpness", "prune", "correlation")
XI = 0.02  # a gain of two points of accuracy counts as high

OTHERS = {"zeroshot": 0.0, "finetuned": 1.0}  # where the other layers are -> the alpha that they have
STRAGGLER_MARGIN = 0.1  # nats: instability that makes a straggler

SAMPLING = ("plain", "antithetic", "gradient")
WORST_CASE = {"apgd-l2": 2.0, "apgd-linf": math.inf}  # -> the norm that bounds the perturbation
ESTIMATORS = (*SAMPLING, "hessian", *WORST_CASE)
ZERO_MARGIN = 0.02  # nats: sharpness that counts as zero

CRITERIA = ("sharpness", "instability")
METHODS = ("zero", "zeroshot", "rescale", "magnitude")

# --- how weights are written --------------------------------------------------------------------------

ON = ("finetuned", "interpolated")
FILL = ("zero", "zeroshot")
NOISE = ("normal", "uniform", "rademacher")
IMPLS = ("auto", "native", "triton", "reference")  # the backends in the order in which "auto" prefers them
PRECISIONS = ("fp32", "ieee", "tf32", "bf16", "fp16")

# --- models and data ----------------------------------------------------------------------------------

CLASS_LISTS = ("imagenet", "cifar10", "cifar100", "stl10")
TEMPLATE_LISTS = ("openai", "simple", "photo")
HEADS = ("interpolate", "zeroshot", "finetuned")
TOWERS = ("image", "both")
FORMATS = {
    "soup": "model-soups: a state dict, 'model.*' and 'classification_head.*'",
    "wiseft": "WiSE-FT: a pickled ImageClassifier, image encoder and head",
    "flyp": "FLYP: a pickled CLIPEncoder, both towers, no head",
    "task-vector": "task vectors, patching: any other module pickled whole",
    "open_clip": "open_clip: a CLIP state dict, bare or under 'state_dict' beside the training's state",
    "openai": "OpenAI: a TorchScript archive of CLIP",
    "huggingface": "Hugging Face transformers: CLIP's state dict under its names ('vision_model.*')",
    "state-dict": "any other dict of tensors by name",
}
FOLDERS = ("folder", "imagenet", "imagenet-v2")  # a folder of class folders, with images as files
TREES = (*FOLDERS, "objectnet")  # all of class folders
KINDS = (*TREES, "cifar", "webdataset", "arrow", "npz")
ORDER = "order"  # instead of a label map: class i is row i


def as_given(text: str) -> Path | str:
    """What stands on a command line for a label map: its file, or the word order."""
    return ORDER if text == ORDER else Path(text)


# --- where results go ---------------------------------------------------------------------------------

TRACKERS = ("tensorboard", "wandb")

# --- fine-tuning --------------------------------------------------------------------------------------

SCHEDULES = ("cosine", "constant")
MIXED = ("fp32", "tf32", "bf16", "fp16")  # precisions of training
STORED = ("float32", "float16")  # types of the weights in the files
