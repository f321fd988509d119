"""Bugs in secrets, run files, claims and the environment of workers."""

from __future__ import annotations

from tests.mutants.bug import Bug, bugs_in

BUGS = [
    *bugs_in(
        "rlhf/config/secrets.py",
        ["rlhf/test_secrets.py"],
        Bug("users and passwords of addresses stay", "without_secrets", "CREDENTIALS.sub('', A)", "A"),
        Bug("headers stay", "without_secrets", "BEARER.sub(_, A)", "A"),
        Bug("tokens of known forms stay", "without_secrets", "KNOWN.sub(_, A)", "A"),
        Bug("values of the environment stay", "without_secrets", "A.replace(...)", "A"),
        Bug("keys of mappings stay",
            "without_secrets",
            "{without_secrets(A): B for A, C in D}",
            "{A: B for A, C in D}",
        ),
        Bug("short values are taken for secrets", "_of_environment", "A and B >= _", "A"),
        Bug("the shortest value is taken out first", "_of_environment", "sorted(A, key=B, reverse=True)", "sorted(A, key=B)"),
        Bug("a name is searched anywhere", "names_secret", "VARIABLE.search(A)", "re.search('TOKEN|KEY', A)"),
    ),
    *bugs_in(
        "launch/yaml_tree.py",
        ["launch/test_yaml_tree.py"],
        Bug("a key given twice is no mistake", "parse.mapping", "if A in B: ...", ""),
        Bug("lines are counted from 0", "parse.place", "A + 1", "A"),
        Bug("anchors are not merged", "parse.mapping", "loader.flatten_mapping(...)", ""),
        Bug("aliases are counted once", "_too_much.size", "return sizes[id(node)]", "return 1"),
        Bug("an alias may hold itself", "_too_much.size", "A == 0", "False"),
        Bug("what is below a mapping goes first", "merge", "merge(merged[A], B)", "merge(B, merged[A])"),
        Bug("a list is replaced by a mapping", "put", "isinstance(A, list) and B and C", "False"),
        Bug("a whole entry is dropped", "drop", "[drop(A, B)] if B else []", "[]"),
    ),
    *bugs_in(
        "rlhf/runs/claim.py",
        ["rlhf/runs/test_claim.py"],
        Bug("a second driver gets in", "_take", "if A and (not B): ...", ""),
        Bug("a dead driver of this host stays", "_is_stale", "not is_alive(...)", "False"),
        Bug("a silent driver elsewhere stays", "_is_stale", "A > STALE_S", "False"),
        Bug("the quicker driver's claim is removed", "_remove", "if _ != A: ...", ""),
        Bug("another process with its number is the driver", "is_alive", "abs(_) < 2", "True"),
        Bug("a worker follows any driver", "Follower.lost", "A is not None and B != C", "False"),
        Bug("a silent driver is never gone", "Follower.lost", "if A - B > STALE_S: ...", ""),
        Bug("a claim is left behind", "hold", "A.unlink(missing_ok=True)", "None"),
        Bug("the claim is not touched", "_beat", "os.utime(_)", "None"),
    ),
    *bugs_in(
        "launch/environment.py",
        ["launch/test_environment.py"],
        Bug("secrets go with the job", "carried", "_holds_secret(A, B) == secret", "True"),
        Bug("secrets in addresses go with the job", "_holds_secret", "A or B != C", "A"),
        Bug("short secrets go with the job", "_holds_secret", "A or B != C", "B != C"),
        Bug("a submitted job gets the driver's variables", "carried", "A in os.environ", "False"),
        Bug("half a name is enough", "carried", "CARRIED.fullmatch(A)", "CARRIED.search(A)"),
    ),
]  # fmt: skip
