"""Measurements of UNIQUE attention: of kernels, of whole decode steps, and of what is selected."""
