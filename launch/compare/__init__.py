"""`rlhf compare`: what differs between runs, in their settings and in what came out.

compare.py     the command
record.py      a run as the comparison sees it, from its folder or from MLflow
settings.py    which settings and data differ, and which runs differ in nothing but the seed
results.py     report.json: results side by side, and paired differences
tables.py      the same as tables
plots.py       curves and results as plots
"""
