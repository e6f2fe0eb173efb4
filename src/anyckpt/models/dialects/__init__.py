"""Other spellings of the hub's names: of containers, wrappers, ranks and modules from before Megatron-Core."""
