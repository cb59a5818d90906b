# Queues the job again unless it is done, or its error would come again: bash tools/slurm/requeue.sh STATUS SECONDS
# with the exit status of its processes and for how long they ran.
LIMIT=${REQUEUE_LIMIT:-20}  # failures in a row
QUICK=300 QUICK_LIMIT=3     # failures in a row within so many seconds: a mistake rather than a lost machine
failures=.slurm-failures-$SLURM_JOB_ID  # a line for each failure since the job was stopped by a signal, with its seconds
case $1 in
0 | 2) rm -f "$failures" && exit ;;      # done; something for you to correct
75 | 138 | 143) rm -f "$failures" ;;     # stopped by a signal, and saved; by SIGUSR1 or SIGTERM, before it listened
*)                                       # 134: NCCL's abort, 137: killed for memory, 1: whatever else
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
