#!/bin/bash
# One job of train.py on several machines:  sbatch odc.sh --data FOLDER --output FOLDER ...
# SLURM sends USR1 two minutes before the time limit. The job then puts itself into the queue again,
# saves and stops; the next start goes on from there. Where the requeue leaves too little time for a
# save (SLURM's KillWait, usually 30 seconds), it goes on from the last checkpoint. On USR1 torchrun
# ends with a SignalException after it has passed the signal on: ignore it.
#SBATCH --nodes=4 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=80 --mem=0 --time=24:00:00
#SBATCH --signal=B:USR1@120 --requeue --open-mode=append
trap 'scontrol requeue $SLURM_JOB_ID' USR1
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
srun torchrun --nnodes=$SLURM_NNODES --nproc_per_node=$SLURM_GPUS_ON_NODE \
    --rdzv-id=$SLURM_JOB_ID --rdzv-backend=c10d \
    --rdzv-endpoint=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1):29500 train.py "$@" &
wait
