"""All planted bugs."""

from __future__ import annotations

from tests.mutants import in_algorithms, in_benchmarks, in_models_and_data, in_the_loop

BUGS = [*in_algorithms.BUGS, *in_the_loop.BUGS, *in_models_and_data.BUGS, *in_benchmarks.BUGS]
