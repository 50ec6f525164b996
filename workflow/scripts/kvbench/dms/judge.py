"""How near a retrofit is to its original on texts that it was not trained on."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from kvbench.dms.student import Net, Student


@dataclass(frozen=True)
class Verdict:
    """A retrofit on one corpus.

    Attributes
    ----------
    kl : KL(original ‖ retrofit) in nats, mean over the continuation's tokens, with what is evicted gone for good.
    kl_off : the same with nothing evicted: what the change of the weights alone costs.
    top1_agreement : share of those tokens at which both rank the same token first, with evictions.
    kept_fraction : share of the prefix's tokens that a cache keeps, over layers, heads and rows, window included.
    """

    kl: float
    kl_off: float
    top1_agreement: float
    kept_fraction: float


def precision(device: torch.device) -> Any:
    """Mixed precision where it pays: matrix products in bfloat16 on a GPU, all in the weights' own dtype on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def divergence(original: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(original ‖ other) in nats from logits [tokens, vocabulary], float32 [tokens]."""
    target, found = original.float().log_softmax(-1), other.float().log_softmax(-1)
    return functional.kl_div(found, target, reduction="none", log_target=True).sum(-1)


@torch.no_grad()
def judge(student: Student, ids: torch.Tensor, prefix: int, rows: int) -> Verdict:
    """Judge a retrofit on sequences, each a prefix and a continuation.

    Parameters
    ----------
    ids : int64 [sequences, tokens], on the model's device.
    prefix : tokens after which the continuation begins.
    rows : sequences at once.
    """
    totals = torch.zeros(4, dtype=torch.float64)
    for some in ids.split(rows):
        with precision(ids.device):
            taught, off = student.teach(some), student.ignore(some)
            evicting, kept = student.obey(some, prefix)
        teacher = _logits(student.original, taught[:, prefix:])
        evicting = _logits(student.net, evicting[:, prefix:])
        off = _logits(student.net, off[:, prefix:])
        found = (
            _mean(divergence(teacher, evicting)),
            _mean(divergence(teacher, off)),
            _mean((teacher.argmax(-1) == evicting.argmax(-1)).double()),
            kept,
        )
        totals += torch.tensor(found, dtype=torch.float64) * len(some)
    return Verdict(*(totals / len(ids)).tolist())


def _logits(net: Net, hidden: torch.Tensor) -> torch.Tensor:
    """In the weights' own dtype: rounded to bfloat16, logits alone would be a thousandth of a nat apart."""
    return net.head(hidden.to(net.head.weight.dtype))


def _mean(values: torch.Tensor) -> float:
    return float(values.double().mean())
