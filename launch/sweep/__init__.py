"""`rlhf sweep`: runs over a grid of settings and seeds, side by side.

grid.py     the cells of the grid, from the command line
sweep.py    the command: drives the cells, shares stages, ends with the comparison
record.py   the sweep's own run in MLflow, of which the cells are children
"""
