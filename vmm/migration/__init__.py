"""The migration stack: precopy, postcopy, the return path and recovery, in QEMU's stream format."""
