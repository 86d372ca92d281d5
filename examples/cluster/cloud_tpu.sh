#!/bin/bash
# All hosts of a TPU slice at once, found by Cloud TPU's metadata. TPU: the slice's name.
# Called again it goes on from the last checkpoint; where there is none yet, --resume begins.
gcloud compute tpus tpu-vm ssh "${TPU:?}" --zone="${ZONE:?}" --worker=all --command="
  palm-haiku train --distributed --mesh fsdp=-1,model=4 --shard-residual --model palm-8b \
    --data '/mnt/data/corpus/*.txt' --seq-len 2048 --batch-size 512 --dtype bfloat16 \
    --remat attention --optimizer palm --out /mnt/data/runs/palm-8b --resume"
