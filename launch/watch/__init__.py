"""`rlhf watch`: how a served model does, beside the server or after it.

command.py  the loop     look.py  one look at the store     alarms.py  to log, webhook and MLflow     table.py  the terminal
"""
