"""The names that libraries give an average, its student and its number of updates in their files."""

import re
from enum import IntEnum
from typing import Any, NamedTuple

from torch import Tensor


class Rank(IntEnum):
    """What a part of a checkpoint is. The lowest rank in a file is loaded."""

    AVERAGE = 0
    PLAIN = 1
    STUDENT = 2


class _CountedLayout(NamedTuple):
    """How a library stores an average together with its number of updates."""

    prefix: str  # precedes the tensor names of the averaged network
    step_key: str  # the key of the number of updates, at the same nesting level as the prefix
    library: str  # reported as Recognised.layout


EMA_PYTORCH = "ema-pytorch"
_COUNTED_LAYOUTS = [
    _CountedLayout("ema_model.", "step", EMA_PYTORCH),
    _CountedLayout("state_dict.", "averaging_state.n_averaged", "Lightning's WeightAveraging"),
    _CountedLayout("module.", "n_averaged", "torch's AveragedModel"),
    _CountedLayout("module.", "_extra_state", "EMANTeacher"),
    _CountedLayout("ema.", "updates", "YOLO"),
    _CountedLayout("module.", "updates", "RT-DETR"),
    _CountedLayout("model_ema.", "model_ema.num_updates", "latent-diffusion"),
    # mmengine's EMAHook swaps the two networks before it saves: state_dict is the average.
    _CountedLayout("state_dict.", "ema_state_dict.steps", "mmengine"),
    # Lists of tensors without names.
    _CountedLayout("shadow_params.", "optimization_step", "diffusers"),
    _CountedLayout("shadow_params.", "num_updates", "torch_ema"),
    _CountedLayout("ema_weights.", "cur_step", "NeMo"),
]
_MMENGINE_STUDENT = _CountedLayout("ema_state_dict.", "ema_state_dict.steps", "mmengine's student")

# Keys of an average -> the library that uses the key. Other keys are recognized by their words: see names_average.
_AVERAGE_KEYS = {
    "state_dict_ema": "timm",
    "model_ema": "timm or latent-diffusion",
    "ema_model": EMA_PYTORCH,
    "encoder_k": "EMAN's MoCo",
    "target_net": "EMAN's BYOL",
    "ema": "EMAN's FixMatch",
    "teacher": "a teacher",
    "ema_state_dict": "FixMatch-pytorch or mean-teacher",
    "target_encoder": "I-JEPA",
    "target_network": "BYOL",
    "momentum_encoder": "MoCo v3",
    "params_ema": "BasicSR",
    "emas": "EDM2",
    "ema_state": "detectron2",
    "_ema": "fairseq's data2vec",
    "G_ema": "StyleGAN",
    "critic_target": "stable-baselines3",
    "actor_target": "stable-baselines3",
    "q_net_target": "stable-baselines3",
    "shadow_params": "torch_ema",
    "ema_weights": "NeMo",
}
_AVERAGE_WORDS = {
    "average", "averaged", "averages", "averaging", "avg", "ema", "emas", "ewma", "momentum", "polyak", "shadow",
    "shadows", "swa", "target", "teacher",
}  # fmt: skip
# Optimizers' own averages, in files that store them by the names of the parameters.
OPTIMIZER_KEYS = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "square_avg", "grad_avg", "momentum_buffer"}

_STUDENT_KEYS = {"current_model_state", "encoder_q", "base_encoder", "online_net", "main", "collected_params"}
_STUDENT_WORDS = {"student", "online"}


def names_average(key: str) -> bool:
    """Whether an average is stored under such a key."""
    return key in _AVERAGE_KEYS or (key not in OPTIMIZER_KEYS and bool(_words(key) & _AVERAGE_WORDS))


def identify(prefix: str, leaves: dict[str, Any]) -> tuple[Rank, str, int | None]:
    """What is stored under the prefix: its rank, its layout and its number of updates, None if unknown."""
    keys = prefix.split(".")[:-1]
    parents = ["".join(f"{key}." for key in keys[:i]) for i in range(len(keys) + 1)]
    for parent in reversed(parents):
        if _stored_at(parent, prefix, leaves, _MMENGINE_STUDENT):
            return Rank.STUDENT, _MMENGINE_STUDENT.library, None
        for layout in _COUNTED_LAYOUTS:
            if _stored_at(parent, prefix, leaves, layout):
                return Rank.AVERAGE, layout.library, _read_step(leaves[parent + layout.step_key])
    for key in reversed(keys):
        if names_average(key):
            return Rank.AVERAGE, _AVERAGE_KEYS.get(key, "an average"), None
        if key in _STUDENT_KEYS or _words(key) & _STUDENT_WORDS:
            return Rank.STUDENT, "a student", None
    return Rank.PLAIN, "a plain network", None


def find_counted_prefix(leaves: dict[str, Any]) -> tuple[str, str | None]:
    """What precedes the names of an average that is stored with its number of updates, and the library; ("", None) if
    the checkpoint is none of these."""
    for layout in _COUNTED_LAYOUTS:
        if layout.step_key in leaves and any(name.startswith(layout.prefix) for name in leaves):
            return layout.prefix, layout.library
    return "", None


def _stored_at(parent: str, prefix: str, leaves: dict[str, Any], layout: _CountedLayout) -> bool:
    return prefix[len(parent) :].startswith(layout.prefix) and parent + layout.step_key in leaves


def _read_step(value: Any) -> int | None:
    """None if the library has not counted: torch_ema then stores None, latent-diffusion -1."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    return int(value) if isinstance(value, int | float) and value >= 0 else None


def _words(key: str) -> set[str]:
    """The words of a key in snake case or camel case, in lower case."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", key)}
