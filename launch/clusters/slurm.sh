#!/usr/bin/env bash
# Ray over the nodes of one Slurm job, and one `rlhf` command on it. From the project's folder, which all nodes share:
#   sbatch launch/clusters/slurm.sh run llama2-chat --data.root FOLDER
# MLflow is the server that MLFLOW_TRACKING_URI or --tracking.uri names; without one only files are written.
# The job ends with the exit code of `rlhf`. Submitted again, the run goes on from its last checkpoint.
#SBATCH --job-name=rlhf
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --output=rlhf-%j.log
set -euo pipefail

bin=$PWD/.venv/bin
log=$PWD/runs/ray-$SLURM_JOB_ID
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]} others=$((${#nodes[@]} - 1)) port=$((20000 + SLURM_JOB_ID % 10000))

# Head, workers and driver share a token: without one, whoever reaches the port could run code here.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$log.token
mkdir -p runs
(umask 077 && "$bin/python" -c 'import secrets; print(secrets.token_hex(32))' >"$RAY_AUTH_TOKEN_PATH")
trap 'rm -f "$RAY_AUTH_TOKEN_PATH"; jobs -p | xargs -r kill' EXIT

# `ray start` on each node, until the job ends. Not `ray symmetric-run`: its exit code is not that of the command.
step=(srun --export=ALL --overlap --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_PER_TASK")
ray=("$bin/ray" start --block --disable-usage-stats --num-cpus="$SLURM_CPUS_PER_TASK")
"${step[@]}" --nodes=1 --ntasks=1 --nodelist="$head" "${ray[@]}" --head --port="$port" >"$log-head.log" 2>&1 &
if ((others > 0)); then
    "${step[@]}" --nodes="$others" --ntasks="$others" --exclude="$head" "${ray[@]}" --address="$head:$port" \
        >"$log-workers.log" 2>&1 &
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

# SQLite, the default, is not reliable on storage that machines share.
tracking=(--tracking.uri "${MLFLOW_TRACKING_URI:-null}")
[[ " $*" != *" --tracking.uri"* ]] || tracking=()
"$bin/rlhf" "$@" "${tracking[@]}" --hardware.ray_address "$head:$port"
