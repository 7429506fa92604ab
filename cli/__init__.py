"""What the programs share, and the only code beside them that knows trainer and library."""
