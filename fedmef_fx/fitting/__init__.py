"""Fitting: from a pretrained model and data to a file within limits."""

from fedmef_fx.fitting.fit import fit
from fedmef_fx.fitting.report import FitCandidate, FitReport

__all__ = ["FitCandidate", "FitReport", "fit"]
