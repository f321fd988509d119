"""Bugs in what is decided before and around a run: launch/doctor, launch/elastic, launch/supervision, launch/drive.py, launch/sweep."""

from __future__ import annotations

from tests.mutants.bug import Bug, bugs_in

TESTS = ["launch/test_doctor.py"]
SWEEP = ["launch/test_sweep.py"]
DECISIONS, GROUP = ["launch/test_supervision.py"], ["launch/test_restarts.py"]

BUGS = [
    *bugs_in(
        "launch/sampler_pool.py",
        ["launch/test_sampler_pool.py"],
        Bug("weights in another order have the same checksum", "Checksum.of", "self.value * 1000003", "self.value"),
        Bug("a last odd byte is in no checksum", "Checksum.of", "int(words.sum(...))", "0"),
    ),
    *bugs_in(
        "launch/doctor/nodes.py",
        TESTS,
        Bug("a clock is judged by what may be the call's delay", "clocks", "abs(A) - B > SMALL_SKEW_S", "abs(A) > SMALL_SKEW_S"),
        Bug("a clock that is behind is right", "clocks", "abs(A) - B > SMALL_SKEW_S", "A - B > SMALL_SKEW_S"),
        Bug("most nodes lack the model, so it is not missing", "odd_ones", "A in B or not C", "True"),
        Bug("a full disk is none", "disks", "A.disk_bytes < B", "A.disk_bytes < 0"),
    ),
    *bugs_in(
        "launch/doctor/room.py",
        TESTS,
        Bug("a worker may lie on two nodes", "places", "int(A)", "A"),
        Bug("the resource of which there is most decides", "places", "min(A)", "max(A)"),
    ),
    *bugs_in(
        "launch/doctor/network.py",
        TESTS,
        Bug("a pair meets in every round", "rounds", "[A[0], A[-1], *A[1:-1]]", "A"),
        Bug("a slow pair is good", "is_slow", "A > SLOW_ROUND_S or B", "A > SLOW_ROUND_S and B"),
    ),
    *bugs_in(
        "launch/doctor/storage.py",
        TESTS,
        Bug("an old text is the new one", "read", "A in B and C == D", "A in B"),
    ),
    *bugs_in(
        "launch/elastic.py",
        ["launch/test_elastic.py"],
        Bug("as few workers as may be go on", "sized", "range(A, B - 1, -1)", "range(B, A + 1)"),
        Bug("micro-batches stay too large for fewer workers", "with_workers", "A.with_fitting_micro_batches()", "A"),
        Bug("others' room counts", "can_grow", "min(A, B)", "A"),
        Bug("room that was just taken counts", "can_grow", "min(A, B)", "B"),
        Bug("a group grows to what it is", "can_grow", "A > B", "A >= B"),
    ),
    *bugs_in(
        "launch/supervision.py",
        DECISIONS,
        Bug("no checkpoint refills the budget", "Budget.allows", "A > self._reached", "False"),
        Bug("every death refills the budget", "Budget.allows", "A > self._reached", "True"),
        Bug("one restart too many", "Budget.allows", "self.used == self._restarts", "self.used > self._restarts"),
        Bug("a mistake of the user is tried again", "cause", "A.exit_code != UNEXPECTED", "False"),
        Bug("the echo is the cause", "cause", "A or B or C", "B or A or C"),
        Bug("a death that only a peer saw is none", "_accident", "_dead_peers(A) or B", "B"),
        Bug("want of memory is a kill", "_accident", "any(...)", "False"),
        Bug("a crash of an earlier attempt counts", "_tail", "A.rpartition(ATTEMPT_MARK)[2]", "A"),
        Bug("a rank is silent for ever", "Watch.look", "A or B not in C or (D != E and F)", "A or B not in C"),
        Bug("ranks are silent while the storage is", "Watch.look", "A or B not in C or D", "B not in C or D"),
        Bug("a rank on a node that is cut off is heard", "Watch.look", "D != E and F", "D != E"),
        Bug("a rank that has ended is silent", "Watch.silent", "A and B not in self._ended", "A"),
        Bug("the download counts as the start", "Watch.overdue", "self._placing is not None and A - self._placing > B", "A - self._begun > B"),
        Bug("a damaged checkpoint is the newest", "newest_checkpoint", "not A.startswith(...)", "True"),
    ),
    *bugs_in(
        "launch/worker_group.py",
        GROUP,
        Bug("a mistake starts the group again", "WorkerGroup._has_ended", "not A.can_restart or B or C", "B or C"),
        Bug("a silent rank goes on", "WorkerGroup._give_up", "os.kill(...)", "None"),
        Bug("what Ray does not see is waited for", "WorkerGroup._end_for_good", "ray.cancel(...)", "None"),
        Bug("a node that is cut off gets time to be back", "WorkerGroup._give_up", "now if A else now + ENDS_S", "now + ENDS_S"),
        Bug("ranks get no time to be back", "WorkerGroup._give_up", "now if A else now + ENDS_S", "now"),
        Bug("the room of a killed attempt stays taken", "WorkerGroup.done", "attempt.free_places()", "None"),
        Bug("a death of which Ray says nothing has no name", "WorkerGroup._has_ended", "self._watch.gone", "()"),
        Bug("ranks that are back are ended", "WorkerGroup.done", "self._given_up and A", "self._given_up"),
        Bug("a group grows before it has begun", "WorkerGroup.done", "A > self._looks and not B", "A > self._looks"),
        Bug("a group never grows", "WorkerGroup._grow", "stopping.ask(...)", "None"),
        Bug("a group that stops to grow has failed", "WorkerGroup._has_ended", "stopped_to_grow(A)", "False"),
        Bug("growth waits for all workers", "WorkerGroup._grown", "self._limit_s", "0.0"),
        Bug("growth forgets a stop", "WorkerGroup._grown", "if _: ...", ""),
        Bug("a lost node is not the cause of a lack of room", "WorkerGroup._has_ended", "_after(A, B)", "B"),
        Bug("fewer workers go on at once", "WorkerGroup._with_room", "A - self._due < self._limit_s", "False"),
    ),
    *bugs_in(
        "launch/network.py",
        ["launch/test_network.py"],
        Bug("a refusal is silence", "_answers", "suppress(...)", "suppress()"),
        Bug("a node stays cut off after the run", "watched", "_note(...)", "None"),
        Bug("nodes are tried after the run", "watched", "ended.set()", "None"),
    ),
    *bugs_in(
        "launch/worker_group.py",
        ["launch/test_network.py"],
        Bug("what lies on unreachable nodes is room", "cluster_resources", "A - B", "A"),
    ),
    *bugs_in(
        "launch/drive.py",
        SWEEP,
        Bug("a stage starts before its inputs are there", "DrivenRun.ready", "A & {*B}", "False"),
        Bug("a stage that is being made is made again", "Driver._begin", "own in {A.recipe for A in B}", "False"),
        Bug("a shared stage that has failed is tried again", "Driver._begin", "isinstance(A, UserError)", "False"),
        Bug("stages start without room", "Driver._begin", "not self._fits(...)", "False"),
    ),
    *bugs_in(
        "launch/stage_folder.py",
        SWEEP,
        Bug("a recipe knows nothing of the stages before it", "recipe", "[A, B, C, D]", "[A, B, C]"),
        Bug("a recipe knows nothing of the settings", "recipe", "[A, B, C, D]", "[A, C, D]"),
        Bug("records are shared as links", "share", "shutil.copy2(A, B)", "B.hardlink_to(A)"),
    ),
    *bugs_in(
        "launch/sweep/grid.py",
        SWEEP,
        Bug("all cells have the first seed", "plan", "first.seed + number", "first.seed"),
        Bug("a cell has the settings of the first", "plan", "_chosen(combination)", "[]"),
        Bug("cells may have stores of their own", "_check", "A in OF_THE_SWEEP", "False"),
    ),
    *bugs_in(
        "launch/sweep/sweep.py",
        SWEEP,
        Bug("a failed cell is compared", "_end", "[A for A in cells if not A.failure]", "[*cells]"),
        Bug("a sweep with a failed cell ends well", "_end", "if failed: ...", ""),
        Bug("a finished cell is reported again", "_drive", "cell.was_finished", "False"),
    ),
]  # fmt: skip
