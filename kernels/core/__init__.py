"""The path of every op to its kernel, whatever the op and the chip."""
