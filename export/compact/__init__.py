"""Channels without effect, taken out."""

from fedmef_fx.export.compact.compact import compact, compact_report

__all__ = ["compact", "compact_report"]
