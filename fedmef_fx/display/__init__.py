"""What every view of numbers shares: sizes, tables, printable text, plots and notebooks."""
