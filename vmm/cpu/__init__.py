"""The virtual CPU: Unicorn behind one engine, its thread, its state as QEMU's "cpu" version 12."""
