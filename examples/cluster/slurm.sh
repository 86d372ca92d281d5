#!/bin/bash
# One process a node, each with all GPUs of its node:  sbatch examples/cluster/slurm.sh
# Submitted again after a failure or on another number of nodes, it goes on from the last checkpoint;
# where there is none yet, --resume begins.
#SBATCH --job-name=palm
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --signal=TERM@300
#SBATCH --requeue

# SLURM sends SIGTERM five minutes before the end of the allocation; every process then saves and ends.
OUT=${OUT:-runs/palm-8b}  # on a file system that all nodes share

srun --kill-on-bad-exit=1 palm-haiku train --distributed --mesh fsdp --model palm-8b \
  --data 'corpus/*.txt' --tokenizer corpus/sentencepiece.model --seq-len 2048 --batch-size 512 \
  --dtype bfloat16 --remat attention --optimizer palm --spike 0.5 \
  --out "$OUT" --resume
