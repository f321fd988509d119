"""A model as a service: requests become rows that are sampled together, and pieces of text as they are made.

rows.py      one response that is being sampled     sampling.py  the next token of each row
batch.py     the rows in the KV cache               engine.py    the thread that adds, steps and removes rows
model.py     a model with its tokenizer and engine  protocol.py  the requests and responses of OpenAI's interface
vllm_batch.py  the rows, where vLLM samples

Nothing here starts a process or listens on a network: that is launch/serve/.
"""
