#!/usr/bin/env bash
# The circle: serve the champion, let people vote, train the next policy on their votes, and let `rlhf promote` decide.
#   examples/circle/circle.sh [RUNFILE] [PAIRS]        docs/how-to/circle.md shows what it prints
set -euo pipefail
here=$(dirname "$0") runfile=${1:-quickstart} pairs=${2:-1000} port=${PORT:-8000}
few=128  # of the 7,500 shipped preferences, so that the first champion leaves something to learn
shipped="{path: shipped, split: train, limit: $few}"
export RLHF_SERVE_TOKEN=${RLHF_SERVE_TOKEN:-$(python -c 'import secrets; print(secrets.token_urlsafe())')}

vote() {  # NAME WRONG: votes on the champion's responses, of which the fraction WRONG is mistaken
    rlhf serve rlhf-policy@champion --store "votes/$1" --port "$port" --rate 0 &
    server=$!
    trap 'kill $server' EXIT
    until curl --silent --fail --output /dev/null "localhost:$port/health"; do sleep 0.5 && kill -0 $server; done
    python "$here/raters.py" --url "http://127.0.0.1:$port" --pairs "$pairs" --wrong "$2" --skip "$few"
    trap - EXIT
    kill $server && wait $server
    rlhf feedback report --store "votes/$1"
    rlhf feedback export --store "votes/$1" --out "votes/$1"
}

next_round() {  # NAME CHAMPION: the champion imitates the chosen responses, new reward models learn from all pairs, then PPO
    votes="{path: votes/$1/preferences.train.jsonl}"
    rlhf run "$runfile" --name "$1" --model.path "runs/$2/ppo/artifact" --sft.optim.lr 5e-4 --ppo.iterations 8 \
        --data.demonstrations.train "[$votes]" --data.preferences.train "[$shipped, $votes]"
    rlhf promote "runs/$1/ppo" --to champion
}

rlhf run "$runfile" --name round-1 --data.preferences.train "[$shipped]" --ppo.iterations 1
rlhf promote runs/round-1/ppo --to champion

vote round-2 0.15
next_round round-2 round-1

vote random 0.5
status=0
next_round random round-2 || status=$?
[ $status = 7 ]  # refused
