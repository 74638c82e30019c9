"""How a model was trained, in lines: on what, for how long, and why each phase ended. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from sti_runtime.early_stop import NANO

_PHASES = {"fine_tune": "fine-tuning", "widths": "elastic widths", "depths": "elastic depths"}


def measured(nano: int, measure: str) -> str:
    """A check on held-out rows: "loss 0.312" or "accuracy 87.4 %"."""
    return f"accuracy {100 * nano / NANO:.1f} %" if measure == "accuracy" else f"loss {nano / NANO:.3f}"


def training_lines(provenance: Mapping[str, str | int]) -> list[str]:
    """One line on the rows and the arithmetic, one on each phase; none for a model not trained here."""
    if "fine_tune_ended" not in provenance:
        return []
    rows, of = int(provenance["train_rows"]), int(provenance["train_rows_of"])
    subset = f"a subset: {rows} of {of} train rows" if rows < of else f"all {rows} train rows"
    lines = [
        f"Trained on {subset}, seed {provenance['seed']}, {provenance['precision']} on {provenance['device']}"
        f" (PyTorch {provenance['torch']})."
    ]
    lines += [_phase(key, name, provenance) for key, name in _PHASES.items() if f"{key}_ended" in provenance]
    scored, whole = (int(provenance.get(key, 0)) for key in ("dev_rows", "dev_rows_of"))
    if scored < whole:
        lines.append(f"Submodels were scored on {scored} of {whole} dev rows, drawn by the seed.")
    return lines


def _phase(key: str, name: str, provenance: Mapping[str, str | int]) -> str:
    steps, planned, epochs = (int(provenance[f"{key}_{of}"]) for of in ("steps", "planned", "epoch_steps"))
    through = f"{steps / epochs:.2g}"
    line = f"{name}: {steps} of {planned} steps ({through} {'epoch' if through == '1' else 'epochs'})"
    if provenance[f"{key}_ended"] == "no-gain":
        line += ", ended early for want of a gain"
    if f"{key}_best_nano" in provenance:
        best = measured(int(provenance[f"{key}_best_nano"]), str(provenance[f"{key}_measure"]))
        line += f"; kept are the weights of step {provenance[f'{key}_best_step']}"
        line += f" ({best} on {provenance['profile_rows']} profile rows)"
    if overflows := int(provenance[f"{key}_overflows"]):
        line += f"; {overflows} steps overflowed float16 and were left out"
    return line
