"""Roofline of the machine and of a model; memory of a worker."""
