"""Figures as PNG. Only these modules load Matplotlib, which the extra ``figures`` brings."""
