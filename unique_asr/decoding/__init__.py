"""What writes tokens: one sequence, rows of a batch, and the memory they take."""
