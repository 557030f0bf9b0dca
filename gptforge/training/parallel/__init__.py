"""Data-parallel training: gradient reduction (DDP), FSDP and ZeRO-1."""
