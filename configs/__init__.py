"""Settings as YAML: a run names one model, one hardware and some stage layers, and overrides what it likes."""
