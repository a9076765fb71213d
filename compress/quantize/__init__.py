"""Fewer bits per weight: block formats, the search for their scales, and GPTQ."""
