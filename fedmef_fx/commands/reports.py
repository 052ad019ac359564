"""What passes did and where weights are rewritten, as tables."""

from typing import Any

from rich.console import Console

from fedmef_fx.commands.tables import show_table
from fedmef_fx.records.passes import PassReport
from fedmef_fx.sparse_model.transformation import Coverage

__all__ = ["coverage_data", "passes_data", "show_coverage", "show_passes"]


def show_passes(console: Console, passes: PassReport) -> None:
    """Print what each pass did, and each refusal with its reason."""
    rows = [(r.name, str(len(r.rewrites)), str(len(r.refusals)), f"{r.seconds * 1e3:.0f} ms") for r in passes]
    show_table(console, ("pass", "rewritten", "refused", "time"), rows, numbers=frozenset({1, 2, 3}))
    refusals = [(r.name.partition("{")[0], refusal.where, refusal.reason) for r in passes for refusal in r.refusals]
    if refusals:
        console.print()
        show_table(console, ("refused by", "where", "why"), refusals)


def passes_data(passes: PassReport) -> list[dict[str, Any]]:
    """The same as JSON values."""
    return [
        {
            "name": result.name,
            "rewrites": list(result.rewrites),
            "refusals": [{"where": refusal.where, "reason": refusal.reason} for refusal in result.refusals],
            "seconds": result.seconds,
        }
        for result in passes
    ]


def show_coverage(console: Console, coverage: Coverage) -> None:
    """Print where each prunable parameter is rewritten, and why not better."""
    rows = [
        (prunable.name, str(prunable.numel), prunable.tier or "dense", prunable.reason) for prunable in coverage.rows
    ]
    show_table(console, ("parameter", "weights", "tier", "reason"), rows, numbers=frozenset({1}))
    console.print(f"graph fraction {coverage.graph_fraction:.3f}")


def coverage_data(coverage: Coverage) -> dict[str, Any]:
    """The same as JSON values."""
    rows = [
        {
            "parameter": prunable.name,
            "weights": prunable.numel,
            "tier": prunable.tier,
            "masked": prunable.masked,
            "reason": prunable.reason,
        }
        for prunable in coverage.rows
    ]
    return {"graph_fraction": coverage.graph_fraction, "parameters": rows}
