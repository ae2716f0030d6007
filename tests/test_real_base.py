"""The study on a real base: its units, its data, and one unit of each kind at toy size."""
