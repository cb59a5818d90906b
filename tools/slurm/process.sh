# Run a script as one of the ranks that srun starts, without torchrun:
# srun bash tools/slurm/process.sh main_cache.py --flag value
# Signals then reach the ranks directly, no launcher kills them 30 seconds later, and srun returns
# their exit status.
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
MASTER_ADDR=$(scontrol show hostnames "$SLURM_STEP_NODELIST" | head -n 1)
# Jobs on the same node use different ports
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
trap '' USR1  # scripts without a handler ignore the signal, which kills by default
exec python "$@"
