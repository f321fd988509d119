"""`rlhf evaluate`: reports on models.

reward.py   the command `rlhf evaluate reward`
inputs.py   which arguments are models, which are data
scorers.py  what gives scores: reward models, the bag of words
scores.py   DIR/scores.jsonl: written a window of items at a time, goes on after a kill
metrics.py  report.json from the scores
tables.py   the same as tables
plots.py    the same as plots
page.py     report.md and report.html
"""
