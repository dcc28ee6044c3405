"""A model of pairs beside the baselines, in its report."""

from __future__ import annotations

from collections.abc import Mapping

from megaprot.finetune.metrics import Weighted, with_intervals
from megaprot.finetune.report import Section, plain_metrics

_SHOWN = ("aupr", "auroc", "mcc", "f1", "accuracy")
_WHAT = (
    "degree: how often the proteins occur in the training split, no sequence. kmer: logistic regression on 3-mers of a "
    "reduced alphabet, fitted on the same training pairs."
)
_INTERVALS = (
    "Gain: the model's AUPR minus the baseline's, over the same bootstrap samples. Pairs that share a protein are not "
    "independent, which intervals over pairs do not know: true ones are wider."
)


def baseline_section(
    model: Mapping[str, Weighted], baselines: Mapping[str, Mapping[str, Weighted]], num_pairs: int
) -> Section:
    """Return the report's part on baselines; one that the model does not clearly beat is named.

    Args:
        model: Metrics of the model.
        baselines: Metrics of each baseline.
        num_pairs: Pairs of the split.
    """
    flat = {f"{name}/{metric}": one for name, of in baselines.items() for metric, one in of.items()}
    flat |= {f"model/{metric}": model[metric] for metric in _SHOWN}
    flat |= {f"{name}/aupr_gain": _difference(model["aupr"], of["aupr"]) for name, of in baselines.items()}
    found = with_intervals(flat, num_pairs)
    rows = [("model", *(f"{found[f'model/{metric}'].value:.4f}" for metric in _SHOWN), "")]
    notes = [_WHAT, _INTERVALS] if baselines else ["No baseline is known: the model does not say what it learned from."]
    for name in baselines:
        gain = found[f"{name}/aupr_gain"]
        shown = (f"{found[f'{name}/{metric}'].value:.4f}" for metric in _SHOWN)
        rows.append((name, *shown, f"{gain.value:+.4f} ({gain.low:+.4f} to {gain.high:+.4f})"))
        if not gain.low > 0:
            notes.append(f"The model does not clearly beat the baseline {name}.")
    numbers = {
        name: plain_metrics({metric: found[f"{name}/{metric}"] for metric in (*of, "aupr_gain")})
        for name, of in baselines.items()
    }
    header = ("scores of", *_SHOWN, "the model's gain in aupr (95 % interval)")
    return Section("baselines", "Beside baselines", header, rows, notes, numbers)


def _difference(first: Weighted, second: Weighted) -> Weighted:
    return lambda weights: first(weights) - second(weights)
