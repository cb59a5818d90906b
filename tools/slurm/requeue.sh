# Requeue the job unless it is done, or its error would repeat:
# bash tools/slurm/requeue.sh STATUS SECONDS, the exit status of its ranks and how long they ran.
LIMIT=${REQUEUE_LIMIT:-20}  # failures in a row
# Failures in a row within 300 seconds: an error in the command rather than a lost machine
QUICK=300 QUICK_LIMIT=3
# Seconds of each failure since the last stop by a signal
failures=.slurm-failures-$SLURM_JOB_ID
case $1 in
# Done, or an error that the user must correct
0 | 2) rm -f "$failures" && exit ;;
# Stopped by a signal: after a checkpoint (75), or by SIGUSR1 or SIGTERM before there was a handler
75 | 138 | 143) rm -f "$failures" ;;
# NCCL's abort (134), killed for lack of memory (137), or any other error (1)
*)
    echo "$2" >>"$failures"
    quick=$(tail -n $QUICK_LIMIT "$failures" | awk -v quick=$QUICK '$1 < quick' | wc -l)
    if [ "$(wc -l <"$failures")" -ge "$LIMIT" ] || [ "$quick" -ge $QUICK_LIMIT ]; then
        echo "status $1 after $2 s: failed too often in a row, not queued again" >&2
        rm -f "$failures" && exit
    fi
    ;;
esac
echo "status $1 after $2 s: queued again" >&2
scontrol requeue "$SLURM_JOB_ID"
