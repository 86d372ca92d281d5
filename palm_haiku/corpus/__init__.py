"""Corpora of any size: tokenised once into shards, then read where they lie.

`sources` reads documents, `build` tokenises them in many processes, `arrange` drops duplicates and
shuffles, `shards` is the format, `mixture` and `packing` make sequences, `command` the commands.
"""
