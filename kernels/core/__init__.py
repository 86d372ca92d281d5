"""What every op goes through, whatever the op and the chip."""
