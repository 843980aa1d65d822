#!/bin/bash
# Trains on several nodes under Slurm. In a checkout on a file system that all nodes share, after `make setup`:
#   sbatch configs/launch/slurm.sh                                    the 1.3B config on 2 nodes of 8 GPUs
#   sbatch --nodes=4 configs/launch/slurm.sh CONFIG [section.key=value ...]
# Options given to sbatch win over those below: --partition, --account, --gpus-per-node=4, --time ...
# When its time is nearly over the run writes a checkpoint and queues itself again; docs/clusters.md has the rest.
#
#SBATCH --job-name=zoetrope
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
#
# ntasks-per-node: one launcher a node, which starts a process per GPU. mem=0: all memory of the node.
# signal: 300 seconds before the time is over (and at a preemption, where the cluster has
# PreemptParameters=send_user_signal) this script is told; the 1.3B's checkpoint is 23 GB. open-mode: a requeued
# job goes on writing into the same log.

set -uo pipefail

[ $# -gt 0 ] || set -- configs/presets/1.3b.yaml train.grad_accum=4 # x 16 processes = a batch of 64
PYTHON=${PYTHON:-.venv/bin/python}

fail() {
    echo "slurm.sh: error: $*" >&2
    exit 2
}

cd "${SLURM_SUBMIT_DIR:?is not set; start this with sbatch}" || exit 2
[ -f train/launch.py ] || fail "$PWD is no checkout of zoetrope; run sbatch in one"
[ -f "$1" ] || fail "there is no config $1 in $PWD"
command -v "$PYTHON" >/dev/null || fail "there is no $PYTHON; run make setup, or sbatch with PYTHON=..."

gpus=${SLURM_GPUS_ON_NODE:-0}
processes=$((gpus > 0 ? gpus : 1))
# What is set already stays: a site knows its network best. wandb needs nothing: it is online where there is a
# key (WANDB_API_KEY or ~/.netrc), offline otherwise, and a requeued job goes on in the same wandb run.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN} # by default NCCL does not say why it failed
threads=$((SLURM_CPUS_ON_NODE / processes)) # torchrun would make it 1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}

address() { # of a node, as Slurm itself reaches it
    scontrol show node --oneliner "$1" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p'
}

# What each node runs; srun is given its text, which shellcheck does not see.
# shellcheck disable=SC2317
node() {
    local seen peer route interface own
    if [ "$gpus" -gt 0 ]; then
        seen=$(nvidia-smi --list-gpus | wc -l)
        if [ "$seen" -lt "$gpus" ]; then
            echo "slurm.sh: error: $SLURMD_NODENAME sees $seen GPUs of $gpus; have it drained" >&2
            exit 1
        fi
    fi
    # The network between the nodes: the way from here to another one.
    peer=$first
    [ "$SLURM_NODEID" -ne 0 ] || peer=$last
    route=$(ip -4 -oneline route get "$(getent ahostsv4 "$peer" | awk 'NR == 1 { print $1 }')")
    own=$(sed -n 's/.* src \([^ ]*\).*/\1/p' <<<"$route")
    interface=$(sed -n 's/.* dev \([^ ]*\).*/\1/p' <<<"$route")
    # Gloo, which carries what is on the CPU, takes the interface of the host's own name, and that is
    # often the loopback. NCCL leaves the loopback out by itself.
    [ -z "$interface" ] || export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface}
    # is_host: by itself torchrun compares host names, which need not be those that Slurm uses.
    exec "$PYTHON" -m train.launch \
        --nnodes="$SLURM_NNODES" --nproc-per-node="$processes" --rdzv-backend=c10d \
        --rdzv-endpoint="$first:$((20000 + SLURM_JOB_ID % 10000))" \
        --rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" \
        --rdzv-conf="is_host=$((SLURM_NODEID == 0))" --local-addr="${own:-$SLURMD_NODENAME}" \
        -m train "$@"
}

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
first=$(address "${nodes[0]}") last=$(address "${nodes[-1]}")
export PYTHON gpus processes first last
echo "slurm.sh: $(date -Is) start ${SLURM_RESTART_COUNT:-0} on ${nodes[*]}: $*"

# Signals interrupt `wait`, so it is asked again until srun itself has ended. USR1 is passed on to all
# processes of the step; TERM comes with one of Slurm's own to them.
told=''
trap 'told=1 interrupted=1; scancel --signal=USR1 "$SLURM_JOB_ID"' USR1
trap 'interrupted=1' TERM
# wait: once a node has ended, the others have a minute to write their part, and are not left hanging.
srun --export=ALL --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" --kill-on-bad-exit=0 --wait=60 \
    bash -c "$(declare -f node); node \"\$@\"" node "$@" &
step=$!
while
    interrupted=''
    wait "$step"
    code=$?
    [ -n "$interrupted" ]
do :; done

requeue() {
    # A cancelled job is completing by now, and must not come back.
    [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ] || exit "$code"
    echo "slurm.sh: $(date -Is) $1; queued again"
    scontrol requeue "$SLURM_JOB_ID" && sleep 60 # until Slurm ends this
    exit "$code"
}

case $code in
0 | 2 | 130) exit "$code" ;; # done; a mistake, which stays one; Ctrl-C
75) requeue "stopped" ;;
esac
[ -z "$told" ] || requeue "stopped while it was starting ($code)"

# Anything else is a crash: of a node, of a GPU, or of the program. Starting again mends the first two, so
# it is done as long as the run gets on: the third crash without a new checkpoint is the last.
read_out='import sys, yaml
overrides = dict(each.split("=", 1) for each in sys.argv[2:] if "=" in each)
print(overrides.get("out") or yaml.safe_load(open(sys.argv[1]))["out"])'
out=$("$PYTHON" -c "$read_out" "$@") || exit "$code"
newest=none
for folder in "$out"/checkpoints/step-*; do
    [ ! -d "$folder" ] || newest=${folder##*/}
done
mkdir -p "$out" && echo "$newest" >>"$out/slurm-crashes.txt"
crashes=$(grep -cxF -- "$newest" "$out/slurm-crashes.txt")
[ "$crashes" -ge 3 ] || requeue "crashed ($code) after checkpoint $newest, $crashes of 3 times"
echo "slurm.sh: error: crashed ($code) 3 times after checkpoint $newest; the job ends" >&2
exit "$code"
