"""How a served model does: what was said to whom, its scores over time, drift, and alarms by rule.

records.py   what the store knows of responses, scores and alarms    series.py    metrics over time, with intervals
rules.py     rules in YAML, and when an alarm begins and ends        baseline.py  an evaluation to compare with
spans.py     times such as 24h
"""
