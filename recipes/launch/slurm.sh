#!/bin/bash
# sbatch recipes/launch/slurm.sh recipe.yaml /shared/runs/mine
# The same command again goes on where the last one stopped.
#SBATCH --job-name=opticnerve
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1            # one launcher a machine; it starts a process for each GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@300              # five minutes before the end: save and leave
#SBATCH --output=%x-%j.log
set -euo pipefail

recipe=$1
out=$2
config=${OPTICNERVE_LAUNCH:-recipes/launch/multi-node.yaml}
gpus=${SLURM_GPUS_ON_NODE:-8}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
resume=()
if [ -n "$(ls -A "$out" 2>/dev/null)" ]; then resume=(--resume); fi

# $SLURM_NODEID is each machine's own number, so the inner shell puts it in.
srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"' launch \
  --config_file "$config" --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * gpus))" \
  --main_process_ip "$first" --main_process_port "$((20000 + SLURM_JOB_ID % 20000))" \
  -m opticnerve_launch train "$recipe" --out "$out" ${resume[@]+"${resume[@]}"}
