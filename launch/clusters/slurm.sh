#!/usr/bin/env bash
# Ray over the nodes of one Slurm job, and one `rlhf` command on it. From the project's folder, which all nodes share:
#   sbatch launch/clusters/slurm.sh run llama2-chat --data.root FOLDER
#   bash launch/clusters/slurm.sh --dry-run run llama2-chat --data.root FOLDER   # prints what the job would do
# MLflow is the server that MLFLOW_TRACKING_URI or --tracking.uri names; without one only files are written. Secrets
# (HF_TOKEN, MLFLOW_TRACKING_PASSWORD) come from the environment of `sbatch`.
# The job ends with the exit code of `rlhf`. Before its time limit the run stops with a checkpoint, and the job goes back
# into the queue and on from there; so it does after the failure of a node.
#SBATCH --job-name=rlhf
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --signal=B:USR1@900
#SBATCH --open-mode=append
#SBATCH --output=rlhf-%j.log
set -euo pipefail

dry=
if [[ ${1:-} == --dry-run ]]; then
    dry=yes
    shift
    : "${SLURM_JOB_ID:=0}" "${SLURM_CPUS_PER_TASK:=32}"
fi
bin=$PWD/.venv/bin
log=$PWD/runs/ray-$SLURM_JOB_ID
if [[ $dry && -z ${SLURM_JOB_NODELIST:-} ]]; then
    nodes=(NODE1 NODE2)
else
    mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
fi
head=${nodes[0]} others=$((${#nodes[@]} - 1)) port=$((20000 + SLURM_JOB_ID % 10000))

# `ray start` on each node, until the job ends. Not `ray symmetric-run`: its exit code is not that of the command.
step=(srun --export=ALL --overlap --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_PER_TASK")
# Ray gives itself 30 s, too few on a busy machine or where its files come over a slow network: so several tries.
tries='for _ in 1 2 3; do "$@" && exit; done; exit 1'
ray=(bash -c "$tries" tries "$bin/ray" start --block --disable-usage-stats --num-cpus="$SLURM_CPUS_PER_TASK")
start_head=("${step[@]}" --nodes=1 --ntasks=1 --nodelist="$head" "${ray[@]}" --head --port="$port"
    --include-dashboard=false)
start_others=("${step[@]}" --nodes="$others" --ntasks="$others" --exclude="$head" "${ray[@]}" --address="$head:$port")
# SQLite, the default, is not reliable on storage that machines share.
tracking=(--tracking.uri "${MLFLOW_TRACKING_URI:-null}")
[[ " $*" != *" --tracking.uri"* ]] || tracking=()
drive=("$bin/rlhf" "$@" "${tracking[@]}" --hardware.ray_address "$head:$port")

if [[ $dry ]]; then
    sed -n 's/^#SBATCH/sbatch/p' "$0"
    echo "RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$log.token"
    printf '%q ' "${start_head[@]}" && echo "&"
    if ((others > 0)); then printf '%q ' "${start_others[@]}" && echo "&"; fi
    printf '%q ' "${drive[@]}" && echo
    echo "scontrol requeue JOB   # if the time limit has stopped it"
    exit
fi

# Head, workers and driver share a token: without one, whoever reaches the port could run code here.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$log.token
mkdir -p runs
(umask 077 && "$bin/python" -c 'import secrets; print(secrets.token_hex(32))' >"$RAY_AUTH_TOKEN_PATH")
trap 'rm -f "$RAY_AUTH_TOKEN_PATH"; jobs -p | xargs -r kill' EXIT

driver='' limit='' interrupted=0
# shellcheck disable=SC2329  # the traps call it
stop() { # SIGTERM lets `rlhf` end after its step, with a checkpoint
    interrupted=1
    [[ -z $driver ]] || kill -TERM "$driver" || true
}
trap 'limit=near; stop' USR1
trap stop TERM

"${start_head[@]}" >"$log-head.log" 2>&1 &
if ((others > 0)); then
    "${start_others[@]}" >"$log-workers.log" 2>&1 &
fi

"$bin/python" - "$head:$port" "${#nodes[@]}" <<'PYTHON'
import sys
import time

import ray

address, wanted, deadline = sys.argv[1], int(sys.argv[2]), time.monotonic() + 600


def joined() -> int:
    try:
        ray.init(address=address, ignore_reinit_error=True, log_to_driver=False, logging_level="ERROR")
    except ConnectionError:  # the head is still starting
        return 0
    return sum(node["Alive"] for node in ray.nodes())


while (count := joined()) < wanted:
    if time.monotonic() > deadline:
        sys.exit(f"{count} of {wanted} nodes joined the Ray cluster in 600 s; runs/ray-*.log say why")
    time.sleep(2)
PYTHON

((!interrupted)) || exit 143 # asked to stop before it began
"${drive[@]}" &
driver=$!
while true; do # a signal ends `wait` before the driver has ended
    interrupted=0 code=0
    wait "$driver" || code=$?
    ((interrupted)) || break
done
if [[ $limit && $code == 143 ]]; then
    echo "stopped before the time limit, with a checkpoint: back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
