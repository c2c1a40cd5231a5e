"""Checkpoints of other implementations, read and written: tables of names and layouts, one format a module."""

RUN, RETRO, HUGGINGFACE = "run", "retro", "huggingface"
MEGATRON_CORE, MEGATRON_TE, MEGATRON_LEGACY = "megatron-core", "megatron-te", "megatron-legacy"
WRITTEN = (RETRO, HUGGINGFACE, MEGATRON_CORE, MEGATRON_TE, MEGATRON_LEGACY)
READ = (RUN, *WRITTEN)
