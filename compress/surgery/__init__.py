"""Cutting a model: widths, depth and norms."""
