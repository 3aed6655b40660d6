"""The devices of the machine: what the guest reaches by port I/O, and what of it travels."""
