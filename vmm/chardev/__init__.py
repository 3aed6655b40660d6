"""Character backends: where the serial port leads to. The only part of the machine that knows asyncio."""
