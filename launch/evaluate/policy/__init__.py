"""`rlhf evaluate policy`: the responses of several policies to the same prompts.

evaluate.py  `evaluate`, for callers in Python, and what the command does
policies.py  where responses come from: model folders, endpoints
endpoint.py  chat completions of an OpenAI-compatible server
rewards.py   what they are worth: reward models and functions by name
judge.py     which of two policies a language model prefers
sampling.py  responses of all policies, kept in windows
tasks.py     benchmarks of lm-eval
reference.py KL to a reference model
metrics.py   report.json from responses and scores
tables.py    the same as tables
plots.py     the same as plots
checkpoints.py  --checkpoints: reward against KL, and over-optimisation, over the evaluations of runs
page.py      report.md and report.html, with some of the responses
"""
