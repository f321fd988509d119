"""`rlhf serve`: models behind HTTP.

command.py  from arguments to a server     server.py   uvicorn, and how it stops    app.py      the routes
gate.py     token, size, rate and stop     errors.py   errors in OpenAI's form      answers.py  pieces to responses
metrics.py  what Prometheus reads          feedback.py `rlhf feedback`
service.py  what the routes share          respond.py   at once, or as a stream   pages.py    the pages, in page/
scoring.py  a reward model and its thread  reload.py    follows aliases of the registry
guard.py    a safety model judges what is said
source.py   where a model comes from       background.py  what is kept is scored
rewards.py  by which models                watching.py  what the dashboard shows
build.py    what one process serves        replicas.py  several processes on Ray, and merged_metrics.py
"""
