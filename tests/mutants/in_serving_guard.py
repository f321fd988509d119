"""Bugs in the guard of served models, and in how one model takes the place of another."""

from __future__ import annotations

from tests.mutants.bug import Bug, bugs_in

RELOAD = [
    "launch/serve/test_reload.py::test_a_response_ends_on_the_model_that_began_it_and_the_next_has_the_new_one",
    "launch/serve/test_reload.py::test_a_model_that_samples_nothing_does_not_take_the_place",
    "launch/serve/test_reload.py::test_the_model_follows_its_alias_and_stays_where_there_is_nothing_to_load",
]

BUGS = [
    *bugs_in(
        "launch/serve/guard.py",
        ["launch/serve/test_guard.py"],
        Bug("what cannot be judged is safe", "Guard.judge", "Verdict(True, None)", "Verdict(False, None)"),
        Bug("what is safe is flagged", "Guard.judge", "bool(A)", "not A"),
        Bug("unsafe text is streamed before it is refused", "Guard.holds", "A != B", "A == 'regenerate'"),
        Bug("an unsafe prompt is sampled", "GuardedFlow.__init__", "A and all(...)", "False"),
        Bug("one unsafe prompt refuses all", "GuardedFlow.__init__", "A and all(...)", "A and inputs[-1].flagged"),
        Bug("tries are alike", "GuardedFlow._again", "row_key(A, ...)", "A"),
        Bug("there is one try more", "GuardedFlow._may_try", "tries < MOST_TRIES", "tries <= MOST_TRIES"),
        Bug("the likeliest response is sampled again", "GuardedFlow._may_try", "A and B > 0", "A"),
    ),
    *bugs_in(
        "launch/serve/service.py",
        RELOAD,
        Bug("a model that samples nothing takes the place", "Service.replace", "model.check()", "pass"),
    ),
    *bugs_in(
        "launch/serve/reload.py",
        RELOAD,
        Bug("a version that failed is tried all the time", "Reloader.look", "A != B or C > RETRY_S", "True"),
        Bug("a version that failed is never tried again", "Reloader.look", "A != B or C > RETRY_S", "A != B"),
    ),
    *bugs_in(
        "rlhf/serving/flow.py",
        RELOAD,
        Bug("a response keeps its model when it is over", "Flow.__aexit__", "self._rows = []", "pass"),
    ),
]
