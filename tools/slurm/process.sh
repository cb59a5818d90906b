# Runs a script as one of the processes that srun starts: srun bash tools/slurm/process.sh main_cache.py --flag value
# In torchrun's place: a signal then reaches the processes alone, no launcher kills them 30 seconds later, and srun
# returns their exit status.
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
MASTER_ADDR=$(scontrol show hostnames "$SLURM_STEP_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))  # jobs on the same node use different ports
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
trap '' USR1  # for those that do not listen, or not yet: by default it kills
exec python "$@"
